"""The report of a scaling study: one HTML page, its tables as CSV, its figure as PNG. Fits and ratios are made
by scaling/study.py; here they are shown, whatever they say.
"""

import csv
import io
import math
import statistics
from html import escape
from pathlib import Path

from tfusion.paths import replace_text
from tfusion.reporting import page, scaling_plots

ABSENT = '<span class="faint">–</span>'
PAGE = "index.html"
BOTH = ("parity", "data")  # sections on two recipes
SAME = 0.005  # drops of two recipes may differ by so much


def write(study, out: Path, about: dict[str, str]) -> list[Path]:
    """Writes index.html, points.csv, fits.csv and a PNG for each axis to the folder `out`; returns them.

    study: scaling/study.py's. about: how it was made, {name: value}, such as the command and the commit.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = [out / name for name in (PAGE, "points.csv", "fits.csv")]
    page.write(files[0], f"{study.name} – scaling study", body(study, about))
    for path, rows in zip(files[1:], (points_rows(study), fits_rows(study)), strict=True):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        replace_text(path, text.getvalue())
    drawn = [found for found in study.panels if found.values]
    for axis, unit in study.axes.items() if drawn else ():
        files.append(out / f"figure_{axis}.png")
        scaling_plots.sheet(files[-1], drawn, axis, unit)
    return files


def body(study, about: dict[str, str]) -> str:
    """Without what sets two recipes side by side where there is one, as in a sweep of learning rates."""
    made = [("parity", "How much compute for the same quality", parity(study)),
            ("figure", "Every metric over compute", figure(study)), ("fits", "The lines", fits(study)),
            ("learning-rate", "Learning rates", varied(study, "lr", "learning_rate")),
            ("process", "What the diffusion predicts", varied(study, "process", "process")),
            ("size-and-budget", "Size and budget apart", surfaces(study)),
            ("tables", "The paper's tables, with ours", tables(study)),
            ("runs", "The runs", runs(study)), ("data", "The same data for both", drops(study)),
            ("missing", "What is missing", missing(study)), ("how", "How this was made", how(about))]
    made = [section for section in made if section[2] and (study.compared or section[0] not in BOTH)]
    return header(study) + page.navigation([name for name, *_ in made]) + "".join(
        page.section(*section) for section in made)


def header(study) -> str:
    ladder = study.ladder()
    compute = [run.six_nd for run in ladder]
    facts = page.facts([
        ("runs planned", str(study.planned)), ("finished", str(len(study.runs))),
        ("in the ladder", str(len(ladder))), ("seeds", str(len({run.seed for run in ladder}))),
        ("span of 6ND", f"{max(compute) / min(compute):.0f}×" if compute else "–"),
        ("all training", f"{page.count(sum(run.flops for run in study.runs))} FLOP")])
    lead = ("Two ways to train one transformer on text and images, in the same trainer, at the same sizes and "
            "on the same documents." if study.compared else "Runs of one sweep.")
    return (f'<header class="compared"><p class="kicker">tfusion scaling study</p><h1>{escape(study.name)}</h1>'
            f'<p class="lead">{lead} What is measured is held out.</p></header>{facts}')


def value(number: float | None) -> str:
    return ABSENT if number is None else page.number(number)


def mean_of(metric, some: list) -> float | None:
    """The mean over runs of what the metric shows."""
    found = [metric.shown(run.figures[metric.name]) for run in some if metric.name in run.figures]
    found = [x for x in found if x is not None]
    return statistics.mean(found) if found else None


def ratio_cell(ratio) -> str:
    """A ratio on its interval; why there is none."""
    if isinstance(ratio, str):
        return f'{ABSENT}<small>{escape(ratio)}</small>'
    if not math.isfinite(ratio.value):
        return f"{ABSENT}<small>its line does not improve with compute</small>"
    high = page.number(ratio.high) if math.isfinite(ratio.high) else "∞"
    notes = "too few sizes for an interval" if math.isnan(ratio.low) else f"{page.number(ratio.low)} to {high}"
    notes += " · beyond its runs" if ratio.beyond else ""
    return f"{page.number(ratio.value)}<small>{notes}</small>"


def parity(study) -> str:
    """Table 3 with our numbers, and the paper's below."""
    candidate, baseline = study.recipes
    head = ["held out", *(f"{recipe}, {study.largest_size(recipe)}" for recipe in study.recipes),
            *(f"parity ratio, {unit}" for unit in study.axes.values())]
    rows = [[f"{escape(found.metric.title)} {'↓' if found.metric.better == 'lower' else '↑'}",
             *(value(mean_of(found.metric, study.largest(recipe))) for recipe in study.recipes),
             *(ratio_cell(found.ratios[axis]) for axis in study.axes)] for found in study.panels]
    measured = {found.metric.name.removesuffix("_lm_loss") for found in study.panels}
    absent = [title for name, (title, *_) in study.paper.items() if name not in measured]
    theirs = page.table(["Table 3, at 7B", candidate, baseline, "parity ratio, 6ND"],
                        [[title, *map(page.number, numbers)] for title, *numbers in study.paper.values()],
                        range(1, 4))
    if absent:
        theirs += f'<p class="key">Not measured here: {escape(", ".join(absent))}.</p>'
    lead = (f"The share of the {baseline}'s compute with which {candidate} is as good as its largest run: the "
            f"{candidate}'s fitted line, read at the value that was measured. Below 1 {candidate} is cheaper.")
    key = ("Below a ratio its 95 % interval, by a bootstrap over sizes and seeds; ∞ where many of the redrawn "
           "lines never get there. Beyond its runs: the line is read where none was trained. Values of the "
           "largest runs are means over their seeds.")
    table = page.table(head, rows, range(1, len(head)), css="compared")
    return (f'<p class="lead">{escape(lead)}</p>{table}<p class="key">{key}</p><h3>What the paper reports</h3>'
            '<p class="lead">Its sizes, data and metrics are others: compare the ratios, not the values.</p>'
            f"{theirs}")


