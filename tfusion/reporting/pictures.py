"""Small images, scales and the attention mask, as HTML and SVG.

Shapes: T tokens in a row.
"""

import base64
import io
import itertools
import math
from html import escape

import numpy as np
from PIL import Image

IMAGE_COLOURS = (
    ("#f2c9ae", "#c4703c"),
    ("#f0dca0", "#c79a2a"),
    ("#d3c3df", "#7f5c9c"),
    ("#bcdcd6", "#3f8f84"),
    ("#eebfc4", "#b5525f"),
    ("#cdd9a9", "#7d9136"),
)
DOCUMENT_COLOURS = ("#b4c5da", "#cfdae7")
LEAK, PADDING = "#e00000", "#d9d9d4"
CELL, MARGIN = 8, 66
MAX_LABELLED = 160  # a longer row shows images and documents, but no single tokens


def pixel_image(image_hwc: np.ndarray, alt: str) -> str:
    """A small image as an <img> that is scaled up without blurring."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image_hwc, np.uint8)).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="pixels" alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def scale(
    value: float | None,
    low: float | None,
    high: float | None,
    chance: float | None,
    want: float | None,
    good: bool,
) -> str:
    """Where a value stands: a dot with its interval on a line that also marks chance and goal: from 0 to 1 for
    a fraction, else from 0. Nothing where none of these gives the line a scale."""
    marks = [x for x in (low, high, chance, want) if x is not None]
    if value is None or not math.isfinite(value) or not marks:
        return ""
    start, end = min(0.0, value, *marks), max(0.0, value, *marks)
    if start == 0 and end <= 1 and low is not None:
        end = 1.0
    else:
        pad = 0.08 * (end - start) or 1.0
        start, end = start - pad, end + pad

    def x(v: float) -> float:
        return round(8 + 174 * (v - start) / (end - start), 1)

    colour = "#37775a" if good else "#b04a35"
    parts = ['<line x1="8" x2="182" y1="13" y2="13" stroke="#dedbd3" stroke-width="2"/>']
    if low is not None and high is not None:
        parts.append(
            f'<line x1="{x(low)}" x2="{x(high)}" y1="13" y2="13" stroke="{colour}" '
            'stroke-width="7" stroke-opacity=".3" stroke-linecap="round"/>'
        )
    if chance is not None:
        parts.append(
            f'<line x1="{x(chance)}" x2="{x(chance)}" y1="6" y2="20" stroke="#8f9ba4" '
            'stroke-width="2" stroke-dasharray="3 2"/>'
        )
    if want is not None:
        parts.append(
            f'<line x1="{x(want)}" x2="{x(want)}" y1="5" y2="21" stroke="#22303c" '
            'stroke-width="1.6"/>'
        )
    parts.append(f'<circle cx="{x(value)}" cy="13" r="4.6" fill="{colour}"/>')
    return f'<svg class="scale" viewBox="0 0 190 26" aria-hidden="true">{"".join(parts)}</svg>'


def runs(ids_T: np.ndarray) -> list[tuple[int, int, int]]:
    """The stretches of equal value, as (value, start, end)."""
    cuts = [0, *(np.flatnonzero(np.diff(ids_T)) + 1).tolist(), len(ids_T)]
    return [(int(ids_T[a]), a, b) for a, b in itertools.pairwise(cuts) if b > a]


def _cell_colours(
    mask_TT: np.ndarray, segment_ids_T: np.ndarray, image_ids_T: np.ndarray
) -> np.ndarray:
    """The colour of each (query, key); '' where the key is hidden from the query."""
    size = len(segment_ids_T)
    query, key = np.indices((size, size))
    same_document = segment_ids_T[query] == segment_ids_T[key]
    image = np.where(
        (image_ids_T[query] == image_ids_T[key]) & same_document, image_ids_T[query], 0
    )
    colours = np.full((size, size), LEAK, dtype="<U7")
    for k, colour in enumerate(DOCUMENT_COLOURS):
        colours[same_document & (segment_ids_T[query] % 2 == k)] = colour
    for number in np.unique(image[image > 0]):
        past, future = IMAGE_COLOURS[(number - 1) % len(IMAGE_COLOURS)]
        colours[(image == number) & (key <= query)] = past
        colours[(image == number) & (key > query)] = future
    colours[(image == 0) & (key > query)] = LEAK
    padding = segment_ids_T[query] == 0
    colours[padding] = np.where(query == key, PADDING, LEAK)[padding]
    return np.where(mask_TT, colours, "")


def count_leaks(mask_TT: np.ndarray, segment_ids_T: np.ndarray, image_ids_T: np.ndarray) -> int:
    """How many visible pairs the rule forbids: another document, or a later token that is not a
    patch of the same image."""
    return int((_cell_colours(mask_TT, segment_ids_T, image_ids_T) == LEAK).sum())


def _rows(colours_TT: np.ndarray) -> list[str]:
    """The visible cells, one rectangle for each stretch of a colour."""
    parts = []
    for q, row in enumerate(colours_TT):
        codes = np.unique(row, return_inverse=True)[1]
        for _, start, end in runs(codes):
            if row[start]:
                parts.append(
                    f'<rect x="{start * CELL}" y="{q * CELL}" width="{(end - start) * CELL}"'
                    f' height="{CELL}" fill="{row[start]}"/>'
                )
    return parts


def _edges(pieces: list[str], image_ids_T: np.ndarray, segment_ids_T: np.ndarray) -> list[str]:
    """Labels along both edges: every text token, one bar for each image."""
    parts = []
    for number, start, end in runs(image_ids_T):
        if number:
            colour = IMAGE_COLOURS[(number - 1) % len(IMAGE_COLOURS)][1]
            a, length, middle = start * CELL, (end - start) * CELL, (start + end) * CELL / 2
            parts += [
                f'<rect x="-7" y="{a}" width="4" height="{length}" rx="2" fill="{colour}"/>',
                f'<rect y="-7" x="{a}" height="4" width="{length}" rx="2" fill="{colour}"/>',
                (
                    f'<text x="-12" y="{middle + 4}" text-anchor="end" font-size="11" '
                    f'fill="{colour}">image {number}</text>'
                ),
                (
                    f'<text transform="translate({middle + 4},-12) rotate(-90)" font-size="11" '
                    f'fill="{colour}">image {number}</text>'
                ),
            ]
    if len(pieces) > MAX_LABELLED:
        return parts
    for p, piece in enumerate(pieces):
        if image_ids_T[p] or not segment_ids_T[p]:
            continue
        label = piece.replace("▁", " ").replace("Ġ", " ").strip() or "␣"
        label = escape(label if len(label) <= 12 else f"{label[:11]}…")
        middle = (p + 0.5) * CELL + 2.6
        parts += [
            f'<text x="-5" y="{middle}" text-anchor="end">{label}</text>',
            f'<text transform="translate({middle},-5) rotate(-90)">{label}</text>',
        ]
    return parts


def _documents(segment_ids_T: np.ndarray) -> list[str]:
    """A frame around each document, and its name on the side that has room."""
    size, parts = len(segment_ids_T), []
    for number, start, end in runs(segment_ids_T):
        a, b, full = start * CELL, end * CELL, size * CELL
        if start:
            parts.append(
                f'<path d="M{a} 0V{full}M0 {a}H{full}" stroke="#22303c" '
                'stroke-opacity=".35" stroke-dasharray="2 3"/>'
            )
        name = f"document {number}" if number else "padding"
        side = f'x="{b + 8}"' if (start + end) <= size else f'x="{a - 8}" text-anchor="end"'
        parts.append(
            f'<text {side} y="{(a + b) / 2 + 4}" font-size="13" fill="#61707c">{name}</text>'
        )
    return parts


def mask(
    mask_TT: np.ndarray, segment_ids_T: np.ndarray, image_ids_T: np.ndarray, pieces: list[str]
) -> str:
    """The attention mask of one packed row: query down, key across, visible cells coloured."""
    full = len(segment_ids_T) * CELL
    colours_TT = _cell_colours(mask_TT, segment_ids_T, image_ids_T)
    parts = [
        f'<rect width="{full}" height="{full}" fill="#f6f5f0"/>',
        '<g shape-rendering="crispEdges">',
        *_rows(colours_TT),
        "</g>",
        *_documents(segment_ids_T),
        f'<g font-size="{CELL - 0.4}" fill="#3b4954">',
        *_edges(pieces, image_ids_T, segment_ids_T),
        "</g>",
    ]
    box = f"{-MARGIN} {-MARGIN} {full + MARGIN + 4} {full + MARGIN + 4}"
    return (
        f'<svg class="mask" viewBox="{box}" role="img" aria-label="attention mask">'
        f"{''.join(parts)}</svg>"
    )
