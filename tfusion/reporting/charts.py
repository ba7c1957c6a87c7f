"""The parts of a report that training left: losses, the optimiser's vital signs, speed and time.

Each function takes a run's files and returns HTML; it raises `Missing` where a file or a quantity is absent.
What a run logged under `train/` and `eval/` is drawn, whatever its name.
"""

import re
import statistics
from collections.abc import Callable
from html import escape
from typing import NamedTuple

import numpy as np

from tfusion.reporting import page, plots
from tfusion.reporting.records import GOODPUT, LOG, Missing, RunFiles, Series

VITAL = ("grad_norm", "learning_rate", "param_norm", "clip_rate")  # in train/, and no losses
BIN = re.compile(r"(.+)_bin(\d+)")


class Words(NamedTuple):
    """How a loss is called and read."""

    title: str
    reading: str = ""
    colours: tuple[str, str] = (plots.TEXT, plots.TEXT_LIGHT)


IMAGE_COLOURS = (plots.IMAGE, plots.IMAGE_LIGHT)
KNOWN = {  # in this order; others follow under their own name
    "lm_loss": Words("LM loss", "Next-token loss on text, in nats per token."),
    "code_loss": Words("Code loss", "Next-token loss on the codes of images, in nats per code.", IMAGE_COLOURS),
    "token_loss": Words("Token loss", "What is trained: next-token loss on text and codes, and z-loss."),
    "z_loss": Words("log Z squared", "Of the softmax's normaliser; z-loss keeps it small."),
    "diffusion_loss": Words("Diffusion loss", "Squared error per latent element, over all noise levels.",
                            IMAGE_COLOURS),
    "reconstruction_l1": Words("Reconstruction loss", "Mean absolute error of pixels in -1..1.", IMAGE_COLOURS),
    "reconstruction_mse": Words("Squared reconstruction loss", "Mean squared error of pixels in -1..1.",
                                IMAGE_COLOURS),
    "codebook": Words("Codebook loss", "Squared distance of vectors from their codes, as codes learn by it.",
                      IMAGE_COLOURS),
    "commitment": Words("Commitment loss", "The same, as the encoder learns by it.", IMAGE_COLOURS),
    "kl": Words("KL divergence", "Of the latents from a unit Gaussian, in nats per picture.", IMAGE_COLOURS),
}


def words(name: str) -> Words:
    return KNOWN.get(name) or Words(name.replace("_", " ").capitalize())


def loss_names(run: RunFiles) -> list[str]:
    """The losses of a run's training, without those of noise bins."""
    found = [name for name in run.logged("train/") if name not in VITAL and not BIN.fullmatch(name)]
    known = list(KNOWN)
    return sorted(found, key=lambda name: (known.index(name) if name in known else len(known), name))


def cards(run: RunFiles, parts: list[tuple[str, Callable[[RunFiles], str]]]) -> str:
    """The figures of a section side by side; those that lack data are left out with a note."""
    made = "".join(run.attempt(title, build) for title, build in parts)
    return f'<div class="cards">{made}</div>' if made else ""


def losses(run: RunFiles) -> str:
    """Loss curves, whole and by noise level, and the optimiser's vital signs."""
    names = loss_names(run)
    binned = sorted({match[1] for name in run.logged("train/") if (match := BIN.fullmatch(name))})
    parts = [(words(name).title, lambda run, name=name: loss(run, name)) for name in names]
    parts += [(f"{words(name).title} by noise level", lambda run, name=name: noise_bins(run, name))
              for name in binned]
    if "reconstruction_mse" in run.logged("eval/"):
        parts.append(("Reconstruction quality", psnr))
    parts += [("Gradient norms", gradient_norms), ("Learning rate", learning_rate),
              ("Parameter norm", parameter_norm)]
    return cards(run, parts)


def loss(run: RunFiles, name: str) -> str:
    """One loss over steps, in training and held out, over all documents and of each source apart."""
    title, reading, colours = words(name)
    sources = [key.split("/")[0] for key in run.logged("eval/") if key.endswith(f"/{name}")]
    by_source = {source: run.series(f"eval/{source}/{name}") for source in sources} if len(sources) > 1 else {}
    drawn = plots.loss(f"{title} over steps: {run.name}", run.series(f"train/{name}"),
                       run.optional_series(f"eval/{name}"), by_source, colours)
    return page.card(title, reading + " Dotted: held-out documents of each source." * bool(by_source), drawn)


