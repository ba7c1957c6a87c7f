"""The report of a quickstart run: one HTML file that holds all of its pictures, curves and figures.

Read `write_report` first. Each section is a function from the run's files to HTML; a section whose
files are absent is left out and named in a note at the foot of the page.
"""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from tfusion.reporting import charts, page, pictures, samples
from tfusion.reporting.records import (
    CONFIG,
    METRICS,
    TRAIN,
    Missing,
    ReportError,
    RunFiles,
    Series,
    smooth,
)

# What to look for once this share of the steps is done.
MILESTONES = (
    (
        0.10,
        (
            "Both losses have left their first values for good. If the LM loss has not, look at "
            "the tokenizer and the loss mask; if the diffusion loss has not, at the latents and "
            "their normalisation."
        ),
    ),
    (
        0.25,
        (
            "The steep part is over. Sampled pictures should have the right overall colour while "
            "objects are still smudges; captions read fluently but name objects by guess."
        ),
    ),
    (
        0.50,
        (
            "Progress is slow and steady. Usually the cleanest and the noisiest bins hardly move "
            "any more, and it is in the middle ones that objects take shape."
        ),
    ),
    (
        0.75,
        (
            "As the learning rate falls, the training curve gets calmer. Held-out loss should "
            "still follow it down; if it turns up, the model is learning its examples by heart."
        ),
    ),
    (
        1.00,
        (
            "The end. Compare a run of your own with the held-out values here; losses of single "
            "training steps are too noisy for that."
        ),
    ),
)


def write_report(root: Path, out: Path) -> None:
    """Writes the page for the run in `root` to `out`; raises ReportError if that cannot be done."""
    run = RunFiles(root)
    if not root.is_dir():
        raise Missing(f"there is no run at {root}; `make quickstart` makes one")
    for required in (TRAIN, CONFIG, METRICS):
        run.path(required)
    try:
        sections = [(name, title, run.attempt(title, build)) for name, title, build in SECTIONS]
        body = header(run) + navigation(sections) + figures_table(run)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ReportError(
            f"a file in {root} lacks what the report needs: {error!r}; run "
            "`make quickstart` to write it anew"
        ) from error
    body += "".join(page.section(*section) for section in sections if section[2])
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f"{out.name}.tmp")
    unfinished.write_text(
        page.document(f"{root.resolve().name} – run report", body + left_out(run))
    )
    unfinished.replace(out)


def verdict(metric: dict[str, Any]) -> bool | None:
    """Whether a metric is as good as wanted; None when nothing is asked of it."""
    if metric["want"] is None:
        return None
    if metric["value"] is None:  # nothing to measure it on
        return False
    if metric["better"] == "higher":
        return metric["value"] >= metric["want"]
    return metric["value"] <= metric["want"]


def wanted(run: RunFiles) -> list[dict[str, Any]]:
    """Every figure, those of single classes of scenes too."""
    found = run.json(METRICS)
    classes = found.get("classes", {}).values()
    return [*found["metrics"].values(), *(m for figures in classes for m in figures.values())]


def header(run: RunFiles) -> str:
    """Title, verdict, facts, and a first handful of pictures."""
    metrics = wanted(run)
    verdicts = [verdict(m) for m in metrics if verdict(m) is not None]
    short = [m["title"] for m in metrics if verdict(m) is False]
    if short:
        words = f"Below what was wanted: {len(short)} of {len(verdicts)}, {', '.join(short)}"
    else:
        words = f"✓ As good as wanted: all {len(verdicts)} figures"
    css = "verdict short" if short else "verdict"
    lead = (
        "One small transformer that reads and writes text and paints pictures: next-token loss "
        "on words, diffusion loss on image latents, in a single sequence. Every prompt and "
        "every picture to describe was held out from training."
    )
    return (
        '<header class="hero"><div><p class="kicker">tfusion run report</p>'
        f'<h1>{escape(run.root.resolve().name)}</h1><p class="lead">{lead}</p>'
        f'<span class="{css}">{escape(words)}</span></div>'
        f"{run.attempt('Pictures in the header', samples.mosaic)}</header>{facts(run)}"
    )


