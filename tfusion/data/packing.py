"""Packing documents into rows: `pack` and `plan` decide on lengths only, `pack_row` fills in the data.

A window holds as many records of each source as give its share (data/mixture.py), and is packed into exactly
R rows. `pack` packs what a window is offered; what is left of it is offered once more: `plan` puts it into the
room that the next window's own packing leaves, and what finds none there is dropped and counted. Row k of the
run = (window k // R, index k % R); both are pure, so any process can start at any row for two packings.

R rows per window, T positions, I image slots, L positions of a document.
"""

from typing import NamedTuple

import numpy as np

from tfusion.data.config import RowFormat
from tfusion.data.layout import Vocabulary
from tfusion.data.transforms import keyed_bits
from tfusion.errors import UserError
from tfusion.types import PAD, Batch, Example

DOCUMENT_COIN, LEFT_COIN, ROW_COIN = 5, 6, 7  # beside those of data/order.py
SURE = 0.95  # of a window's positions and slots: what large documents first are sure to fit into


class Candidates(NamedTuple):
    """Documents offered to a window, and their sizes (parallel int64 arrays)."""

    sources: np.ndarray
    epochs: np.ndarray
    records: np.ndarray
    pieces: np.ndarray  # of a text longer than a row (data/documents.py)
    lengths: np.ndarray
    images: np.ndarray

    def take(self, some) -> "Candidates":
        return Candidates(*(x[some] for x in self))

    def named(self, some) -> list[tuple]:
        """(source, epoch, record, piece) of each."""
        return list(zip(*(x[some].tolist() for x in self[:4])))


class Packed(NamedTuple):
    """A window's own packing."""

    offered: Candidates
    rows: np.ndarray  # of each document, -1 = left
    room: np.ndarray  # (R,): positions that are free
    slots: np.ndarray  # (R,): image slots that are free

    @property
    def left(self) -> Candidates:
        return self.offered.take(self.rows < 0)


class Plan(NamedTuple):
    """rows[r] = list of (source, epoch, record, piece)."""

    rows: list
    num_positions: int  # filled
    dropped: np.ndarray  # sources of the last window's documents that found no room in this one either


def pack(seed: int, window: int, offered: Candidates, num_rows: int, seq_len: int, num_slots: int) -> Packed:
    """First-fit under T positions and I image slots a row: large documents first, as far as they surely find
    room, and then the others as chance has it. Which documents are left is so left to chance: were all packed
    large first, it would be the smallest, a quarter of the smallest tenth where 2 % are too many.
    """
    coins = keyed_bits(seed, window, np.arange(len(offered.lengths)), DOCUMENT_COIN)
    chance = np.argsort(coins, kind="stable")
    lengths, images = offered.lengths[chance], offered.images[chance]
    sure = ((np.cumsum(lengths) <= SURE * num_rows * seq_len)
            & (np.cumsum(images) <= SURE * num_rows * num_slots))
    tried = []
    for order in _large_first(lengths[sure], images[sure]):
        order = np.concatenate([chance[sure][order], chance[~sure]])
        room, slots = np.full(num_rows, seq_len), np.full(num_rows, num_slots)
        rows = np.empty(len(order), np.int64)
        rows[order] = first_fit(offered.lengths[order], offered.images[order], room, slots)
        tried.append(Packed(offered, rows, room, slots))
    return min(tried, key=lambda packed: packed.room.sum())


def _large_first(lengths, images) -> list[np.ndarray]:
    """Two orders, of which one or the other fills more: all by their lengths; and those with images and those
    without each by their lengths, dealt so that both end together. Where slots are few, the first makes rows of
    text alone and leaves too few slots for the images.
    """
    by_length = np.argsort(-lengths, kind="stable")
    pictured = images[by_length] > 0
    dealt = np.empty(len(lengths))
    for some in (by_length[pictured], by_length[~pictured]):
        dealt[some] = np.cumsum(lengths[some]) / max(lengths[some].sum(), 1)
    return [by_length, by_length[np.argsort(dealt[by_length], kind="stable")]]


def plan(seed: int, window: int, own: Packed, before: Packed | None) -> Plan:
    """The window's own packing, and what the window before it left in the room that remains."""
    R, room, slots = len(own.room), own.room.copy(), own.slots.copy()
    rows = [[] for _ in range(R)]
    placed = own.rows >= 0
    documents = list(zip(own.rows[placed].tolist(), own.offered.named(placed)))
    dropped = np.zeros(0, np.int64)
    if before is not None:
        left = before.left
        coins = keyed_bits(seed, window, np.arange(len(left.lengths)), LEFT_COIN)
        left = left.take(np.argsort(coins, kind="stable"))
        again = first_fit(left.lengths, left.images, room, slots)
        documents += zip(again[again >= 0].tolist(), left.named(again >= 0))
        dropped = left.sources[again < 0]
    for row, document in documents:
        rows[row].append(document)
    order = np.argsort(keyed_bits(seed, window, np.arange(R), ROW_COIN), kind="stable")
    full = int((own.room - room).sum() + own.offered.lengths[placed].sum())
    return Plan([rows[row] for row in order], full, dropped)


def first_fit(lengths, images, room, slots) -> np.ndarray:
    """The row of each document: the first with room for it, in positions and image slots, or -1. room, slots:
    int (R,), what rows have free; taken from."""
    other = np.flatnonzero((room != room[-1]) | (slots != slots[-1])) if len(room) else ()
    used = other[-1] + 1 if len(other) else 0  # all rows from here on are alike
    placed = []
    for length, number in zip(lengths.tolist(), images.tolist()):
        fits = (room[: used + 1] >= length) & (slots[: used + 1] >= number)
        row = int(fits.argmax()) if len(fits) else -1
        if row >= 0 and fits[row]:
            room[row] -= length
            slots[row] -= number
            used = max(used, row + 1)
        else:
            row = -1
        placed.append(row)
    return np.asarray(placed, np.int64)


def empty_row(row_id: int, format: RowFormat) -> Batch:
    """A row of padding (arrays without the batch axis)."""
    T, I = format.data.seq_len, format.image_slots
    return Batch(
        row_ids_B=np.int32(row_id), tokens_BT=np.full(T, PAD, np.int32), segment_ids_BT=np.zeros(T, np.int32),
        image_ids_BT=np.zeros(T, np.int32), positions_BT=np.zeros(T, np.int32), loss_mask_BT=np.zeros(T, bool),
        latents_BIhwc=np.zeros((I, *format.latent_shape), np.float32), image_start_BI=np.full(I, T, np.int32),
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
    bad = (batch.tokens_BT >= vocabulary.first_code) != (batch.image_ids_BT > 0)
    if vocabulary.num_codes and bad.any():
        fail(bad, f"token id {batch.tokens_BT[bad][0]}: ids from {vocabulary.first_code} on are codes, which "
                  "stand in images alone, and nothing else does")
