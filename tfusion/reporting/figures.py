"""Figures as they stand in metrics.json: the verdict, the table of all, one in a cell, and over the steps."""

from html import escape
from typing import Any

from tfusion.reporting import page, pictures, plots
from tfusion.reporting.records import Missing, RunFiles, series_of

Figure = dict[str, Any]  # evals/figure.py
MARKS = {None: "", True: '<span class="good">✓</span>', False: '<span class="bad">✗</span>'}


def verdict(figure: Figure) -> bool | None:
    """Whether a figure is as good as wanted; None when nothing is asked of it."""
    if figure["want"] is None:
        return None
    if figure["value"] is None:  # nothing to measure it on
        return False
    if figure["better"] == "higher":
        return figure["value"] >= figure["want"]
    return figure["value"] <= figure["want"]


def verdict_html(found: dict[str, Figure]) -> str:
    """One line on all that was wanted; nothing where nothing was."""
    verdicts = [verdict(figure) for figure in found.values() if verdict(figure) is not None]
    short = [figure["title"] for figure in found.values() if verdict(figure) is False]
    if short:
        words = f"Below what was wanted: {len(short)} of {len(verdicts)}, {', '.join(short)}"
        return f'<span class="verdict short">{escape(words)}</span>'
    return f'<span class="verdict">✓ As good as wanted: all {len(verdicts)} figures</span>' if verdicts else ""


def interval(figure: Figure) -> list[str]:
    low, high = figure["low"], figure["high"]
    return [f"{page.number(low)} to {page.number(high)}"] if low is not None else []


def cell(figure: Figure) -> str:
    """A value on its interval, with a mark where something was wanted of it."""
    below = interval(figure)
    below += [f"chance {page.number(figure['chance'])}"] if figure["chance"] is not None else []
    mark = MARKS[verdict(figure)]
    return f"{page.number(figure['value'])}{' ' * bool(mark)}{mark}<small>{' · '.join(below)}</small>"


def whole(found: dict[str, Figure]) -> dict[str, Figure]:
    """Without those of parts of the data."""
    return {name: figure for name, figure in found.items() if "/" not in name}


def row(figure: Figure) -> str:
    met, want = verdict(figure), figure["want"]
    below = interval(figure) + ([f"n = {figure['n']:,}"] if figure["n"] is not None else [])
    mark = MARKS[met] or '<span class="faint">·</span>'
    sign = "≥" if figure["better"] == "higher" else "≤"
    chance = "" if figure["chance"] is None else f"chance {page.number(figure['chance'])}, "
    before = chance + ("wanted " if want is not None else "wanted: ")
    points = (figure[key] for key in ("value", "low", "high", "chance", "want"))
    drawn = pictures.scale(*points, met is not False)
    return (f'<tr><td>{escape(figure["title"])}</td><td class="value">'
            f"{page.number(figure['value'])}<small>{' · '.join(below)}</small></td>"
            f'<td class="drawn">{drawn}</td><td class="num chance">{page.number(figure["chance"])}</td>'
            f'<td class="num want" data-before="{before}">'
            f'{"–" if want is None else f"{sign} {page.number(want)}"}</td><td class="mark">{mark}</td></tr>')


def table(run: RunFiles) -> str:
    """Every figure with its interval, chance level, wanted value and a tick or a cross."""
    found = whole(run.figures())
    if not found:
        raise Missing(f"{run.root} was evaluated, and nothing could be measured")
    head = ('<tr><th>measured on held-out data</th><th>value, 95 % interval</th><th></th>'
            '<th class="num">chance</th><th class="num">wanted</th><th></th></tr>')
    return (f'<div class="scroll"><table class="figures"><thead>{head}</thead><tbody>'
            f'{"".join(map(row, found.values()))}</tbody></table></div><p class="key">Dot: value, on its 95 % '
            "interval. Dashed mark: chance. Solid mark: wanted. Fractions are drawn from 0 to 1. Intervals are "
            "Wilson's over the prompts of this one run: what another seed of training would change is "
            "not in them.</p>")


def over_steps(run: RunFiles) -> str:
    """A small chart for each figure that several checkpoints were evaluated for."""
    by_step = run.evaluated_steps()
    names = dict.fromkeys(name for found in by_step.values() for name in whole(found))
    made = []
    for name in names:
        points = {step: found[name] for step, found in by_step.items()
                  if name in found and found[name]["value"] is not None}
        if len(points) < 2:
            continue
        last, series = list(points.values())[-1], series_of(points, [x["value"] for x in points.values()])
        ends = [(step, x["low"], x["high"]) for step, x in points.items() if x["low"] is not None]
        drawn = plots.figure_over_steps(last["title"], series, ends, last["chance"], last["want"])
        made.append(page.card(last["title"], "", drawn))
    if not made:
        return ""
    return (f'<p class="lead">{len(by_step)} checkpoints, each evaluated alike. Band: 95 % interval; dashed: '
            f'chance; solid: wanted.</p><div class="cards small">{"".join(made)}</div>')