def noise_bins(run: RunFiles, name: str) -> str:
    """A loss over steps, apart for each bin of the noise's range."""
    train, held_out = ({int(match[2]): run.series(f"{split}/{match[0]}") for key in run.logged(f"{split}/")
                        if (match := BIN.fullmatch(key)) and match[1] == name} for split in ("train", "eval"))
    title = f"{words(name).title} by noise level"
    drawn = plots.noise_bins(f"{title}: {run.name}", train, held_out)
    return page.card(title, "By t, from nearly clean (0) to pure noise (1). Lines: training, running mean; "
                     "dots: held out.", drawn)


def gradient_norms(run: RunFiles) -> str:
    """Norms of the gradient: total, and of each loss alone."""
    names = sorted(run.logged("grad_norm/"), key=lambda name: words(name).title)
    colours = {name: words(name).colours[0] for name in names}
    lines = [("total", run.series("train/grad_norm"), plots.GREY)]
    lines += [(words(name).title, run.series(f"grad_norm/{name}"), colours[name]) for name in names]
    drawn = plots.curves(f"Gradient norms: {run.name}", lines, log=True, raw=False)
    alone = ", and that of each loss alone" * bool(names)
    return page.card("Gradient norms", f"The whole gradient before clipping{alone}; running means.", drawn)


def learning_rate(run: RunFiles) -> str:
    """The schedule as it was applied."""
    series = run.series("train/learning_rate")
    drawn = plots.curves(f"Learning rate: {run.name}", [("learning rate", series, plots.INK)])
    return page.card("Learning rate", "As applied.", drawn)


def parameter_norm(run: RunFiles) -> str:
    """The size of the parameters over steps."""
    series = run.series("train/param_norm")
    drawn = plots.curves(f"Parameter norm: {run.name}", [("parameter norm", series, plots.INK)])
    return page.card("Parameter norm", "Of all parameters together.", drawn)


def psnr(run: RunFiles) -> str:
    """Held-out peak signal-to-noise ratio over steps, from the squared error of pixels in -1..1."""
    error = run.series("eval/reconstruction_mse")
    series = error._replace(values=10 * np.log10(4 / error.values))
    drawn = plots.dots(f"Held-out PSNR: {run.name}", series, plots.IMAGE, "dB")
    return page.card("Reconstruction quality", "Held-out peak signal-to-noise ratio.", drawn)


def speed(run: RunFiles) -> str:
    """Throughput, memory, and where the time went."""
    stages = run.attempt("Time per stage", stage_times)
    return stages + cards(run, [("Throughput", throughput), ("Speed figures", speed_table),
                                ("Where the time went", goodput)])


def stage_times(run: RunFiles) -> str:
    """A bar for each timed stage."""
    stages = run.stages()
    if not stages:
        run.path("timing.json")
    longest = max(stage["seconds"] for stage in stages)
    rows = [
        [f'{escape(stage["part"])} <span class="faint">·</span> {escape(stage["name"])}',
         f'<div class="bar" style="width:{100 * stage["seconds"] / max(longest, 1e-9):.1f}%"></div>',
         page.duration(stage["seconds"]), page.number(stage["peak_memory_mb"])]
        for stage in stages]
    drawn = page.table(["stage", "", "time", "peak MB"], rows, numeric=(2, 3))
    drawn = drawn.replace('<td class="" data-label="">', '<td class="track">')
    total = page.duration(sum(stage["seconds"] for stage in stages))
    reading = f"{total} in all; beside it, the peak memory of the process in each stage."
    return f'<div class="cards">{page.card("Time per stage", reading, drawn)}</div>'


PARTS = {"step": "training steps", "init": "starting, restoring", "compile": "compiling",
         "data": "waiting for data", "save": "saving", "eval": "evaluating", "lost": "lost to restarts"}


def goodput(run: RunFiles) -> str:
    """Wall time of training over all its attempts, by what it was spent on; older runs do not tell."""
    found = run.optional_json(GOODPUT, "seconds", "attempts")
    if found is None:
        return ""
    seconds, whole = found["seconds"], max(sum(found["seconds"].values()), 1e-9)
    rows = [[title, page.duration(seconds[part]), f"{100 * seconds[part] / whole:.1f} %"]
            for part, title in PARTS.items()]
    drawn = page.table(["", "time", "share"], rows, numeric=(1, 2))
    attempts = len(found["attempts"])
    goes = f"{attempts} attempts" if attempts > 1 else "one go"
    reading = (f"Of training, {page.duration(whole)} in {goes}. Lost: what was done after the checkpoint that "
               "the next attempt went on from.")
    return page.card("Where the time went", reading, drawn)


