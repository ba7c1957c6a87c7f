"""Curves and bars as inline SVG: matplotlib draws, the page's own fonts letter them."""

import io
import itertools
import re
from collections.abc import Callable, Sequence
from html import escape

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from tfusion.reporting.records import Series, smooth, thin

TEXT, TEXT_LIGHT = "#3d5a80", "#b9c7d8"
IMAGE, IMAGE_LIGHT = "#c4703c", "#ecc9b2"
INK, GREY, LIGHT_GREY = "#22303c", "#8f9ba4", "#cfd5d9"
# From nearly clean (light) to pure noise (dark).
NOISE = ("#e3b04b", "#d58a4a", "#b8615a", "#83486b", "#443a63")
RUNS = ("#3d5a80", "#c4703c", "#4f8a5b", "#7f5c9c", "#b04a35", "#3f8f84", "#c79a2a", "#61707c")  # compared

RC = {
    "font.size": 9,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.edgecolor": "#c9cfd3",
    "axes.linewidth": 0.8,
    "axes.labelcolor": "#61707c",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#ecebe6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#61707c",
    "ytick.color": "#61707c",
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.major.width": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "axes.titlesize": 9,
}


def svg(name: str, draw: Callable[[Axes], None], size: tuple[float, float] = (5.2, 2.9)) -> str:
    """What `draw` puts on one pair of axes, as an <svg> element; `name` keeps its ids apart from
    those of the other plots on the page."""
    with matplotlib.rc_context({**RC, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(
            buffer,
            format="svg",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(
        r' (id)="(?:figure|axes|patch|line2d|text|matplotlib|[xy]tick|\w*Collection|'
        r'legend)[^"]*"',
        "",
        text,
    )
    head, tail = text.split(">", 1)
    head = re.sub(r' (width|height|version)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{escape(name)}">{tail}'


def _step_axis(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.set_xlabel("step")
    ax.set_xlim(0, ax.dataLim.x1 * 1.01)


def log_axis(ax: Axes, values: Sequence[np.ndarray]) -> None:
    """Logarithmic y with plain numbers, and enough of them when the curves span little."""
    joined = np.concatenate([v[v > 0] for v in values])
    if not len(joined):
        return
    ax.set_yscale("log")
    decades = np.log10(joined.max() / joined.min())
    subs = (1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 0.8 else range(1, 10)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=9))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def legend(ax: Axes, columns: int) -> None:
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=columns,
        borderpad=0.2,
        handlelength=1.3,
        columnspacing=1.4,
        borderaxespad=0.1,
    )


def loss(
    name: str,
    train: Series,
    held_out: Series | None,
    by_source: dict[str, Series],
    colours: tuple[str, str],
) -> str:
    """Training loss (light, and its running mean) and held-out loss (dots; dotted lines for single
    sources) over steps. The axis leaves out the first moments, which would flatten the rest."""

    def draw(ax: Axes) -> None:
        mean = smooth(train)
        ax.plot(*thin(train), color=colours[1], linewidth=0.9, label="training, single steps")
        ax.plot(*mean, color=colours[0], label="training, running mean")
        shown = [mean.values]
        if held_out is not None:
            ax.plot(
                *held_out,
                color=INK,
                linewidth=0.9,
                linestyle=(0, (3, 2)),
                marker="o",
                markersize=3.6,
                label="held out",
            )
            shown.append(held_out.values)
        for i, (source, series) in enumerate(by_source.items(), start=1):
            ax.plot(*series, color=GREY, linewidth=0.9, linestyle=":")
            ax.annotate(
                source,
                (series.steps[-i], series.values[-i]) if i <= len(series.steps) else (0, series.values[0]),
                xytext=(0, 3),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color=GREY,
            )
            shown.append(series.values)
        _settled(ax, [*shown, np.full(2, train.values.min())])
        _step_axis(ax)
        legend(ax, 3)

    return svg(name, draw)


def noise_bins(name: str, curves: dict[int, Series], held_out: dict[int, Series]) -> str:
    """A loss by bins of t in (0, 1]: running mean in training, held-out values as dots."""
    number = max(curves) + 1
    shades = [NOISE[k * len(NOISE) // number] for k in range(number)]

    def draw(ax: Axes) -> None:
        for k, curve in sorted(curves.items()):
            ax.plot(*smooth(curve), color=shades[k], label=f"{k / number:.1f}–{(k + 1) / number:.1f}")
        for k, curve in held_out.items():
            if k in curves:
                ax.plot(*curve, color=shades[k], linestyle="none", marker="o", markersize=3.4,
                        markeredgecolor="white", markeredgewidth=0.5)
        log_axis(ax, [smooth(c).values for c in curves.values()])
        _step_axis(ax)
        legend(ax, min(number, 6))

    return svg(name, draw)


def curves(
    name: str,
    lines: Sequence[tuple[str, Series, str]],
    log: bool = False,
    raw: bool = True,
    unit: str = "",
) -> str:
    """Curves over steps, each (label, series, colour); `raw` leaves them unsmoothed."""

    def draw(ax: Axes) -> None:
        drawn = [thin(series) if raw else smooth(series) for _, series, _ in lines]
        for (label, _, colour), series in zip(lines, drawn, strict=True):
            ax.plot(*series, color=colour, label=label)
        if log:
            log_axis(ax, [series.values for series in drawn])
        else:
            ax.set_ylim(bottom=0)
            if max(series.values.max() for series in drawn) >= 1000:
                ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
        _step_axis(ax)
        if unit:
            ax.set_ylabel(unit)
        if len(lines) > 1:
            legend(ax, 4)

    return svg(name, draw)


def dots(name: str, series: Series, colour: str, unit: str) -> str:
    """A few measurements over steps, joined; the axis fits the values."""

    def draw(ax: Axes) -> None:
        ax.plot(*series, color=colour, marker="o", markersize=3.6)
        ax.annotate(
            f"{series.values[-1]:.1f}",
            (series.steps[-1], series.values[-1]),
            xytext=(-2, 7),
            textcoords="offset points",
            ha="right",
            color=INK,
        )
        ax.margins(y=0.15)
        ax.set_ylabel(unit)
        _step_axis(ax)

    return svg(name, draw)


Groups = Sequence[tuple[str, Sequence[float]]]  # each a name and a value for each bar


def standing_bars(name: str, names: Sequence[str], groups: Groups, tone: str) -> str:
    """Groups of bars side by side, the last of each in `tone`, its value above it."""

    def draw(ax: Axes) -> None:
        place, width = np.arange(len(groups)), 0.8 / len(names)
        greys = [LIGHT_GREY, GREY] * len(names)
        for i, label in enumerate(names):
            left = place + (i - (len(names) - 1) / 2) * width
            values = [values[i] for _, values in groups]
            colour = tone if i == len(names) - 1 else greys[i]
            ax.bar(left, values, 0.9 * width, color=colour, label=label)
            for x, value in zip(left, values, strict=True):
                ax.annotate(f"{value:.2f}", (x, value), xytext=(0, 3), textcoords="offset points", ha="center",
                            fontsize=8, color=INK)
        ax.set_xticks(place, [label for label, _ in groups])
        ax.margins(y=0.1)
        legend(ax, len(names))

    return svg(name, draw)


def lying_bars(name: str, names: Sequence[str], groups: Groups, tone: str) -> str:
    """Horizontal bars group by group, the last of each in `tone`, the value at the end."""
    rows = [(group, *bar) for group, values in groups for bar in zip(names, values, strict=True)]
    gaps = np.cumsum([0.0] + [1.6 if a[0] != b[0] else 1.0 for a, b in itertools.pairwise(rows)])

    def draw(ax: Axes) -> None:
        last = [label == names[-1] for _, label, _ in rows]
        ax.barh(gaps, [value for *_, value in rows], 0.74, color=[tone if x else LIGHT_GREY for x in last])
        for y, (*_, value), bold in zip(gaps, rows, last, strict=True):
            ax.annotate(f"{value:.2f}", (value, y), xytext=(4, 0), textcoords="offset points", va="center",
                        color=INK, weight="bold" if bold else "normal")
        ax.set_yticks(gaps, [f"{group}, {label}" for group, label, _ in rows])
        ax.set_xlim(0, max(value for *_, value in rows) * 1.12)
        ax.invert_yaxis()
        ax.grid(visible=False)
        ax.spines["bottom"].set_visible(False)
        ax.set_xticks([])

    return svg(name, draw)


def histogram(name: str, values: np.ndarray, colour: str) -> str:
    """How often whole numbers come, in up to 40 bins."""
    step = max(1, -(-(int(values.max()) - int(values.min()) + 1) // 40))
    edges = np.arange(values.min(), values.max() + step + 1, step) - 0.5

    def draw(ax: Axes) -> None:
        ax.hist(values, edges, color=colour, rwidth=0.9)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        ax.yaxis.set_major_formatter(EngFormatter(sep=""))

    return svg(name, draw, (4.2, 1.8))


def figure_over_steps(name: str, series: Series, ends: Sequence[tuple[float, float, float]],
                      chance: float | None, want: float | None) -> str:
    """A figure at the checkpoints that were evaluated; ends: (step, low, high) of its intervals."""

    def draw(ax: Axes) -> None:
        ax.plot(*series, color=TEXT, marker="o", markersize=3.6)
        if ends:
            ax.fill_between(*zip(*ends, strict=True), color=TEXT, alpha=0.15, linewidth=0)
        for level, style in ((chance, (0, (3, 2))), (want, "-")):
            if level is not None:
                ax.axhline(level, color=GREY if level == chance else INK, linewidth=0.9, linestyle=style)
        ax.annotate(f"{series.values[-1]:.3g}", (series.steps[-1], series.values[-1]), xytext=(-2, 7),
                    textcoords="offset points", ha="right", color=INK)
        ax.margins(y=0.18)
        _step_axis(ax)

    return svg(name, draw, (3.6, 2.1))


def compared(name: str, lines: Sequence[tuple[str, Series, Series | None, str]], unit: str) -> str:
    """A loss of several runs, each (label, running mean in training, held out or None, colour), over any axis.
    The axis leaves out the first moments, which would flatten the rest."""

    def draw(ax: Axes) -> None:
        shown = []
        for label, train, held_out, colour in lines:
            ax.plot(*train, color=colour, linewidth=1.0, alpha=0.55 if held_out else 1.0,
                    label=None if held_out else label)
            shown.append(train.values)
            if held_out is not None:
                ax.plot(*held_out, color=colour, marker="o", markersize=3.4, label=label)
                shown.append(held_out.values)
        _settled(ax, shown)
        ax.set_xlim(0, ax.dataLim.x1 * 1.01)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        if ax.dataLim.x1 >= 1000:  # counts; minutes are few
            ax.xaxis.set_major_formatter(EngFormatter())
        ax.set_xlabel(unit)
        legend(ax, 3)

    return svg(name, draw)


def _settled(ax: Axes, shown: Sequence[np.ndarray]) -> None:
    """Limits of y that fit the curves but for their first moments."""
    settled = np.concatenate([values[max(1, len(values) // 40) - 1 :] for values in shown])
    low, high = settled.min(), settled.max()
    ax.set_ylim(low - 0.04 * (high - low), high + 0.06 * (high - low) + 1e-9)
