"""Figures as they stand in metrics.json: the verdict, the table of all, one in a cell, and over the steps."""

from html import escape
from typing import Any

from tfusion.reporting import page, pictures, plots
from tfusion.reporting.records import FIGURES, Missing, RunFiles, series_of

NAMED = 3  # figures below what was wanted that are named; of more, the number
INTERVALS = ("Intervals are over the prompts of one run, Wilson's where the figure is a fraction: what another "
             "seed of training would change is not in them.")
Figure = dict[str, Any]  # evals/figure.py
WITHIN = "within"  # short of what was wanted, which its interval holds: more prompts would tell
MARKS = {None: "", True: '<span class="good">✓</span>', False: '<span class="bad">✗</span>',
         WITHIN: '<span class="faint" title="short of it, and within the interval">≈</span>'}


def verdict(figure: Figure) -> bool | str | None:
    """Whether a figure is as good as wanted, or WITHIN; None when nothing is asked of it."""
    if figure["want"] is None:
        return None
    if figure["value"] is None:  # nothing to measure it on
        return False
    sign = 1 if figure["better"] == "higher" else -1
    best = figure["high" if sign > 0 else "low"]
    if sign * figure["value"] >= sign * figure["want"]:
        return True
    return WITHIN if best is not None and sign * best >= sign * figure["want"] else False


def verdict_html(found: dict[str, Figure]) -> str:
    """One line on all that was wanted; nothing where nothing was."""
    verdicts = [verdict(figure) for figure in found.values() if verdict(figure) is not None]
    if not verdicts:
        return ""
    short = [figure["title"] for figure in found.values() if verdict(figure) is False]
    within = verdicts.count(WITHIN)
    if short:
        more = f" and {len(short) - NAMED} more" if len(short) > NAMED else ""
        close = f"; {within} within the interval (≈)" if within else ""
        words = f"{len(short)} of {len(verdicts)}, {', '.join(short[:NAMED])}{more}{close}"
        return f'<span class="verdict short">Below what was wanted: {escape(words)}</span>'
    words = (f"{len(verdicts) - within} of {len(verdicts)} figures, and {within} within the interval (≈)"
             if within else f"all {len(verdicts)} figures")
    return f'<span class="verdict">✓ As good as wanted: {words}</span>'


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
    at, last = run.json(FIGURES).get("step"), max((row["step"] for row in run.log()), default=0)
    old = (f'<p class="lead bad">Measured at step {at:,}; the run has gone on to step {last:,}.</p>'
           if at and at < last else "")
    return (f'{old}<div class="scroll"><table class="figures"><thead>{head}</thead><tbody>'
            f'{"".join(map(row, found.values()))}</tbody></table></div><p class="key">Dot: value, on its 95 % '
            "interval. Dashed mark: chance. Solid mark: wanted. Fractions are drawn from 0 to 1, others from 0 "
            "where there is such a mark. ✗: short of what was wanted; ≈: short of it, and within the interval. "
            f"{INTERVALS}</p>")


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