def figure(study) -> str:
    """A card per metric, with a plot on each axis."""
    if not study.ladder():
        return ""
    cards = []
    for found in study.panels:
        better = "lower is better" if found.metric.better == "lower" else "higher is better"
        words = f"{better}; both axes logarithmic. " + " ".join(
            f"{name} is left out: {why}." for name, why in found.dropped)
        plotted = "".join(scaling_plots.svg(found, axis, unit) for axis, unit in study.axes.items()
                          ) if found.values else "<p>No run has a value that can be drawn.</p>"
        cards.append(page.card(found.metric.title, words[0].upper() + words[1:], plotted))
    rule = "the paper's (FID > 100, CLIP < 17, CIDEr < 4)" if study.outliers == "paper" else "none"
    return ('<p class="lead">Each circle is a run; where a size has several seeds, each of them. Lines: least '
            f"squares on logarithms; bands: 95 % intervals. Outliers left out: {rule}.</p>"
            f'<div class="cards">{"".join(cards)}</div>')


def fits(study) -> str:
    made = [fit for found in study.panels for some in found.fits.values() for fit in some.values()]
    if all(isinstance(fit, str) for fit in made):
        return f'<p class="lead">None: {escape("; ".join(dict.fromkeys(made)))}.</p>' if made else ""
    rows = []
    for row in fits_rows(study)[1:]:
        title, axis, recipe, runs_, slope, low, high = row[:7]
        interval = "" if low == "" else f"<small>{low:+.3f} to {high:+.3f}</small>"
        cell = f"{slope:+.3f}{interval}" if slope != "" else f"{ABSENT}<small>{escape(row[-1])}</small>"
        rows.append([escape(title), escape(recipe), study.axes[axis], str(runs_), cell])
    return ('<p class="lead">Exponents b of metric = a · compute<sup>b</sup>, with 95 % intervals where there '
            'are four sizes or more.</p>'
            + page.table(["metric", "recipe", "compute", "runs", "exponent"], rows, (3, 4)))


