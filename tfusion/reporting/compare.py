"""Runs side by side, of any kinds: curves of the losses that they share, over steps, tokens, FLOPs and time;
their figures; and the keys of their configs that differ.
"""

import json
import os
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tfusion.reporting import cards, charts, figures, page, plots
from tfusion.reporting.records import CONFIG, FIGURES, LOG, SUMMARY, ReportError, RunFiles, Series, smooth

ABSENT = '<span class="faint">–</span>'


class Compared(NamedTuple):
    """A run under the name and the colour that tell it from the others."""

    files: RunFiles
    name: str
    colour: str


def write_comparison(roots: list[Path], out: Path) -> None:
    """Writes the page for the runs to `out`; raises ReportError if that cannot be done."""
    if len(roots) < 2:
        raise ReportError("--compare needs two runs at least")
    runs = [Compared(RunFiles(root), name, plots.RUNS[i % len(plots.RUNS)])
            for i, (root, name) in enumerate(zip(roots, names(roots), strict=True))]
    for run in runs:
        run.files.path(CONFIG)
        run.files.path(LOG)
    try:
        page.write(out, " – ".join(["comparison", *(run.name for run in runs)]), body(runs))
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise ReportError(f"a file of these runs lacks what the comparison needs: {error!r}; `python -m "
                          "tfusion.evaluate --workdir=RUN` writes those of an evaluation anew") from error


def names(roots: list[Path]) -> list[str]:
    """The ends of the paths, as long as it takes to tell them apart."""
    paths = [root.resolve().parts for root in roots]
    for length in range(1, max(map(len, paths)) + 1):
        found = [os.path.join(*parts[-length:]) for parts in paths]
        if len(set(found)) == len(found):
            return found
    raise ReportError("--compare names a run twice")


def body(runs: list[Compared]) -> str:
    sections = [("runs", "The runs", overview(runs)), ("figures", "What they can do", figures_table(runs)),
                ("pictures", "What they make", pictures(runs)), ("losses", "How they learnt", losses(runs)),
                ("config", "Where their configurations differ", config_table(runs))]
    sections = [section for section in sections if section[2]]
    title = " · ".join(f'<span style="color:{run.colour}">{escape(run.name)}</span>' for run in runs)
    header = (f'<header class="compared"><p class="kicker">tfusion comparison of {len(runs)} runs</p>'
              f"<h1>{title}</h1></header>")
    return header + page.navigation([name for name, *_ in sections]) + "".join(
        page.section(*section) for section in sections)


def head(runs: list[Compared]) -> list[str]:
    return [run.name for run in runs]


def overview(runs: list[Compared]) -> str:
    """Kind, size and length of each."""
    rows = []
    for title, read in (
            ("kind of training", lambda run: escape(str(run.json(CONFIG).get("objective", "")))),
            ("parameters", lambda run: fact(run, "num_params")),
            ("training steps", lambda run: fact(run, "steps")),
            ("tokens seen", lambda run: fact(run, "tokens")), ("images seen", lambda run: fact(run, "images")),
            ("training compute, FLOP", lambda run: fact(run, "flops")),
            ("time in training steps", time_spent)):
        cells = [read(run.files) or ABSENT for run in runs]
        rows.append([title, *cells])
    paths = [f'<code>{escape(str(run.files.root))}</code>' for run in runs]
    return page.table(["", *head(runs)], [*rows, ["where", *paths]], range(1, len(runs) + 1), css="compared")


def fact(run: RunFiles, key: str) -> str:
    """Of summary.json, and of a run that is not done, of what it logged last."""
    summary = run.optional_json(SUMMARY) or {}
    logged = run.optional_series(f"total/{key}")
    steps = max((row["step"] for row in run.log()), default=0) if key == "steps" else 0
    value = summary.get(key) or (logged.values[-1] if logged else steps)
    return page.count(value) if value else ""


def time_spent(run: RunFiles) -> str:
    axis = time_axis(run)
    return page.duration(axis.values[-1]) if axis else ""


def time_axis(run: RunFiles) -> Series | None:
    """Seconds in training steps up to each step: without evaluation, saving and standing still."""
    step_ms = run.optional_series("perf/step_ms")
    if step_ms is None:
        return None
    since = np.diff(step_ms.steps, prepend=0)
    return Series(step_ms.steps, np.cumsum(since * step_ms.values) / 1e3)


def minutes(seconds: Series | None) -> Series | None:
    return seconds and seconds._replace(values=seconds.values / 60)


