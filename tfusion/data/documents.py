"""A source's documents, the unit that windows, orders and shuffles count in: (record, piece).

A record is one document, but for a text whose `<bos> text <eos>` is longer than a row: it goes on in further
documents, its pieces. Each opens with BOS and takes the next T - 1 tokens; the last one alone ends with EOS.
A position predicts the next token of its own piece, the last position of a piece that goes on predicts nothing:
every token of the text, EOS too, is predicted once. Windows count documents and not records, so that one very
long text is spread over the run instead of overflowing its window.

A record with images that a row does not hold is never cut: it is left out, and how many are is told.
"""

import math
import sys
import zlib

import numpy as np

from tfusion.data import transforms
from tfusion.data.config import SLOTS_PER_IMAGE, RowFormat
from tfusion.data.layout import text
from tfusion.data.prepared import PreparedSource
from tfusion.errors import UserError
from tfusion.types import Document, Example

MEAN_SAMPLE = 65_536  # records from which a source's mean length is taken
MOST_LEFT_OUT = 0.1  # of a source's records with images; more is a mistake in the config


class Documents:
    """The documents of one split of one prepared source, by number: record after record, piece after piece.

    Raises UserError where a record does not fit the config.
    """

    def __init__(self, format: RowFormat, name: str, split: str):
        self.format, self.seq_len, self.name = format, format.data.seq_len, name
        self.source = PreparedSource(format.data.prepared, name, split)
        self.key = zlib.crc32(name.encode())  # the source's own, whatever stands beside it
        self._check()
        pieces = self._pieces(slice(None))
        self._number = int(pieces.sum())
        self._tell_left_out(pieces)
        self._firsts = None if (pieces == 1).all() else np.cumsum(pieces) - pieces  # per record

    def _positions(self, text_tokens, images):
        return self.format.layout.sizes(text_tokens, images).positions

    def _check(self) -> None:
        source, V = self.source, self.format.vocabulary.text_vocab_size
        if source.latent_shape not in (None, self.format.image_shape):
            raise UserError(f"{source.folder} holds latents of shape {source.latent_shape}, the model expects "
                            f"{self.format.image_shape}: write that source again")
        if source.meta["max_token_id"] >= V:
            raise UserError(f"{source.folder}: token id {source.meta['max_token_id']} is not below "
                            f"model.text_vocab_size = {V}; was it prepared with another tokenizer?")

    def _tell_left_out(self, pieces) -> None:
        """A line on stderr where records are left out. Raises UserError where they are many."""
        source, T, slots = self.source, self.seq_len, self.format.image_slots
        if pieces.all():
            return
        record = int(np.argmin(pieces))
        number = int(source.images[record])
        needs = int(self._positions(source.text_tokens[record], number))
        one = self._positions(0, 1) - self._positions(0, 0)
        share = min(1.0, math.ceil(100 * number * one / T / SLOTS_PER_IMAGE) / 100)
        left_out, of = int((pieces == 0).sum()), int((source.images > 0).sum())
        why = (f"record {record} has {number} images and needs {needs} positions; a row has {T}, and {slots} "
               f"image slots, and a document with images is never cut: raise "
               + (f"data.seq_len to {needs}" if needs > T else f"data.image_share to {share}"))
        if left_out > MOST_LEFT_OUT * of:
            raise UserError(f"{source.folder}: {why} ({left_out} of {of} records with images do not fit)")
        print(f"warning: {source.folder}: {left_out} of {of} records with images are left out. The first: "
              f"{why}", file=sys.stderr)

    def _pieces(self, some):
        """How many documents each of some records becomes: a long text several, each but the first for one more
        BOS; one with images that a row does not hold none.
        """
        images = self.source.images[some]
        lengths = self._positions(self.source.text_tokens[some], images)
        pieces = np.maximum(1, -(-(lengths - 1) // (self.seq_len - 1)))
        return np.where(images > 0, (pieces == 1) & (images <= self.format.image_slots), pieces)

    def __len__(self) -> int:
        return self._number

    def locate(self, documents):
        """(records, pieces), int64, of document numbers."""
        documents = np.asarray(documents, np.int64)
        if self._firsts is None:
            return documents, np.zeros_like(documents)
        records = np.searchsorted(self._firsts, documents, side="right") - 1
        return records, documents - self._firsts[records]

    @property
    def records(self):
        """int64: those that are not left out."""
        return np.unique(self.locate(np.arange(len(self)))[0])

    def images(self, records):
        return np.asarray(self.source.images[records])

    def lengths(self, records, pieces, dropped=False):
        """Positions of documents as `read` lays them out. dropped: bool, which lost their captions."""
        images = self.images(records)
        tokens = np.where(dropped & (images > 0), 0, self.source.text_tokens[records])
        T = self.seq_len
        return np.minimum(self._positions(tokens, images) - pieces * (T - 1), T)

    def means(self, dropout: float) -> tuple[float, float]:
        """Mean positions of a document, and those in images, where `dropout` of the documents with images lose
        their captions; over a sample.
        """
        some = slice(None, None, max(1, len(self.source) // MEAN_SAMPLE))
        tokens, images = self.source.text_tokens[some], self.source.images[some]
        whole = self._positions(tokens, images)
        pieces = self._pieces(some)
        kept = self._positions((1 - dropout) * tokens, images)
        positions = np.where(images > 0, kept, whole + pieces - 1) * (pieces > 0)
        in_images = (self._positions(0, images) - self._positions(0, 0)) * (pieces > 0)
        return float(positions.sum() / pieces.sum()), float(in_images.sum() / pieces.sum())

    def read(self, record: int, piece: int, drop_caption: bool = False, image_first: bool = False,
             image_first_max_t: float = 1.0) -> Example:
        """One document, arranged (transforms.arrange) and laid out."""
        if self.source.images[record]:
            return self.format.layout.lay(transforms.arrange(
                self.source.read(record), drop_caption, image_first, image_first_max_t))
        T = self.seq_len
        tokens = self.source.read_text(record, piece * (T - 1), (piece + 1) * (T - 1))
        example = self.format.layout.lay(Document((text(tokens),)))
        return example if len(example.tokens_L) <= T else without_end(example)


def without_end(example: Example) -> Example:
    """A text that goes on in its next piece: no EOS, and its last position predicts nothing."""
    mask = example.loss_mask_L[:-1].copy()
    mask[-1] = False
    return example._replace(tokens_L=example.tokens_L[:-1], image_ids_L=example.image_ids_L[:-1],
                            loss_mask_L=mask)