def varied(study, part: str, what: str) -> str:
    """Runs of one size that differ in one attribute, beside the ladder's of that recipe and size."""
    # Of other processes the diffusion loss is of another target: not to be compared.
    metrics = [found.metric for found in study.panels
               if (part, found.metric.name) != ("process", "diffusion_loss")]
    groups = dict.fromkeys((run.recipe, run.size) for run in study.runs if run.part == part)
    if not groups:
        return ""
    head = ["recipe", "size", what.replace("_", " "), "runs", *(metric.title for metric in metrics)]
    chosen = [run for run in study.runs if run.part in (part, "ladder")]
    rows = [row for group in groups for row in settings_of(
        [run for run in chosen if (run.recipe, run.size) == group], what, metrics)]
    return ('<p class="lead">One thing varied, all else as in the ladder, whose own runs of the size stand '
            f"beside. Bold: the best of a size.</p>{page.table(head, rows, range(3, len(head)))}")


def settings_of(some: list, what: str, metrics: list) -> list[list[str]]:
    """A row for each setting of runs of one size, the best of each metric in bold."""
    by: dict = {}
    for run in sorted(some, key=lambda run: getattr(run, what)):
        by.setdefault(getattr(run, what), []).append(run)
    means = [[mean_of(metric, runs_) for metric in metrics] for runs_ in by.values()]
    best = [best_of(metric, column) for metric, column in zip(metrics, zip(*means, strict=True), strict=True)]
    rows = []
    for (setting, alike), values in zip(by.items(), means, strict=True):
        cells = [f"<b>{value(x)}</b>" if x is not None and x == top else value(x)
                 for x, top in zip(values, best, strict=True)]
        name = f"{setting:g}" if isinstance(setting, float) else escape(str(setting))
        name += " (ladder)" if any(run.part == "ladder" for run in alike) else ""
        rows.append([escape(alike[0].recipe), escape(alike[0].size), name, str(len(alike)), *cells])
    return rows


def best_of(metric, values: list) -> float | None:
    known = [x for x in values if x is not None]
    return (min if metric.better == "lower" else max)(known) if known else None


def surfaces(study) -> str:
    if not study.compared and all(isinstance(found, str) for found in study.surfaces.values()):
        return ""
    rows = []
    for recipe, found in study.surfaces.items():
        cells = [ABSENT] * 3 if isinstance(found, str) else [
            page.number(found.floor), page.number(found.alpha), page.number(found.beta)]
        rows.append([escape(recipe), *cells, escape(found) if isinstance(found, str) else ""])
    table = page.table(["recipe", "E", "α", "β", ""], rows, (1, 2, 3))
    return ('<p class="lead">L(N, D) = E + A / N<sup>α</sup> + B / D<sup>β</sup>, of the mean held-out loss, '
            f"where sizes and budgets vary apart.</p>{table}")


def tables(study) -> str:
    """Tables 4 to 7 of the paper, as far as runs are rows of them, with our figures beside."""
    made = []
    for table in study.tables:
        head = ["", *(f"{title}, paper" for title in table.columns),
                *(f"{metric.title}, ours" for metric in table.metrics)]
        rows = [[escape(row), *map(value, theirs), *(value(mean_of(metric, ours)) for metric in table.metrics)]
                for row, theirs, ours in table.rows]
        made.append(f"<h3>{escape(table.title)}</h3>{page.table(head, rows, range(1, len(head)))}")
    lead = "The paper's runs have 0.5T tokens and other data: compare how rows differ, not the values."
    return f'<p class="lead">{lead}</p>{"".join(made)}' if made else ""