def throughput(run: RunFiles) -> str:
    """Tokens a second over steps; of a run without tokens, images."""
    rates = (("perf/tokens_per_sec", "tokens", plots.TEXT),
             ("perf/patches_per_sec", "of these, image patches", plots.IMAGE))
    lines = [(title, series, colour) for key, title, colour in rates if (series := run.optional_series(key))]
    lines = lines or [("images", run.series("perf/images_per_sec"), plots.IMAGE)]
    drawn = plots.curves("Throughput", lines, raw=False, unit=f"{lines[0][0]} per second")
    return page.card("Throughput", "In training; running mean.", drawn)


RATES = (
    ("perf/tokens_per_sec", "tokens per second", lambda v: f"{v:,.0f}"),
    ("perf/patches_per_sec", "image patches per second", lambda v: f"{v:,.0f}"),
    ("perf/images_per_sec", "images per second", lambda v: f"{v:,.0f}"),
    ("perf/step_ms", "time per step", lambda v: f"{page.number(v)} ms"),
    ("perf/model_flops_per_sec", "model compute", lambda v: f"{page.count(v)}FLOP/s"),
    ("perf/mfu", "share of the peak (MFU)", lambda v: f"{100 * v:.1f} %"),
    ("data/fill", "row positions filled", lambda v: f"{100 * v:.1f} %"),
    ("data/wait_fraction", "time spent waiting for data", lambda v: f"{100 * v:.1f} %"))


def speed_table(run: RunFiles) -> str:
    """Medians over the run of what was measured about speed."""
    rows = [[title, show(statistics.median(series.values.tolist()))] for key, title, show in RATES
            if (series := run.optional_series(key))]
    if not rows:
        raise Missing(f"{run.root / LOG} holds no rates")
    drawn = page.table(["", "median"], rows, numeric=(1,))
    return page.card("Speed figures", "Medians over the training run.", drawn)


# What to look for once this share of the steps is done: of a run that learns words and pictures at once.
MILESTONES = (
    (0.10, "Both losses have left their first values for good. If the LM loss has not, look at the tokenizer "
           "and the loss mask; if the diffusion loss has not, at the latents and their normalisation."),
    (0.25, "The steep part is over. Sampled pictures should have the right overall colour while objects are "
           "still smudges; captions read fluently but name objects by guess."),
    (0.50, "Progress is slow and steady. Usually the cleanest and the noisiest bins hardly move any more, and "
           "it is in the middle ones that objects take shape."),
    (0.75, "As the learning rate falls, the training curve gets calmer. Held-out loss should still follow it "
           "down; if it turns up, the model is learning its examples by heart."),
    (1.00, "The end. Compare a run of your own with the held-out values here; losses of single training steps "
           "are too noisy for that."))


def milestones(run: RunFiles) -> str:
    """What this run showed at a few points, as a yardstick for the next."""
    names = loss_names(run)
    if not names:
        raise Missing(f"{run.root / LOG} holds no losses")
    guided = {"lm_loss", "diffusion_loss"} <= set(names)
    last, rows = max(row["step"] for row in run.log()), []
    for share, guidance in MILESTONES:
        step, cells = share * last, []
        for name in names:
            train = run.series(f"train/{name}")
            shown = run.optional_series(f"eval/{name}") or plots.smooth(train)
            cells.append(f"{page.number(shown.near(step))}<small>{fall(plots.smooth(train), step)}</small>")
        rows.append([f"<b>{100 * share:.0f}&nbsp;%</b>", f"{step:,.0f}", *cells, *[guidance] * guided])
    head = ["of the run", "step", *(words(name).title for name in names), *["what you should see"] * guided]
    lead = ("A yardstick made from this run. Losses are held out where the run measured that, from the "
            "evaluation nearest to the step; below each, how much of the whole fall of the training loss was "
            "done by then.")
    numeric = range(1, 2 + len(names))
    return f'<p class="lead">{lead}</p>' + page.table(head, rows, numeric=numeric, css="steps")


def fall(series: Series, step: float) -> str:
    """The share of the way from its first value to its last that a series has gone."""
    first, last = series.values[0], series.values[-1]
    return f"{100 * (first - series.near(step)) / (first - last):.0f} %" if first != last else ""