AXES = (  # title, unit, what reads it: Series of the axis' value at each step
    ("steps", "step", lambda run: Series(*[np.array([0.0, 1e18])] * 2)),
    ("tokens", "tokens", lambda run: run.optional_series("total/tokens")),
    ("compute", "training FLOP", lambda run: run.optional_series("total/flops")),
    ("time", "minutes in training steps", lambda run: minutes(time_axis(run))))


def on(axis: Series, series: Series) -> Series:
    """The series with its steps replaced by the axis' values there; of steps beyond it, none."""
    kept = series.steps <= axis.steps[-1]
    at = np.interp(series.steps[kept], np.append(0.0, axis.steps), np.append(0.0, axis.values))
    return Series(at, series.values[kept])


def losses(runs: list[Compared]) -> str:
    """Every loss that two of the runs have, over each axis that two of those have."""
    having = {}
    for run in runs:
        for name in charts.loss_names(run.files):
            having.setdefault(name, []).append(run)
    shared = {name: some for name, some in having.items() if len(some) > 1}
    if not shared:
        return '<p class="lead">No two of these runs have a loss in common.</p>'
    made = []
    for name, some in shared.items():
        title, reading, _ = charts.words(name)
        drawn = "".join(loss_on(name, some, *axis) for axis in AXES)
        words = escape(f"{reading} Faint line: running mean in training; line with dots: held out.".strip())
        made.append(f'<h3>{escape(title)}</h3><p class="lead">{words}</p><div class="cards">{drawn}</div>')
    return "".join(made)


def loss_on(name: str, runs: list[Compared], axis_title: str, unit: str, read_axis) -> str:
    """One loss over one axis; nothing where fewer than two runs have that axis."""
    lines = []
    for run in runs:
        axis = read_axis(run.files)
        if axis is None or not axis.values[-1]:
            continue
        held_out = run.files.optional_series(f"eval/{name}")
        lines.append((run.name, on(axis, smooth(run.files.series(f"train/{name}"))),
                      on(axis, held_out) if held_out else None, run.colour))
    if len(lines) < 2:
        return ""
    title = f"{charts.words(name).title} over {axis_title}"
    return page.card(title, "", plots.compared(title, lines, unit))


def figures_table(runs: list[Compared]) -> str:
    """Each figure a row, each run a column; those of parts of the data too."""
    found = {run.name: (run.files.optional_json(FIGURES, "metrics") or {}).get("metrics", {}) for run in runs}
    titles = {name: figure["title"] for some in found.values() for name, figure in some.items()}
    if not titles:
        return ""
    rows = [[escape(title), *(figures.cell(some[name]) if name in some else ABSENT for some in found.values())]
            for name, title in titles.items()]
    table = page.table(["held out", *head(runs)], rows, range(1, len(runs) + 1), css="compared")
    missing = [run.name for run in runs if not found[run.name]]
    note = (f"Not evaluated: {', '.join(missing)}; `python -m tfusion.evaluate --workdir=RUN` does that. "
            if missing else "")
    return table + (f'<p class="key">{escape(note)}Below a value its 95 % interval. ≈: short of what was '
                    f"wanted, and within the interval. {figures.INTERVALS}</p>")


def pictures(runs: list[Compared]) -> str:
    """The first pictures of each run, where it made any."""
    made = []
    for run in runs:
        left = run.files.attempt("pictures", cards.read, [])
        mosaic = run.files.attempt("pictures", lambda _, left=left: cards.mosaic(left))
        if mosaic:
            made.append(f'<figure class="card"><figcaption><b style="color:{run.colour}">{escape(run.name)}</b>'
                        f"</figcaption>{mosaic}</figure>")
    return f'<div class="cards small">{"".join(made)}</div>' if made else ""


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: leaf} of a config."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {key: leaf for name, part in tree.items()
            for key, leaf in flat(part, f"{prefix}.{name}" if prefix else name).items()}


def config_table(runs: list[Compared]) -> str:
    """The keys whose values are not the same in all runs."""
    trees = [flat(run.files.json(CONFIG)) for run in runs]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    rows = []
    for key in keys:
        values = [json.dumps(tree[key]) if key in tree else None for tree in trees]
        if len(set(values)) > 1:
            rows.append([f"<code>{escape(key)}</code>",
                         *(ABSENT if x is None else f"<code>{escape(x)}</code>" for x in values)])
    if not rows:
        return '<p class="lead">Their configurations are the same.</p>'
    return page.table(["key", *head(runs)], rows, range(1, len(runs) + 1), css="compared")
