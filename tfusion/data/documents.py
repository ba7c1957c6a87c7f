"""A source's documents, which rows are packed from: (record, piece). Records are numbered through the shards.

A record is one document, but for a text whose `<bos> text <eos>` is longer than a row: it goes on in further
documents, its pieces. Each opens with BOS and takes the next T - 1 tokens; the last one alone ends with EOS.
A position predicts the next token of its own piece, the last position of a piece that goes on predicts nothing:
every token of the text, EOS too, is predicted once.

A record with images that a row does not hold is never cut: it has no document, and is counted.
"""

import functools
import math
import sys
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tfusion.data import transforms
from tfusion.data.config import SLOTS_PER_IMAGE, RowFormat
from tfusion.data.layout import text
from tfusion.data.store import Split
from tfusion.errors import UserError
from tfusion.types import Document, Example, Part

SAMPLE = 16  # shards, evenly spread, of which a source's mean lengths are taken
MOST_LEFT_OUT = 0.1  # of a source's records with images; more is a mistake in the config


class Cut(NamedTuple):
    """The documents of some records (parallel int64 arrays)."""

    of: np.ndarray  # which of the records
    pieces: np.ndarray
    lengths: np.ndarray  # positions, as `read` lays them out
    images: np.ndarray


@functools.cache
def _warn(told: str) -> None:
    """Once a process, however often a source is opened: each evaluator opens it."""
    print(f"warning: {told}", file=sys.stderr)


