"""The HTML of a report: style, cards, tables and how numbers are written. Knows no run."""

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tfusion.paths import replace_text

STYLE = """
:root { color-scheme: light; --ink: #22303c; --soft: #61707c; --faint: #8f9ba4; --line: #e5e2da;
  --paper: #faf9f5; --card: #fff; --text: #3d5a80; --image: #c4703c; --good: #37775a;
  --bad: #b04a35; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui,
  -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 0 24px 72px; }
h1, h2 { font-family: "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", Georgia,
  "DejaVu Serif", serif; font-weight: 600; letter-spacing: -.01em; line-height: 1.15; }
h1 { font-size: clamp(2rem, 5vw, 3rem); margin: 0 0 .35em; }
.kicker { color: var(--image); font-size: .82rem; font-weight: 600; letter-spacing: .06em;
  text-transform: uppercase; margin: 0 0 .6em; }
h2 { font-size: 1.6rem; margin: 0 0 .3em; }
p { margin: 0 0 .8em; max-width: 70ch; }
section { padding-top: 52px; }
.lead { color: var(--soft); }
header.hero { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 400px); gap: 48px;
  padding: 56px 0 24px; align-items: center; }
.hero .lead { font-size: 1.1rem; max-width: 46ch; }
.mosaic { display: grid; grid-template-columns: repeat(4, 1fr); gap: 5px; margin: 0; }
.mosaic figcaption { grid-column: 1 / -1; color: var(--faint); font-size: .8rem; }
img.pixels { display: block; width: 100%; aspect-ratio: 1; image-rendering: pixelated;
  border-radius: 4px; }
header.compared { padding: 56px 0 24px; } header.compared h1 { font-size: clamp(1.6rem, 4vw, 2.4rem); }
h3 { font-size: 1.15rem; margin: 32px 0 .2em; }
table.compared th.num, table.compared td.num { white-space: normal; min-width: 125px; }
.path { color: var(--soft); overflow-wrap: anywhere; }
.verdict { display: inline-block; border-radius: 99px; padding: .25em .95em; font-weight: 600;
  background: #e4efe8; color: var(--good); margin-bottom: .5em; }
.verdict.short { background: #f8e9e3; color: var(--bad); border-radius: 16px; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr));
  gap: 18px 24px; margin: 8px 0 0; padding: 20px 0; border: solid var(--line);
  border-width: 1px 0; }
dl.facts div.wide { grid-column: span 2; }
dl.facts dt { font-size: .78rem; color: var(--soft); }
dl.facts dd { margin: 0; font-size: 1.3rem; font-weight: 600; line-height: 1.25; }
dl.facts div.wide dd { font-size: 1rem; line-height: 1.5; }
nav { position: sticky; top: 0; z-index: 2; background: rgba(250, 249, 245, .95);
  border-bottom: 1px solid var(--line); overflow-x: auto; white-space: nowrap;
  padding: 11px 0; font-size: .85rem; scrollbar-width: none; }
nav a { color: var(--soft); text-decoration: none; margin-right: 20px; }
nav a:hover { color: var(--ink); text-decoration: underline; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: .8rem;
  padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: bottom; }
td { padding: 9px 12px 9px 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
td.num, th.num { text-align: right; padding-right: 22px; white-space: nowrap; }
td small { display: block; color: var(--soft); font-size: .78rem; line-height: 1.35; }
td.value { font-size: 1.08rem; font-weight: 600; white-space: nowrap; }
td.value small { font-weight: 400; }
td.mark { text-align: center; font-size: 1.15rem; font-weight: 700; padding-right: 0; }
.good { color: var(--good); } .bad { color: var(--bad); } .faint { color: var(--faint); }
svg.scale { display: block; width: 190px; height: 26px; }
.key { font-size: .8rem; color: var(--soft); margin-top: 10px; max-width: none; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: 22px 16px;
  margin-top: 20px; }
.tile { margin: 0; font-size: .84rem; line-height: 1.35; overflow-wrap: anywhere; }
.tile figcaption { margin-top: 7px; }
.tile small { display: block; color: var(--soft); font-size: .78rem; margin-top: 2px; }
.tile small.bad { color: var(--bad); }
.tile.wrong img { outline: 2px solid #dc9d8c; outline-offset: 2px; }
.pair { display: grid; gap: 4px; }
.documents { display: grid; grid-template-columns: repeat(auto-fit, minmax(290px, 1fr)); gap: 20px;
  align-items: start; margin-top: 20px; }
.document { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 24px 26px 14px; }
.document p { font-family: "Iowan Old Style", "Palatino Linotype", Palatino, Georgia,
  "DejaVu Serif", serif; font-size: 1.06rem; white-space: pre-line;
  overflow-wrap: anywhere; margin-bottom: 14px; }
.document img { width: 192px; margin-bottom: 14px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
  gap: 20px; margin-top: 20px; align-items: stretch; }
.cards.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
.card { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px 14px; min-width: 0; display: flex; flex-direction: column; }
.card figcaption { font-size: .86rem; color: var(--soft); line-height: 1.4; margin-bottom: 10px;
  flex: 1; }
.card figcaption b { display: block; color: var(--ink); font-size: 1.02rem; font-weight: 600; }
.card svg { display: block; width: 100%; height: auto; }
.card svg text, svg.mask text { font-family: inherit !important; }
.card table { font-size: .88rem; } .card td { padding-top: 6px; padding-bottom: 6px; }
.card tr:last-child td { border-bottom: 0; }
svg.mask { display: block; width: 100%; min-width: 860px; height: auto; }
.swatch { display: inline-block; width: .85em; height: .85em; border-radius: 3px;
  margin: 0 .35em 0 1em; vertical-align: -.06em; }
.swatch:first-child { margin-left: 0; }
.bar { height: 12px; border-radius: 3px; min-width: 2px; background: var(--text); }
td.track { width: 60%; min-width: 90px; }
td .bar { height: 8px; margin: 2px 0; }
dl.facts + .scroll { margin-top: 20px; } .scroll + .cards { margin-top: 28px; }
img.drawn { display: block; width: 100%; max-width: 860px; border-radius: 6px; }
svg.strip { display: block; width: 100%; height: 58px; border-radius: 4px; margin: 4px 0 18px; }
.packing { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); gap: 14px;
  align-items: start; margin-bottom: 16px; }
.packed { background: var(--card); border: 1px solid var(--line); border-top: 4px solid; border-radius: 6px;
  padding: 10px 14px 12px; min-width: 0; }
.packed header { font-size: .8rem; color: var(--soft); margin-bottom: 6px; }
.packed header b { color: var(--ink); margin-right: .3em; }
.packed header small { display: block; color: var(--faint); }
.packed .flow { max-height: 24em; overflow: auto; }
.flow { font-size: .94rem; line-height: 1.6; white-space: pre-wrap; overflow-wrap: anywhere; }
.flow .unscored { color: var(--faint); }
.flow .special { font: .72em ui-monospace, Menlo, Consolas, monospace; color: var(--soft); margin: 0 2px;
  border: 1px solid var(--line); border-radius: 4px; padding: 1px 3px; vertical-align: 1px;
  white-space: nowrap; }
.flow .special.unscored { border-style: dashed; color: var(--faint); }
.flow .image { display: block; width: 104px; margin: 5px 0; }
.flow .image small { display: block; text-align: center; color: var(--soft); line-height: 1.3; }
details { border-top: 1px solid var(--line); padding: 10px 0; }
summary { cursor: pointer; font-weight: 600; }
pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; padding: 18px; overflow-x: auto; }
code { font: .88em ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.note { color: var(--ink); font-size: .9rem; padding-left: 1.2em; }
.note small { display: block; color: var(--soft); overflow-wrap: anywhere; }
@media (max-width: 760px) {
  main { padding: 0 16px 48px; } section { padding-top: 40px; } h2 { font-size: 1.4rem; }
  header.hero { grid-template-columns: minmax(0, 1fr); gap: 24px; padding: 32px 0 16px; }
  .grid { grid-template-columns: repeat(3, 1fr); gap: 18px 12px; }
  dl.facts { grid-template-columns: repeat(3, 1fr); } dl.facts dd { font-size: 1.1rem; }
  dl.facts div.wide { grid-column: 1 / -1; }
  .card { padding: 14px 12px 10px; }
  table.figures thead { display: none; }
  table.figures tr { display: grid; grid-template-columns: 1fr auto 28px; padding: 10px 0;
    border-bottom: 1px solid var(--line); column-gap: 14px; align-items: center; }
  table.figures td { border: 0; padding: 2px 0; }
  table.figures td.value { text-align: right; }
  table.figures td.mark { grid-column: 3; grid-row: 1; }
  table.figures td.drawn { grid-column: 1; grid-row: 2; }
  table.figures td.chance, table.figures td.want { grid-row: 2; font-size: .78rem;
    color: var(--soft); }
  table.figures td.chance { display: none; }
  table.figures td.want { grid-column: 2 / 4; text-align: right; padding-right: 0; }
  table.figures td.want::before { content: attr(data-before); }
  table.steps thead { display: none; }
  table.steps tr { display: block; padding: 10px 0; border-bottom: 1px solid var(--line); }
  table.steps td { display: inline-block; border: 0; padding: 2px 18px 2px 0; text-align: left; }
  table.steps td[data-label]::before { content: attr(data-label); display: block;
    color: var(--soft); font-size: .74rem; font-weight: 400; }
}
@media print { nav { display: none; } body { background: #fff; }
  .card, .tile { break-inside: avoid; } }
"""


