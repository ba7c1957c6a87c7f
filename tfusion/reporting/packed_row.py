"""A packed row as HTML: a strip of its positions, and its documents as a person reads them.

What is shown is what training is given, read back out of the row: a mistake in the layout would show.
T positions, L positions of a document.
"""

import itertools
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from tfusion.data.layout import Vocabulary
from tfusion.data.tokenizers import Tokenizer
from tfusion.data.tokenizers.base import special
from tfusion.reporting import pictures, plots
from tfusion.types import Batch

OPEN = 12  # documents of a row that are shown unfolded


class Piece(NamedTuple):
    """A stretch of a document."""

    kind: str  # "text", "special" or "image"
    words: str  # of text and special ids
    scored: bool  # whether the model is trained to say it
    slot: int = -1  # of an image


class Shown(NamedTuple):
    """A document of a row."""

    source: int
    where: str  # which record it is
    start: int  # its positions
    end: int
    pieces: list[Piece]

    @property
    def unscored(self) -> bool:
        """Its captions were dropped for guidance: nothing of it is scored as text, and it has pictures."""
        return any(piece.kind == "image" for piece in self.pieces) and not any(
            piece.scored for piece in self.pieces if piece.kind != "image")


def said(row: Batch) -> np.ndarray:
    """bool (T,): tokens that the position before is scored on."""
    return np.concatenate([[False], row.loss_mask_BT[:-1]])


def read_pieces(row: Batch, start: int, end: int, known: Vocabulary, tokenizer: Tokenizer) -> list[Piece]:
    """What stands at the positions from start to end of a row (without the batch axis), in order."""
    tokens, images, scored = (x[start:end].tolist() for x in (row.tokens_BT, row.image_ids_BT, said(row)))
    names = {known.boi: "<boi>", known.eoi: "<eoi>"}
    named = ["" if image else names.get(token) or special(token, known.text_vocab_size) or ""
             for token, image in zip(tokens, images)]
    keys = [(image, p if name else -1, bool(yes) and not image)
            for p, (image, name, yes) in enumerate(zip(images, named, scored))]
    cuts = [0, *(p for p in range(1, len(keys)) if keys[p] != keys[p - 1]), len(keys)]
    pieces = []
    for (image, _, yes), a, b in ((keys[a], a, b) for a, b in itertools.pairwise(cuts)):
        if image:
            pieces.append(Piece("image", "", scored[a] or bool(row.max_t_BI[image - 1] > 0), image - 1))
        else:
            pieces.append(Piece("special", named[a], yes) if named[a] else
                          Piece("text", tokenizer.decode(tokens[a:b]), yes))
    return pieces


def read_documents(row: Batch, planned: Sequence[tuple], names: Sequence[str], known: Vocabulary,
                   tokenizer: Tokenizer) -> list[Shown]:
    """Of a row and its plan (rows.PackedRows.documents). names: of the sources."""
    parts = [(start, end) for segment, start, end in pictures.runs(row.segment_ids_BT) if segment]
    shown = []
    for (start, end), (source, epoch, record, piece) in zip(parts, planned, strict=True):
        where = f"{names[source]}, record {record:,}" + f", epoch {epoch + 1}" * (epoch > 0)
        shown.append(Shown(source, where + f", piece {piece + 1}" * (piece > 0), start, end,
                           read_pieces(row, start, end, known, tokenizer)))
    return shown


# ---------------------------------------------------------------- HTML

def colour(source: int) -> str:
    return plots.RUNS[source % len(plots.RUNS)]


def strip(row: Batch, documents: list[Shown]) -> str:
    """The row from left to right: documents in their source's colour, patches full, padding grey, and below a
    line where tokens are scored."""
    T = len(row.tokens_BT)
    parts = [f'<rect width="{T}" height="30" fill="{pictures.PADDING}"/>']
    for shown in documents:
        box = f'x="{shown.start}" width="{shown.end - shown.start}" height="30"'
        parts.append(f'<g fill="{colour(shown.source)}"><title>{escape(shown.where)}</title>'
                     f'<rect {box} fill="#fff"/><rect {box} fill-opacity=".3"/>')
        ids = row.image_ids_BT[shown.start : shown.end]
        parts += [f'<rect x="{shown.start + a}" width="{b - a}" height="30" stroke="#fff" stroke-width=".7" '
                  f'vector-effect="non-scaling-stroke"/>' for image, a, b in pictures.runs(ids) if image]
        parts.append("</g>")
        if shown.start:
            parts.append(f'<path d="M{shown.start} 0V30" stroke="#fff" stroke-width="3" '
                         'vector-effect="non-scaling-stroke"/>')
    parts += [f'<rect x="{a}" y="33" width="{b - a}" height="4" fill="{plots.INK}"/>'
              for yes, a, b in pictures.runs(said(row)) if yes]
    return (f'<svg class="strip" viewBox="0 0 {T} 37" preserveAspectRatio="none" role="img" '
            f'aria-label="positions of the row">{"".join(parts)}</svg>')


def flow(pieces: list[Piece], images: np.ndarray, max_t_I: np.ndarray) -> str:
    """Text, special ids and pictures in their order. images: uint8 (slots in use, H, W, 3)."""
    made = []
    for piece in pieces:
        css = piece.kind if piece.scored else f"{piece.kind} unscored"
        if piece.kind != "image":
            made.append(f'<span class="{css}">{escape(piece.words)}</span>')
            continue
        max_t = float(max_t_I[piece.slot])
        said = f"t ≤ {max_t:g}" if 0 < max_t < 1 else "" if piece.scored else "no loss"
        below = f"<small>{said}</small>" if said else ""
        drawn = pictures.pixel_image(images[piece.slot], "a picture of the row")
        made.append(f'<span class="{css}">{drawn}{below}</span>')
    return "".join(made)


def cards(documents: list[Shown], images: np.ndarray, max_t_I: np.ndarray) -> str:
    """A card a document, those after the first OPEN folded away."""
    made = []
    for number, shown in enumerate(documents, start=1):
        remark = ", caption dropped" if shown.unscored else ""
        made.append(
            f'<article class="packed" style="border-top-color: {colour(shown.source)}"><header><b>{number}</b> '
            f"{escape(shown.where)}<small>positions {shown.start:,} to {shown.end - 1:,}{remark}</small>"
            f'</header><div class="flow">{flow(shown.pieces, images, max_t_I)}</div></article>')
    open_, folded = (f'<div class="packing">{"".join(some)}</div>' if some else ""
                     for some in (made[:OPEN], made[OPEN:]))
    more = len(made) - OPEN
    return open_ + (f"<details><summary>{more:,} more documents of this row</summary>{folded}</details>"
                    if folded else "")