class Documents:
    """The documents of one split of one source. Opening reads the ledger and the sizes of a few shards.

    Raises UserError where a record does not fit the config.
    """

    def __init__(self, format: RowFormat, name: str, split: str):
        self.format, self.seq_len, self.name = format, format.data.seq_len, name
        self.source = Split(format.data.prepared, name, split)
        self.key = zlib.crc32(name.encode())  # the source's own, whatever stands beside it
        shards = self.source.shards
        self._firsts = np.cumsum([0, *(shard.records for shard in shards)])  # record numbers
        self._check()
        some = np.unique(np.linspace(0, len(shards) - 1, SAMPLE).round().astype(int)) if shards else ()
        sizes = [self.source.sizes(shard) for shard in some]
        self._sample = np.concatenate([np.zeros((0, 2), np.int64), *sizes]).T  # text tokens, images
        self._tell_left_out()

    def _positions(self, text_tokens, images):
        return self.format.layout.sizes(text_tokens, images).positions

    def _check(self) -> None:
        source, V = self.source, self.format.vocabulary.text_vocab_size
        if source.image_shape:
            self.format.check_images(f"{source.folder} holds", source.image_shape,
                                     self.format.vocabulary.num_codes, "write that source again")
        largest = max((shard.max_token_id for shard in source.shards), default=0)
        if largest >= V:
            raise UserError(f"{source.folder}: token id {largest} is not below model.text_vocab_size = {V}; "
                            "was it prepared with another tokenizer?")

    def _tell_left_out(self) -> None:
        """A line on stderr where records of the sample are left out. Raises UserError where they are many."""
        (tokens, images), T, slots = self._sample, self.seq_len, self.format.image_slots
        pieces = self._pieces(tokens, images)
        if pieces.all():
            return
        first = int(np.argmin(pieces))
        number, needs = int(images[first]), int(self._positions(tokens[first], images[first]))
        one = self._positions(0, 1) - self._positions(0, 0)
        share = min(1.0, math.ceil(100 * number * one / T / SLOTS_PER_IMAGE) / 100)
        left_out, of = int((pieces == 0).sum()), int((images > 0).sum())
        sampled = "" if len(pieces) == len(self) else f" (of a sample of {len(pieces)} records)"
        why = (f"one has {number} images and needs {needs} positions; a row has {T}, and {slots} image slots, "
               "and a document with images is never cut: raise "
               + (f"data.seq_len to {needs}" if needs > T else f"data.image_share to {share}"))
        told = f"{self.source.folder}: {left_out} of {of} records with images are left out{sampled}: {why}"
        if left_out > MOST_LEFT_OUT * of:
            raise UserError(told)
        _warn(told)

    def _pieces(self, text_tokens, images):
        """How many documents records become: a long text several, each but the first for one more BOS; one with
        images that a row does not hold none.
        """
        pieces = np.maximum(1, -(-(self._positions(text_tokens, images) - 1) // (self.seq_len - 1)))
        return np.where(images > 0, (pieces == 1) & (images <= self.format.image_slots), pieces)

    def __len__(self) -> int:
        """Records, those that are left out too."""
        return int(self._firsts[-1])

    def number(self, shards, records):
        """Of records of shards."""
        return self._firsts[shards] + records

    def _by_shard(self, records):
        """Iterator over (shard, which of the records lie in it)."""
        shards = np.searchsorted(self._firsts, records, side="right") - 1
        order = np.argsort(shards, kind="stable")
        found, begins = np.unique(shards[order], return_index=True)
        return zip(found.tolist(), np.split(order, begins[1:])) if len(order) else ()

    def sizes(self, records):
        """(text tokens, images) of records, int64."""
        records = np.asarray(records, np.int64)
        sizes = np.zeros((len(records), 2), np.int64)
        for shard, here in self._by_shard(records):
            sizes[here] = self.source.sizes(shard)[records[here] - self._firsts[shard]]
        return sizes.T

    @property
    def records(self):
        """int64: those that are not left out. Reads the sizes of all."""
        return np.unique(self.cut(np.arange(len(self))).of)

    def cut(self, records, dropped=False) -> Cut:
        """Into documents. dropped: bool, which records lost their captions."""
        tokens, images = self.sizes(records)
        number = self._pieces(tokens, images)
        of = np.repeat(np.arange(len(number)), number)
        pieces = np.arange(len(of)) - np.repeat(np.cumsum(number) - number, number)
        tokens = np.where(dropped & (images > 0), 0, tokens)
        lengths = self._positions(tokens, images)[of] - pieces * (self.seq_len - 1)
        return Cut(of, pieces, np.minimum(lengths, self.seq_len), images[of])

    def means(self, dropout: float) -> tuple[float, float]:
        """Mean positions of a record, and those in images, where `dropout` of those with images lose their
        captions. Of the sample, in proportion to what the ledger says of all.
        """
        tokens, images = self._sample
        whole, pieces = self._positions(tokens, images), self._pieces(tokens, images)
        kept = self._positions((1 - dropout) * tokens, images)
        positions = np.where(images > 0, kept, whole + pieces - 1) * (pieces > 0)
        in_images = (self._positions(0, images) - self._positions(0, 0)) * (pieces > 0)
        of_all = (sum(getattr(shard, x) for shard in self.source.shards) / len(self)
                  for x in ("text_tokens", "images"))
        scale = self._positions(*of_all) / whole.mean()
        return float(positions.mean() * scale), float(in_images.mean() * scale)

    def parts(self, records) -> list[list[Part]]:
        """Of some records, as they are stored."""
        parts, records = [None] * len(records), np.asarray(records, np.int64)
        for shard, here in self._by_shard(records):
            read = self.source.read(shard, (records[here] - self._firsts[shard]).tolist())
            for place, found in zip(here.tolist(), read):
                parts[place] = found
        return parts

    def read(self, documents: Sequence[tuple[int, int]], drop_caption=None, image_first=None,
             image_first_max_t: float = 1.0) -> list[Example]:
        """Some (record, piece), arranged (transforms.arrange) and laid out, with one read per shard.
        drop_caption, image_first: bool of each; None = of none."""
        records = np.array([record for record, _ in documents], np.int64)
        records, which = np.unique(records, return_inverse=True)
        parts = self.parts(records)
        none = [False] * len(documents)
        return [self._lay(parts[place], piece, bool(drop), bool(first), image_first_max_t)
                for place, (_, piece), drop, first in zip(
                    which.tolist(), documents, none if drop_caption is None else drop_caption,
                    none if image_first is None else image_first)]

    def _lay(self, parts: list, piece: int, drop: bool, first: bool, max_t: float) -> Example:
        if any(part.kind == "image" for part in parts):
            return self.format.layout.lay(transforms.arrange(parts, drop, first, max_t))
        T = self.seq_len
        tokens = np.concatenate([np.zeros(0, np.int32), *(part.values for part in parts)])
        here = tokens[piece * (T - 1) : (piece + 1) * (T - 1)]
        example = self.format.layout.lay(Document((text(here),)))
        return example if len(example.tokens_L) <= T else without_end(example)


def without_end(example: Example) -> Example:
    """A text that goes on in its next piece: no EOS, and its last position predicts nothing."""
    mask = example.loss_mask_L[:-1].copy()
    mask[-1] = False
    return example._replace(tokens_L=example.tokens_L[:-1], image_ids_L=example.image_ids_L[:-1],
                            loss_mask_L=mask)
