"""Packing documents into rows: `plan_window` decides on lengths only, `pack_row` fills in the data.

A window holds a fixed number of documents per source, so that token shares come out, and is packed into
exactly R rows. Row k of the run = (window k // R, index k % R); a plan is a pure function of
(seed, window), so any process can start at any row for the price of one plan.

R rows per window, T positions, I image slots, L positions of a document.
"""

from typing import NamedTuple

import numpy as np

from tfusion.data.config import RowFormat
from tfusion.data.layout import Vocabulary
from tfusion.errors import UserError
from tfusion.types import PAD, Batch, Example


class Plan(NamedTuple):
    """rows[r] = list of (source, epoch, record, piece); what did not fit is counted."""

    rows: list
    num_documents: int
    num_dropped: int
    num_positions: int  # filled


class Candidate(NamedTuple):
    """Documents of one source offered to a window, and their sizes (parallel int arrays)."""

    epochs: np.ndarray
    records: np.ndarray
    pieces: np.ndarray  # of a text longer than a row (data/documents.py)
    lengths: np.ndarray
    images: np.ndarray


def documents_per_window(shares, mean_lengths, num_rows: int, seq_len: int) -> list[int]:
    """How many documents of each source fill num_rows * seq_len positions in the given token shares."""
    total = sum(shares)
    return [round(num_rows * seq_len * share / total / mean) for share, mean in zip(shares, mean_lengths)]


def plan_window(seed: int, window: int, candidates: list[Candidate], num_rows: int, seq_len: int,
                num_slots: int) -> Plan:
    """First-fit over the shuffled documents of one window, under T positions and I image slots a row."""
    rng = np.random.default_rng([seed, window])
    documents = [(s, *document) for s, c in enumerate(candidates)
                 for document in zip(c.epochs.tolist(), c.records.tolist(), c.pieces.tolist())]
    lengths, images = (np.concatenate([getattr(c, x) for c in candidates]) for x in ("lengths", "images"))
    order = rng.permutation(len(documents))
    rows, dropped, filled = [[] for _ in range(num_rows)], 0, 0
    for index, row in zip(order, first_fit(lengths[order], images[order], num_rows, seq_len, num_slots)):
        if row < 0:
            dropped += 1
        else:
            rows[row].append(documents[index])
            filled += int(lengths[index])
    return Plan([rows[i] for i in rng.permutation(num_rows)], len(documents), dropped, filled)


def first_fit(lengths, images, num_rows: int, seq_len: int, num_slots: int) -> list[int]:
    """The row of each document: the first with room for it, in positions and image slots, or -1."""
    room, slots = np.full(num_rows, seq_len), np.full(num_rows, num_slots)
    placed, used = [], 0
    for length, number in zip(lengths.tolist(), images.tolist()):
        fits = (room[: used + 1] >= length) & (slots[: used + 1] >= number)  # an empty row is like another
        row = int(fits.argmax())
        if fits[row]:
            room[row] -= length
            slots[row] -= number
            used = max(used, row + 1)
        placed.append(row if fits[row] else -1)
    return placed


def empty_row(row_id: int, format: RowFormat) -> Batch:
    """A row of padding (arrays without the batch axis)."""
    T, I = format.data.seq_len, format.image_slots
    return Batch(
        row_ids_B=np.int32(row_id), tokens_BT=np.full(T, PAD, np.int32), segment_ids_BT=np.zeros(T, np.int32),
        image_ids_BT=np.zeros(T, np.int32), positions_BT=np.zeros(T, np.int32), loss_mask_BT=np.zeros(T, bool),
        latents_BIhwc=np.zeros((I, *format.image_shape), np.float32), image_start_BI=np.full(I, T, np.int32),
        max_t_BI=np.zeros(I, np.float32), noise_ids_BI2=noise_ids(np.int32(row_id), I))


def pack_row(row_id: int, examples: list[Example], format: RowFormat) -> Batch:
    """Concatenates documents into one row (arrays without the batch axis), padded to seq_len."""
    row = empty_row(row_id, format)
    start = slot = 0
    for document, example in enumerate(examples, start=1):
        length, images = len(example.tokens_L), len(example.max_t_I)
        here = slice(start, start + length)
        ids = example.image_ids_L
        row.tokens_BT[here] = example.tokens_L
        row.segment_ids_BT[here] = document
        row.image_ids_BT[here] = np.where(ids > 0, ids + slot, 0)
        row.positions_BT[here] = np.arange(length)
        row.loss_mask_BT[here] = example.loss_mask_L
        for k in range(images):
            row.latents_BIhwc[slot + k] = example.latents_Ihwc[k]
            row.image_start_BI[slot + k] = start + int(np.argmax(ids == k + 1))
            row.max_t_BI[slot + k] = example.max_t_I[k]
        start, slot = start + length, slot + images
    return row


def noise_ids(row_ids, num_slots: int):
    """What training's noise is keyed by: uint32 (..., I, 2), the global row and the image slot."""
    rows = np.repeat(np.asarray(row_ids)[..., None], num_slots, axis=-1)
    return np.stack([rows, np.broadcast_to(np.arange(num_slots), rows.shape)], axis=-1).astype(np.uint32)


def stack_rows(rows: list):
    """Rows without a batch axis -> one batch."""
    return type(rows[0])(*(np.stack(field) for field in zip(*rows)))


def check_batch(batch: Batch, vocabulary: Vocabulary) -> None:
    """Raises UserError where a batch breaks the data contract (types.Batch), naming row and position."""

    def fail(mask, text):
        row, position = (int(x) for x in np.argwhere(mask)[0])
        raise UserError(f"bad batch: row {int(batch.row_ids_B[row])}, position {position}: {text}")

    T, vocab_size, N = batch.tokens_BT.shape[1], vocabulary.vocab_size, vocabulary.num_patches
    bad = (batch.tokens_BT < 0) | (batch.tokens_BT >= vocab_size)
    if bad.any():
        fail(bad, f"token id {batch.tokens_BT[bad][0]} is outside 0..{vocab_size - 1}; "
                  "was the data prepared with this tokenizer?")
    segments = np.pad(batch.segment_ids_BT, ((0, 0), (0, 1)))
    bad = batch.loss_mask_BT & ((segments[:, :-1] == 0) | (segments[:, :-1] != segments[:, 1:]))
    if bad.any():
        fail(bad, "is scored on what follows its document's end")
    bad = (batch.image_ids_BT > 0) & (batch.segment_ids_BT == 0)
    if bad.any():
        fail(bad, "an image patch lies in padding")
    expected = np.zeros_like(batch.image_ids_BT)
    for row, starts in enumerate(batch.image_start_BI):
        for slot, start in enumerate(starts):
            if start < T:
                expected[row, start : start + N] = slot + 1
    bad = batch.image_ids_BT != expected
    if bad.any():
        fail(bad, f"image id {batch.image_ids_BT[bad][0]} does not match the image slots "
                  f"({N} patches each): an image id without its patches")
