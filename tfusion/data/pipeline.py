"""From prepared sources to batches, through Grain's step-indexed MapDataset.

Batch k of the run = rows [first + k B, first + (k + 1) B); process p reads the p-th share of them. The
position in the data is therefore one integer, the next row, for any number of processes.
"""

import dataclasses
import functools
import hashlib
import math
import sys
import threading

import grain
import numpy as np

from tfusion.data import packing, prepared, transforms
from tfusion.data.config import SLOTS_PER_IMAGE, RowFormat, shares
from tfusion.data.documents import Documents
from tfusion.data.sources import pictures
from tfusion.errors import UserError
from tfusion.types import ImageBatch

READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
WINDOWS_KEPT = 4


def read_meta(format: RowFormat) -> dict:
    """The meta of the prepared data. Raises UserError where their latents or their vocabulary are not the
    model's.
    """
    root, V = format.data.prepared, format.vocabulary.text_vocab_size
    meta = prepared.read_meta(root)
    if meta["vocab_size"] != V:
        raise UserError(f"{root} was tokenised with {meta['vocab_size']} pieces, model.text_vocab_size = {V}: "
                        "change it or prepare again")
    if tuple(meta["latent_shape"]) != format.image_shape:
        raise UserError(f"{root} holds latents of shape {tuple(meta['latent_shape'])}, the model expects "
                        f"{format.image_shape}: change model.adapter.latent_* or prepare again")
    return meta


def warn_of_other_sources(meta: dict, sources: dict) -> None:
    """A line where a source's spec is no longer what was prepared: its new records wait for `prepare`."""
    for name, spec in sources.items():
        was, now = meta.get("sources", {}).get(name), dataclasses.asdict(spec)
        changed = [key for key in now if was and key != "share" and was.get(key) != now[key]]
        if spec.share > 0 and changed:
            print(f"warning: data.sources.{name} was prepared with " + ", ".join(
                f"{key} = {was.get(key)}, the config has {now[key]}" for key in changed)
                + ": training takes what was prepared; `prepare` again for the other", file=sys.stderr)


def check_image_share(image_share: float, shares, means, in_images) -> None:
    """Raises UserError where rows have too few image slots for sources of these mean lengths."""
    real = sum(share * images / mean for share, images, mean in zip(shares, in_images, means)) / sum(shares)
    if real > SLOTS_PER_IMAGE * image_share:
        raise UserError(f"{real:.1%} of the positions of data.sources lie in images, more than "
                        f"{SLOTS_PER_IMAGE} x data.image_share = {image_share} gives slots for: raise "
                        f"it to {math.ceil(100 * real) / 100}")


class PackedRows:
    """Row k of the run, as a Batch without the batch axis: the sources, planned and packed."""

    def __init__(self, format: RowFormat, seed: int):
        data, by_name = format.data, shares(format.data.sources)
        self.format, self.seed, self.where = format, seed, data.prepared
        meta, self.assets = read_meta(format), prepared.assets(data.prepared)
        warn_of_other_sources(meta, data.sources)
        self.sources = [Documents(format, name, "train") for name in by_name]
        self.identity = prepared.identity(meta) | {
            f"sizes.{source.name}": source.source.sizes_digest() for source in self.sources}
        for source in self.sources:
            if not len(source):
                raise UserError(f"{source.source.folder} holds no records: prepare some, or set "
                                f"data.sources.{source.name}.share to 0")
        self._order = [grain.MapDataset.range(len(source)).seed(seed ^ source.key).shuffle().repeat()
                       for source in self.sources]
        means, in_images = zip(*(source.means(data.caption_dropout) for source in self.sources))
        check_image_share(data.image_share, by_name.values(), means, in_images)
        self.per_window = packing.documents_per_window(by_name.values(), means, data.window_rows, data.seq_len)
        for (name, share), count in zip(by_name.items(), self.per_window):
            if count == 0:
                raise UserError(f"data.sources.{name}.share = {share} is less than one document per "
                                f"data.window_rows = {data.window_rows} rows: raise one of them")
        self._lock = threading.Lock()
        self.plan = functools.lru_cache(WINDOWS_KEPT)(self._plan)

    def offered(self, window: int) -> list[packing.Candidate]:
        """The documents of each source that a window is offered, with their sizes."""
        candidates = []
        for index, (source, count) in enumerate(zip(self.sources, self.per_window)):
            places = range(window * count, (window + 1) * count)
            records, pieces = source.locate([self._order[index][place] for place in places])
            epochs = np.asarray(places, np.int64) // len(source)
            lengths = source.lengths(records, pieces, self._drops(index, epochs, records))
            candidates.append(packing.Candidate(epochs, records, pieces, lengths, source.images(records)))
        return candidates

    def _plan(self, window: int) -> packing.Plan:
        data = self.format.data
        return packing.plan_window(self.seed, window, self.offered(window), data.window_rows, data.seq_len,
                                   self.format.image_slots)

    def _drops(self, source: int, epoch, record):
        return transforms.drops_caption(self.format.data, self.seed, self.sources[source].key, epoch, record)

    def example(self, source: int, epoch: int, record: int, piece: int):
        """One document, arranged and laid out."""
        documents, data = self.sources[source], self.format.data
        first = transforms.puts_image_first(data, self.seed, documents.key, epoch, record)
        return documents.read(record, piece, bool(self._drops(source, epoch, record)), bool(first),
                              data.image_first_max_t)

    def __getitem__(self, row: int):
        window, index = divmod(row, self.format.data.window_rows)
        with self._lock:  # one thread plans, the others wait for it
            documents = self.plan(window).rows[index]
        return packing.pack_row(row, [self.example(*d) for d in documents], self.format)

    def stats(self, row: int) -> dict:
        """Of the row's window: the share of positions filled; of its documents, how many found no room and how
        many go on with a longer text."""
        data, plan = self.format.data, self.plan(row // self.format.data.window_rows)
        continued = sum(piece > 0 for documents in plan.rows for *_, piece in documents)
        return {"data/fill": plan.num_positions / (data.window_rows * data.seq_len),
                "data/dropped_documents": plan.num_dropped / plan.num_documents,
                "data/continued_documents": continued / plan.num_documents}

    def check(self, batch) -> None:
        packing.check_batch(batch, self.format.vocabulary)


class ImageRows:
    """Row k of the run, as an ImageBatch without the batch axis: the pictures of the sources, each as often."""

    assets, where = (), "data.sources"

    def __init__(self, sources: dict, image_size: int, seed: int):
        self.images = pictures(sources, "train", image_size)
        self.identity = {"pictures": hashlib.sha256(self.images).hexdigest()[:16]}
        self._order = grain.MapDataset.range(len(self.images)).seed(seed).shuffle().repeat()

    def __getitem__(self, row: int) -> ImageBatch:
        return ImageBatch(np.int32(row), self.images[self._order[row]])

    def stats(self, row: int) -> dict:
        del row
        return {}

    def check(self, batch) -> None:
        del batch  # uint8 of one size, as `pictures` reads them


def batches(rows, first_row: int, num_batches: int, batch_size: int, process: int = 0,
            num_processes: int = 1):
    """Iterator over this process's share of `num_batches` global batches from row `first_row` on."""
    local = batch_size // num_processes

    def batch(k: int):
        start = first_row + k * batch_size + process * local
        out = packing.stack_rows([rows[row] for row in range(start, start + local)])
        rows.check(out)
        return out

    return iter(grain.MapDataset.range(num_batches).map(batch).to_iter_dataset(READ))
