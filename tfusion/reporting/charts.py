"""The parts of a report that are measured: losses, the optimiser's vital signs, speed and time.

Each function takes the run's files and returns HTML; it raises `Missing` where a file or a quantity
is absent.
"""

import statistics
from collections.abc import Callable
from html import escape

import numpy as np

from tfusion.reporting import page, plots
from tfusion.reporting.records import AUTOENCODER, METRICS, TRAIN, Missing, RunFiles


def cards(run: RunFiles, parts: list[tuple[str, Callable[[RunFiles], str]]]) -> str:
    """The figures of a section side by side; those that lack data are left out with a note."""
    made = "".join(run.attempt(title, build) for title, build in parts)
    return f'<div class="cards">{made}</div>' if made else ""


def losses(run: RunFiles) -> str:
    """Loss curves, comparisons with simple predictors, and the optimiser's vital signs."""
    parts = [
        ("LM loss", lm_loss),
        ("Diffusion loss", diffusion_loss),
        ("Diffusion loss per noise bin", diffusion_bins),
        ("Diffusion loss against a linear predictor", linear_baseline),
        ("LM loss against n-grams", ngrams),
        ("Gradient norms", gradient_norms),
        ("Learning rate", learning_rate),
        ("Parameter norm", parameter_norm),
    ]
    return cards(run, parts)


def lm_loss(run: RunFiles) -> str:
    """Next-token loss over steps."""
    reading = "Next-token loss on text, in nats per token."
    return loss_over_steps(run, "LM loss", "lm_loss", (plots.TEXT, plots.TEXT_LIGHT), reading)


def diffusion_loss(run: RunFiles) -> str:
    """Denoising loss over steps."""
    reading = "Squared error per latent element, over all noise levels."
    return loss_over_steps(
        run, "Diffusion loss", "diffusion_loss", (plots.IMAGE, plots.IMAGE_LIGHT), reading
    )


def loss_over_steps(
    run: RunFiles, title: str, name: str, colours: tuple[str, str], reading: str
) -> str:
    """One loss, in training and held out, over all documents and of each source apart."""
    by_source = {
        source: run.series(TRAIN, f"eval/{source}/{name}") for source in run.sources(name)
    }
    drawn = plots.loss(
        f"{title} over steps",
        run.series(TRAIN, f"train/{name}"),
        run.optional_series(TRAIN, f"eval/{name}"),
        by_source if len(by_source) > 1 else {},
        colours,
    )
    if len(by_source) > 1:
        reading += " Dotted: held-out documents of each source."
    return page.card(title, reading, drawn)


def diffusion_bins(run: RunFiles) -> str:
    """Denoising loss over steps, apart for each fifth of the noise range."""
    found = {
        kind: {
            k: series
            for k in range(plots.NUM_BINS)
            if (series := run.optional_series(TRAIN, f"{kind}/diffusion_loss_bin{k}"))
        }
        for kind in ("train", "eval")
    }
    if not found["train"]:
        run.series(TRAIN, "train/diffusion_loss_bin0")
    drawn = plots.noise_bins("Diffusion loss per noise bin", found["train"], found["eval"])
    return page.card(
        "Diffusion loss per noise level",
        "By t, from nearly clean (0) to pure noise "
        "(1). Lines: training, running mean; dots: held out.",
        drawn,
    )


def linear_baseline(run: RunFiles) -> str:
    """Held-out denoising loss beside what the best linear map reaches."""
    baseline = run.json(METRICS).get("linear_baseline")
    if not baseline:
        raise Missing(f"{run.root / METRICS} holds no linear_baseline")
    if None in baseline["model"]:
        raise Missing(f"{run.root / METRICS} holds no held-out image of some noise level")
    drawn = plots.against_linear(
        "Held-out diffusion loss against a linear predictor", baseline["model"], baseline["bins"]
    )
    reading = (
        "Held-out diffusion loss per noise level. Where the coloured bar is below the grey one, "
        "the model knows more than means and covariances."
    )
    return page.card("Against the best linear predictor", reading, drawn)


def ngrams(run: RunFiles) -> str:
    """Held-out LM loss beside n-gram models."""
    tables = run.json(METRICS).get("ngrams")
    if not tables:
        raise Missing(f"{run.root / METRICS} holds no ngrams")
    drawn = plots.against_ngrams("Held-out LM loss against n-grams", tables)
    return page.card(
        "Against n-gram models",
        "Held-out LM loss on each kind of text, in nats per token; shorter is better.",
        drawn,
    )


def gradient_norms(run: RunFiles) -> str:
    """Norms of the gradient: total, and of each loss alone."""
    lines = [
        (label, series, colour)
        for label, key, colour in (
            ("total", "train/grad_norm", plots.GREY),
            ("LM loss", "grad_norm/lm_loss", plots.TEXT),
            ("diffusion loss", "grad_norm/diffusion_loss", plots.IMAGE),
        )
        if (series := run.optional_series(TRAIN, key))
    ]
    if not lines:
        run.series(TRAIN, "train/grad_norm")
    drawn = plots.curves("Gradient norms", lines, log=True, raw=False)
    return page.card(
        "Gradient norms",
        "The whole gradient before clipping, and that of each loss alone; running means.",
        drawn,
    )