def document(title: str, body: str) -> str:
    """The whole page; nothing in it is loaded from elsewhere."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def section(name: str, title: str, body: str) -> str:
    """One section of the page; `name` is its anchor."""
    return f'<section id="{name}"><h2>{escape(title)}</h2>\n{body}\n</section>'


def write(path: Path, title: str, body: str) -> None:
    """Writes a page, in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, document(title, body))


def facts(pairs: Iterable[tuple[str, str]], wide: Iterable[tuple[str, str]] = ()) -> str:
    """A handful of names, each with its value, side by side; wide: those of long values, at the end."""
    cells = "".join(f"<div{css}><dt>{name}</dt><dd>{value}</dd></div>"
                    for css, some in (("", pairs), (' class="wide"', wide)) for name, value in some)
    return f'<dl class="facts">{cells}</dl>'


def navigation(names: Iterable[str]) -> str:
    """Links to the sections of a page, by their anchors."""
    links = (f'<a href="#{name}">{escape(name.replace("-", " ").capitalize())}</a>' for name in names)
    return f"<nav>{''.join(links)}</nav>"


def card(title: str, reading: str, body: str) -> str:
    """A figure in a frame: a title, a sentence on how to read it, and the picture."""
    return (
        f'<figure class="card"><figcaption><b>{escape(title)}</b>{escape(reading)}</figcaption>'
        f"{body}</figure>"
    )


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = (), css: str = ""
) -> str:
    """A table of ready-made HTML cells; the columns in `numeric` are set flush right."""
    numeric = set(numeric)
    css_of = ["num" if column in numeric else "" for column in range(len(head))]
    heads = "".join(f'<th class="{c}">{escape(h)}</th>' for h, c in zip(head, css_of, strict=True))
    lines = []
    for row in rows:
        cells = zip(row, css_of, head, strict=True)
        lines.append(
            "<tr>"
            + "".join(
                f'<td class="{c}" data-label="{escape(h)}">{cell}</td>' for cell, c, h in cells
            )
            + "</tr>"
        )
    return (
        f'<div class="scroll"><table class="{css}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def pretty_json(value: Any) -> str:
    """A config as indented JSON, escaped for a page."""
    return f"<pre>{escape(json.dumps(value, indent=2))}</pre>"


def number(value: float | None, digits: int = 3) -> str:
    """A measured number with about `digits` significant digits: 0.992, 27.1, 1,250."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}·10<sup>{int(exponent)}</sup>"
    whole = len(str(int(size))) if size >= 1 else 0
    return f"{value:.{max(digits - whole, 0)}f}"


def count(value: float) -> str:
    """A number of things, short: 512, 36.5 k, 0.95 M, 3.1 G."""
    for size, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= 0.9 * size:
            scaled = value / (1e3 if suffix == "k" else size)
            return f"{number(scaled)} {suffix}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """A wall time: 8.2 s, 1 min 15 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = seconds / 60
    if minutes < 60:
        whole = round(seconds)
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{round(minutes) // 60} h {round(minutes) % 60:02d} min"