def facts(run: RunFiles) -> str:
    """Size, length, time and machine, as far as they are known."""
    pairs: list[tuple[str, str]] = []
    keys = "num_params", "steps", "tokens", "images", "flops"
    if summary := run.optional_json("transfusion/summary.json", *keys):
        pairs += [
            ("parameters", page.count(summary["num_params"])),
            ("training steps", page.count(summary["steps"])),
            ("tokens seen", page.count(summary["tokens"])),
            ("images seen", page.count(summary["images"])),
            ("training compute", f"{page.count(summary['flops'])}FLOP"),
        ]
    else:
        pairs.append(("training steps", f"{max(row['step'] for row in run.jsonl(TRAIN)):,}"))
    seconds = sum(stage["seconds"] for stage in run.stages())
    if seconds:
        pairs.append(("wall time, all stages", page.duration(seconds)))
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in pairs)
    if timing := run.optional_json("transfusion/timing.json", "machine"):
        cells += f'<div class="wide"><dt>machine</dt><dd>{escape(timing["machine"])}</dd></div>'
    return f'<dl class="facts">{cells}</dl>'


def navigation(sections: list[tuple[str, str, str]]) -> str:
    """Links to the sections that the page has."""
    links = ['<a href="#figures">Figures</a>']
    links += [f'<a href="#{name}">{name.capitalize()}</a>' for name, _, body in sections if body]
    return f"<nav>{''.join(links)}</nav>"


def figures_table(run: RunFiles) -> str:
    """Every metric with its interval, chance level, wanted value and a tick or a cross."""
    rows = []
    for metric in run.json(METRICS)["metrics"].values():
        met, low, high = verdict(metric), metric["low"], metric["high"]
        below = [f"{page.number(low)} to {page.number(high)}"] if low is not None else []
        below += [f"n = {metric['n']:,}"] if metric["n"] is not None else []
        mark = {
            None: '<span class="faint">·</span>',
            True: '<span class="good">✓</span>',
            False: '<span class="bad">✗</span>',
        }[met]
        sign = "≥" if metric["better"] == "higher" else "≤"
        want = "–" if metric["want"] is None else f"{sign} {page.number(metric['want'])}"
        chance = "" if metric["chance"] is None else f"chance {page.number(metric['chance'])}, "
        before = chance + ("wanted " if metric["want"] is not None else "wanted: ")
        drawn = pictures.scale(
            metric["value"], low, high, metric["chance"], metric["want"], met is not False
        )
        rows.append(
            f'<tr><td>{escape(metric["title"])}</td><td class="value">'
            f"{page.number(metric['value'])}<small>{' · '.join(below)}</small></td>"
            f'<td class="drawn">{drawn}</td><td class="num chance">'
            f'{page.number(metric["chance"])}</td><td class="num want" '
            f'data-before="{before}">{want}</td>'
            f'<td class="mark">{mark}</td></tr>'
        )
    head = (
        "<tr><th>measured on held-out data</th><th>value, 95 % interval</th><th></th>"
        '<th class="num">chance</th><th class="num">wanted</th><th></th></tr>'
    )
    body = (
        f'<div class="scroll"><table class="figures"><thead>{head}</thead><tbody>'
        f'{"".join(rows)}</tbody></table></div><p class="key">Dot: value, on its 95 % interval. '
        "Dashed mark: chance. Solid mark: wanted. Fractions are drawn from 0 to 1. Intervals are "
        "Wilson's over the prompts of this one run: what another seed of training would change is "
        "not in them.</p>"
    )
    return page.section("figures", "What it can do", body + classes_table(run))


CLASS_COLUMNS = (
    ("generation_all", "drawn: all of it"),
    ("caption_all", "told: colour, sprites, relation"),
    ("caption_exact", "told: word for word"),
)


def classes_table(run: RunFiles) -> str:
    """How each class of scene fares, where the run was evaluated on scenes."""
    classes = run.json(METRICS).get("classes")
    if not classes:
        return ""
    rows = []
    for name, figures in classes.items():
        cells = [class_cell(figures[key]) for key, _ in CLASS_COLUMNS]
        count = max(figures[key]["n"] for key, _ in CLASS_COLUMNS)
        rows.append([escape(name), f"{count:,}", *cells])
    head = ["class of scene", "n", *(title for _, title in CLASS_COLUMNS)]
    return "<p></p>" + page.table(head, rows, numeric=(1, 2, 3, 4))