def learning_rate(run: RunFiles) -> str:
    """The schedule as it was applied."""
    series = run.series(TRAIN, "train/learning_rate")
    drawn = plots.curves("Learning rate", [("learning rate", series, plots.INK)])
    return page.card("Learning rate", "As applied.", drawn)


def parameter_norm(run: RunFiles) -> str:
    """The size of the parameters over steps."""
    series = run.series(TRAIN, "train/param_norm")
    drawn = plots.curves("Parameter norm", [("parameter norm", series, plots.INK)])
    return page.card("Parameter norm", "Of all parameters together.", drawn)


def reconstruction_loss(run: RunFiles) -> str:
    """The autoencoder's training losses."""
    lines = [
        (label, series, colour)
        for label, key, colour in (
            ("mean absolute error", "train/reconstruction_l1", plots.IMAGE),
            ("mean squared error", "train/reconstruction_mse", plots.NOISE[3]),
        )
        if (series := run.optional_series(AUTOENCODER, key))
    ]
    if not lines:
        run.series(AUTOENCODER, "train/reconstruction_l1")
    drawn = plots.curves("Reconstruction loss", lines, log=True, raw=False)
    return page.card("Reconstruction loss", "In training, running means.", drawn)


def psnr(run: RunFiles) -> str:
    """Held-out peak signal-to-noise ratio over steps, from the squared error of pixels in -1..1."""
    error = run.series(AUTOENCODER, "eval/reconstruction_mse")
    series = error._replace(values=10 * np.log10(4 / error.values))
    drawn = plots.dots("Held-out PSNR", series, plots.IMAGE, "dB")
    return page.card("Reconstruction quality", "Held-out peak signal-to-noise ratio.", drawn)


def speed(run: RunFiles) -> str:
    """Throughput, memory, and where the time went."""
    stages = run.attempt("Time per stage", stage_times)
    return stages + cards(run, [("Throughput", throughput), ("Speed figures", speed_table)])


def stage_times(run: RunFiles) -> str:
    """A bar for each timed stage."""
    stages = run.stages()
    if not stages:
        run.path("transfusion/timing.json")
    longest = max(stage["seconds"] for stage in stages)
    rows = [
        [
            f'{escape(stage["part"])} <span class="faint">·</span> {escape(stage["name"])}',
            f'<div class="bar" style="width:{100 * stage["seconds"] / longest:.1f}%"></div>',
            page.duration(stage["seconds"]),
            page.number(stage["peak_memory_mb"]),
        ]
        for stage in stages
    ]
    drawn = page.table(["stage", "", "time", "peak MB"], rows, numeric=(2, 3))
    drawn = drawn.replace('<td class="" data-label="">', '<td class="track">')
    total = page.duration(sum(stage["seconds"] for stage in stages))
    reading = f"{total} in all; beside it, the peak memory of the process in each stage."
    return f'<div class="cards">{page.card("Time per stage", reading, drawn)}</div>'


def throughput(run: RunFiles) -> str:
    """Tokens a second over steps."""
    lines = [("tokens", run.series(TRAIN, "perf/tokens_per_sec"), plots.TEXT)]
    patches = run.optional_series(TRAIN, "perf/patches_per_sec")
    lines += [("of these, image patches", patches, plots.IMAGE)] if patches else []
    drawn = plots.curves("Throughput", lines, raw=False, unit="per second")
    return page.card("Throughput", "In training; running mean.", drawn)


def speed_table(run: RunFiles) -> str:
    """Medians over the run of what was measured about speed."""
    rows = []
    for key, title, show in (
        ("perf/tokens_per_sec", "tokens per second", lambda v: f"{v:,.0f}"),
        ("perf/patches_per_sec", "image patches per second", lambda v: f"{v:,.0f}"),
        ("perf/step_ms", "time per step", lambda v: f"{page.number(v)} ms"),
        ("perf/model_flops_per_sec", "model compute", lambda v: f"{page.count(v)}FLOP/s"),
        ("perf/mfu", "share of the peak (MFU)", lambda v: f"{100 * v:.1f} %"),
        ("data/fill", "row positions filled", lambda v: f"{100 * v:.1f} %"),
        ("data/wait_fraction", "time spent waiting for data", lambda v: f"{100 * v:.1f} %"),
    ):
        series = run.optional_series(TRAIN, key)
        if series:
            rows.append([title, show(statistics.median(series.values.tolist()))])
    if not rows:
        run.series(TRAIN, "perf/step_ms")
    return page.card(
        "Speed figures",
        "Medians over the training run.",
        page.table(["", "median"], rows, numeric=(1,)),
    )