def runs(study) -> str:
    """Every finished run: its size, its budget on both axes, what it was shown."""
    head = ["run", "N", "tokens", "6ND", "exact FLOP", "images", "seed", "rate",
            *(found.metric.title for found in study.panels)]
    rows = [[f"<code>{escape(run.name)}</code>", page.count(run.params), page.count(run.tokens),
             scaling_plots.power(run.six_nd), scaling_plots.power(run.flops), page.count(run.images),
             str(run.seed), f"{run.learning_rate:g}",
             *(value(mean_of(found.metric, [run])) for found in study.panels)] for run in study.runs]
    return page.table(head, rows, range(1, len(head)))


def drops(study) -> str:
    """Of each source, the share of documents that no row of a recipe held, mean over the ladder."""
    ladder = study.ladder()
    sources = dict.fromkeys(source for run in ladder for source in run.drops)
    recipes = dict.fromkeys(run.recipe for run in ladder)
    rows, worst = [], 0.0
    for source in sources:
        means = [statistics.mean(some) if (some := [
            run.drops[source] for run in ladder if run.recipe == recipe and source in run.drops]) else None
            for recipe in recipes]
        known = [x for x in means if x is not None]
        worst = max(worst, max(known) - min(known))
        rows.append([escape(source), *(ABSENT if x is None else f"{100 * x:.2f} %" for x in means)])
    if not rows:
        return ""
    verdict = ("They differ by no more than half a percent." if worst <= SAME else
               f"They differ by up to {100 * worst:.2f} %: more than half a percent.")
    unknown = [escape(run.name) for run in study.runs if not run.same.get("tokenizer")]
    told = "" if not unknown else (
        f'<p class="key">Nothing says what data {len(unknown)} runs were trained on: '
        f'{", ".join(unknown[:3])}{" ..." * (len(unknown) > 3)}.</p>')
    return ('<p class="lead">Documents that found no room in the rows of a window or of the next, by source. '
            f"{verdict}</p>{page.table(['source', *recipes], rows, range(1, len(recipes) + 1))}{told}")


def missing(study) -> str:
    if not study.missing:
        return ""
    items = "".join(f"<li>{escape(name)}<small>{escape(why)}</small></li>"
                    for name, why in study.missing.items())
    return f'<p class="lead">Not in the fits.</p><ul class="note">{items}</ul>'


def how(about: dict[str, str]) -> str:
    return page.facts([], [(escape(name), f"<code>{escape(text)}</code>") for name, text in about.items()])


def points_rows(study) -> list[list]:
    metrics = [found.metric for found in study.panels]
    head = ["name", "recipe", "size", "part", "seed", "learning_rate", "process", "params", "tokens", "six_nd",
            "flops", "images", *(metric.name for metric in metrics)]
    return [head] + [
        [*(getattr(run, name) for name in head[:12]),
         *(run.figures.get(metric.name, {}).get("value") for metric in metrics)] for run in study.runs]


def fits_rows(study) -> list[list]:
    """A row for each metric, axis and recipe; the parity ratio on the candidate's."""
    rows = [["metric", "axis", "recipe", "runs", "exponent", "low", "high", "parity", "parity_low",
             "parity_high", "beyond", "note"]]
    for found in study.panels:
        for axis in study.axes:
            for recipe, fit in found.fits[axis].items():
                ratio = found.ratios[axis] if recipe == study.recipes[0] else ""
                of = ["", "", "", ""] if isinstance(ratio, str) else [
                    ratio.value, *("" if math.isnan(x) else x for x in (ratio.low, ratio.high)), ratio.beyond]
                line = ["", "", ""] if isinstance(fit, str) else [
                    fit.line.slope, *(fit.slope_interval if fit.has_interval else ("", ""))]
                note = fit if isinstance(fit, str) else ratio if isinstance(ratio, str) else ""
                rows.append([found.metric.title, axis, recipe, len(found.values[recipe]), *line, *of, note])
    return rows
