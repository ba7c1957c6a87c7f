"""Held-out documents, each exactly once, source by source: the same for every run on the same data.

Nothing that a run may vary enters: captions stand first and none is dropped (of a run that knows none, where
data.caption_dropout = 1, all are), t is uniform in (0, 1], and a picture's noise is keyed by the picture's own
name (source, record, place in the record). Rows are filled first-fit in the order of the records, as many as it
takes. Another length of rows, other limits or batches
change which row a document stands in, and nothing that is drawn for it.
"""

from collections.abc import Sequence

import numpy as np

from tfusion.data import packing, pipeline, store, transforms
from tfusion.data.config import RowFormat
from tfusion.data.documents import Documents
from tfusion.data.rows import read_meta
from tfusion.data.sources import pictures
from tfusion.types import Batch, ImageBatch

NONE = transforms.picture_names(0, 0, 0)  # no pictures' names


class HeldOut:
    """The held-out documents of one source: row k as a Batch without the batch axis, padding from `len` on."""

    def __init__(self, format: RowFormat, source: str, documents: int | None = None, image_first: bool = False):
        """documents: of the first so many records alone. image_first: each picture before its caption."""
        self.format, self.image_first, self.drop = format, image_first, format.data.caption_dropout == 1
        read_meta(format)
        self.source = Documents(format, source, "heldout")
        number = len(self.source) if documents is None else min(documents, len(self.source))
        records, pieces, lengths, images = self.source.cut(np.arange(number), self.drop)
        self.num_documents = len(records)
        room, slots = (np.full(len(records), most) for most in (format.data.seq_len, format.image_slots))
        rows = packing.first_fit(lengths, images, room, slots)
        self._rows = [[] for _ in range(max(rows, default=-1) + 1)]
        for row, record, piece in zip(rows.tolist(), records.tolist(), pieces.tolist()):
            self._rows[row].append((record, piece))

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, rows: Sequence[int]) -> list[Batch]:
        """Several rows, their documents read together."""
        planned = [self._rows[row] if row < len(self) else [] for row in rows]
        documents = [document for documents in planned for document in documents]
        examples = iter(self.source.read(documents, [self.drop] * len(documents),
                                         [self.image_first] * len(documents)))
        return [self._pack(row, documents, [next(examples) for _ in documents])
                for row, documents in zip(rows, planned)]

    def __getitem__(self, row: int) -> Batch:
        return self.read([row])[0]

    def _pack(self, row: int, documents: list, examples: list) -> Batch:
        packed = packing.pack_row(row, examples, self.format)
        names = [transforms.picture_names(self.source.key, record, len(example.max_t_I))
                 for (record, _), example in zip(documents, examples)]
        used = sum(map(len, names))
        packed.noise_ids_BI2[:used], packed.noise_ids_BI2[used:] = np.concatenate([*names, NONE]), 0
        return packed

    def check(self, batch) -> None:
        packing.check_batch(batch, self.format.vocabulary)

    def batches(self, batch_size: int, local_rows: Sequence[int] | None = None):
        """Iterator over all rows, or of each batch those named; the last batch is filled with padding."""
        return pipeline.batches(self, 0, -(-len(self) // batch_size), batch_size, local_rows)


class HeldOutPictures:
    """Held-out pictures, equally many of each source, for the autoencoder: row k is one of them."""

    def __init__(self, sources: dict, image_size: int, documents: int | None = None):
        self.images = pictures(sources, "heldout", image_size, documents)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: Sequence[int]) -> list[ImageBatch]:
        return [ImageBatch(np.int32(row), self.images[row % len(self)]) for row in rows]

    def check(self, batch) -> None:
        del batch

    def batches(self, batch_size: int, local_rows: Sequence[int] | None = None):
        """Iterator over whole batches: a picture cannot be padding, so what is left over is not looked at."""
        return pipeline.batches(self, 0, max(1, len(self) // batch_size), batch_size, local_rows)


def open_heldout(format: RowFormat, documents: int | None = None) -> dict[str, HeldOut]:
    """{source: its held-out rows}, of the first `documents` records where that is given.

    A source without held-out records is named and left out.
    """
    found = {}
    for name in (name for name, source in format.data.sources.items() if source.takes_part):
        folder = store.split_folder(format.data.prepared, name, "heldout")
        if folder.is_dir() and len(held := HeldOut(format, name, documents)):
            found[name] = held
        else:
            print(f"{folder} holds no records: '{name}' is not evaluated")
    return found
