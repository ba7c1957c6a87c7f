"""A metric over compute as the paper's figure 5 has it: runs as points, a line per recipe with its interval,
floors, and the way from the baseline's largest run to where the candidate's line is as good.
"""

import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tfusion.paths import replace_by
from tfusion.reporting import plots

COLOURS = {"transfusion": plots.IMAGE, "chameleon": plots.TEXT}
ACROSS, CELL = 3, (4.0, 3.1)  # of a sheet: panels side by side, inches of each
RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def colour(recipe: str) -> str:
    others = [shade for shade in plots.RUNS if shade not in COLOURS.values()]
    return COLOURS.get(recipe) or others[sum(map(ord, recipe)) % len(others)]


def power(x: float, _=None) -> str:
    """2e13 as '2·10¹³', 1e13 as '10¹³'."""
    exponent = math.floor(math.log10(x) + 1e-9)
    mantissa = round(x / 10**exponent, 2)
    raised = f"10{str(exponent).translate(RAISED)}"
    return raised if mantissa == 1 else f"{mantissa:g}·{raised}"


def panel(ax: Axes, found, axis: str, unit: str) -> None:
    """found: scaling/study.py's Panel."""
    runs = {recipe: sorted((getattr(run, axis), value) for run, value in some)
            for recipe, some in found.values.items()}
    every = [x for some in runs.values() for x, _ in some]
    low, high = min(every), max(every)
    if (matched := matched_at(found.ratios[axis])) and low / 10 < matched < high * 10:
        low, high = min(low, matched), max(high, matched)
    xs, shown = np.geomspace(low / 1.15, high * 1.15, 40), []
    for recipe, some in runs.items():
        tone, fit = colour(recipe), found.fits[axis][recipe]
        ax.plot(*zip(*some, strict=True), linestyle="none", marker="o", markersize=4.4, color=tone,
                markerfacecolor="white", markeredgewidth=1.3, label=recipe, zorder=3)
        shown += [value for _, value in some]
        if not isinstance(fit, str):
            ax.plot(xs, np.exp(fit.line.log_y(xs)), color=tone, linewidth=1.3)
            if fit.has_interval:
                ax.fill_between(xs, *np.exp(fit.band(xs)), color=tone, alpha=0.13, linewidth=0)
    levels = {label: level for label, level in found.floors.items() if near(level, shown)}
    for label, level in levels.items():
        ax.axhline(level, color=plots.GREY, linewidth=0.9, linestyle=(0, (3, 2)))
        ax.annotate(label, (low / 1.15, level), xytext=(0, 2), textcoords="offset points", fontsize=7.5,
                    color=plots.GREY)
    shown += levels.values()
    parity_arrow(ax, found.ratios[axis])
    plots.log_axis(ax, [np.array(shown)])
    ax.set_ylim(min(shown) / margin(shown), max(shown) * margin(shown))
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 1000 else (1.0, 3.0)))
    ax.tick_params(which="minor", length=0)
    ax.xaxis.set_major_formatter(FuncFormatter(power))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(unit)
    plots.legend(ax, 3)


def near(level: float, values: list[float]) -> bool:
    """Whether a floor is worth the room that it takes: within a factor of thirty of what is measured."""
    return min(values) / 30 < level < max(values) * 30


def margin(values: list[float]) -> float:
    return max(1.02, (max(values) / min(values)) ** 0.08)


def matched_at(ratio) -> float | None:
    """The compute at which the candidate's line is as good as the baseline's largest run."""
    return None if isinstance(ratio, str) or not math.isfinite(ratio.value) else ratio.x * ratio.value


def parity_arrow(ax: Axes, ratio) -> None:
    """From the baseline's largest run to the candidate's line, where that is not far outside the picture."""
    if not (x := matched_at(ratio)) or not 0.02 < ratio.value < 50:
        return
    y = math.exp(ratio.fit.line.log_y(x))
    ax.annotate("", (x, y), (ratio.x, y), arrowprops={
        "arrowstyle": "->", "color": plots.INK, "linewidth": 1.0, "shrinkA": 0, "shrinkB": 0})
    ax.annotate(f"× {ratio.value:.2f}", (math.sqrt(x * ratio.x), y), xytext=(0, 4), ha="center",
                textcoords="offset points", color=plots.INK, fontsize=8.5)


def svg(found, axis: str, unit: str) -> str:
    return plots.svg(f"{found.metric.title} over {unit}", lambda ax: panel(ax, found, axis, unit), CELL)


def sheet(path: Path, panels: list, axis: str, unit: str, title: str = "") -> None:
    """All panels in one PNG, fit for a README."""
    rows = -(-len(panels) // ACROSS)
    columns = min(ACROSS, len(panels))
    with matplotlib.rc_context({**plots.RC, "figure.facecolor": "white"}):
        figure = Figure(figsize=(CELL[0] * columns, CELL[1] * rows + 0.3 * bool(title)), layout="constrained")
        cells = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax, found in zip(cells, panels, strict=False):
            panel(ax, found, axis, unit)
            ax.set_title(found.metric.title, loc="left", pad=22, color=plots.INK, weight="bold")
        for ax in cells[len(panels):]:
            ax.set_visible(False)
        if title:
            figure.suptitle(title, color=plots.INK, fontsize=11)
        replace_by(path, lambda file: figure.savefig(file, format="png", dpi=150, metadata={"Software": None}))