def class_cell(metric: dict[str, Any]) -> str:
    """A value on its interval, with a mark where something was wanted of it."""
    mark = {
        None: "",
        True: ' <span class="good">✓</span>',
        False: ' <span class="bad">✗</span>',
    }[verdict(metric)]
    low, high, chance = metric["low"], metric["high"], metric["chance"]
    below = [f"{page.number(low)} to {page.number(high)}"] if low is not None else []
    below += [f"chance {page.number(chance)}"] if chance is not None else []
    return f"{page.number(metric['value'])}{mark}<small>{' · '.join(below)}</small>"


def autoencoder(run: RunFiles) -> str:
    """Reconstructions of held-out images, and how the autoencoder got there."""
    return run.attempt("Reconstructions", samples.reconstructions) + charts.cards(
        run,
        [
            ("Reconstruction loss", charts.reconstruction_loss),
            ("Reconstruction quality", charts.psnr),
        ],
    )


def milestones(run: RunFiles) -> str:
    """What this run showed at a few points, as a yardstick for the next."""
    names = ("lm_loss", "diffusion_loss")
    train = [run.series(TRAIN, f"train/{name}") for name in names]
    held_out = [run.optional_series(TRAIN, f"eval/{name}") for name in names]
    last = max(row["step"] for row in run.jsonl(TRAIN))
    rows = []
    for share, guidance in MILESTONES:
        step = share * last
        cells = [
            f"{page.number((h or smooth(t)).near(step))}<small>{fall(smooth(t), step)}</small>"
            for t, h in zip(train, held_out, strict=True)
        ]
        rows.append([f"<b>{100 * share:.0f}&nbsp;%</b>", f"{step:,.0f}", *cells, guidance])
    lead = (
        "A yardstick made from this run. Losses are held out where the run measured that, from the "
        "evaluation nearest to the step; below each, how much of the whole fall of the training "
        "loss was done by then."
    )
    return f'<p class="lead">{lead}</p>' + page.table(
        ["of the run", "step", "LM loss", "diffusion loss", "what you should see"],
        rows,
        numeric=(1, 2, 3),
        css="steps",
    )


def fall(series: Series, step: float) -> str:
    """The share of the way from its first value to its last that a series has gone."""
    first, last = series.values[0], series.values[-1]
    return f"{100 * (first - series.near(step)) / (first - last):.0f} %" if first != last else ""


def config(run: RunFiles) -> str:
    """The resolved configs and the versions, folded away."""
    parts = [("Transfusion", page.pretty_json(run.json(CONFIG)))]
    if (run.root / "autoencoder/config.json").is_file():
        parts.append(("Autoencoder", page.pretty_json(run.json("autoencoder/config.json"))))
    if timing := run.optional_json("transfusion/timing.json", "versions"):
        parts.append(("Versions", page.pretty_json(timing["versions"])))
    return "".join(f"<details><summary>{name}</summary>{body}</details>" for name, body in parts)


def left_out(run: RunFiles) -> str:
    """The note on what the page lacks, and which command would fill it in."""
    if not run.notes:
        return ""
    titles: dict[str, list[str]] = {}
    for title, reason in run.notes:
        titles.setdefault(reason, []).append(title)
    items = "".join(
        f"<li>{escape('; '.join(group))}<small>{escape(reason)}</small></li>"
        for reason, group in titles.items()
    )
    return page.section("left-out", "Left out of this report", f'<ul class="note">{items}</ul>')


# Anchor (also its name in the navigation), title, and what builds it.
SECTIONS: tuple[tuple[str, str, Callable[[RunFiles], str]], ...] = (
    ("pictures", "Held-out prompts, painted", samples.generations),
    ("captions", "Held-out images, described", samples.captions),
    ("interleaved", "Documents written by the model", samples.interleaved),
    ("losses", "How it learnt", charts.losses),
    ("autoencoder", "What the autoencoder keeps", autoencoder),
    ("mask", "Who sees whom", samples.attention_mask),
    ("speed", "Speed, memory and time", charts.speed),
    ("milestones", "What you should see at which step", milestones),
    ("config", "Resolved configuration", config),
)
