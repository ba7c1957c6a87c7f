"""From prepared sources to batches, through Grain's step-indexed MapDataset.

Batch k of the run = rows [first + k B, first + (k + 1) B); process p reads the p-th share of them. The
position in the data is therefore one integer, the next row, for any number of processes.
"""

import functools
import hashlib
import math
import threading

import grain
import numpy as np

from tfusion.config import SLOTS_PER_IMAGE, Config
from tfusion.data import packing, prepared, transforms
from tfusion.data.documents import Documents
from tfusion.data.sources import pictures
from tfusion.errors import UserError
from tfusion.types import ImageBatch

READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
WINDOWS_KEPT = 4


def read_meta(cfg: Config) -> dict:
    """The meta of the config's prepared data. Raises UserError where their latents or their vocabulary are not
    the model's.
    """
    meta = prepared.read_meta(cfg.data.prepared)
    if meta["vocab_size"] != cfg.model.text_vocab_size:
        raise UserError(f"{cfg.data.prepared} was tokenised with {meta['vocab_size']} pieces, "
                        f"model.text_vocab_size = {cfg.model.text_vocab_size}: change it or prepare again")
    if tuple(meta["latent_shape"]) != cfg.model.latent_shape:
        raise UserError(f"{cfg.data.prepared} holds latents of shape {tuple(meta['latent_shape'])}, the model "
                        f"expects {cfg.model.latent_shape}: change model.latent_* or prepare again")
    return meta


def check_image_share(cfg: Config, shares, means, in_images) -> None:
    """Raises UserError where rows have too few image slots for sources of these mean lengths."""
    real = sum(share * images / mean for share, images, mean in zip(shares, in_images, means)) / sum(shares)
    if real > SLOTS_PER_IMAGE * cfg.data.image_share:
        raise UserError(f"{real:.1%} of the positions of data.mixture lie in images, more than "
                        f"{SLOTS_PER_IMAGE} x data.image_share = {cfg.data.image_share} gives slots for: raise "
                        f"it to {math.ceil(100 * real) / 100}")


class PackedRows:
    """Row k of the run, as a Batch without the batch axis: the mixture, planned and packed."""

    def __init__(self, cfg: Config, objective, split: str):
        data = cfg.data
        self.cfg, self.objective = cfg, objective
        self.seed = cfg.seed if split == "train" else cfg.seed + 1
        self.dropout = split == "train"
        names = sorted(name for name, share in data.mixture.items() if share > 0)  # however they are written
        meta, self.assets = read_meta(cfg), prepared.assets(data.prepared)
        self.sources = [Documents(cfg, objective, name, split) for name in names]
        self.identity = prepared.identity(meta) | {
            f"sizes.{name}": source.source.sizes_digest() for name, source in zip(names, self.sources)}
        for source in self.sources:
            if not len(source):
                raise UserError(f"{source.source.folder} holds no records: prepare some, or set "
                                f"data.mixture.{source.name} to 0")
        self._order = [grain.MapDataset.range(len(source)).seed(self.seed ^ source.key).shuffle().repeat()
                       for source in self.sources]
        means, in_images = zip(*(source.means(data.caption_dropout * self.dropout) for source in self.sources))
        if split == "train":
            check_image_share(cfg, [data.mixture[name] for name in names], means, in_images)
        self.per_window = packing.documents_per_window(
            [data.mixture[name] for name in names], means, data.window_rows, data.seq_len)
        for name, count in zip(names, self.per_window):
            if count == 0:
                raise UserError(f"data.mixture.{name} = {data.mixture[name]} is less than one document per "
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
        data = self.cfg.data
        return packing.plan_window(self.seed, window, self.offered(window), data.window_rows, data.seq_len,
                                   self.cfg.image_slots)

    def _drops(self, source: int, epoch, record):
        drops = transforms.drops_caption(self.cfg.data, self.seed, self.sources[source].key, epoch, record)
        return drops & self.dropout

    def example(self, source: int, epoch: int, record: int, piece: int):
        """One document, arranged and laid out."""
        documents = self.sources[source]
        first = transforms.puts_image_first(self.cfg.data, self.seed, documents.key, epoch, record)
        return documents.read(record, piece, bool(self._drops(source, epoch, record)), bool(first),
                              self.cfg.data.image_first_max_t)

    def __getitem__(self, row: int):
        data = self.cfg.data
        window, index = divmod(row, data.window_rows)
        with self._lock:  # one thread plans, the others wait for it
            documents = self.plan(window).rows[index]
        return packing.pack_row(row, [self.example(*d) for d in documents], data.seq_len,
                                self.cfg.image_slots, self.cfg.model.latent_shape)

    def stats(self, row: int) -> dict:
        """Of the documents of the row's window: how many found no room, how many go on with a longer text."""
        plan = self.plan(row // self.cfg.data.window_rows)
        continued = sum(piece > 0 for documents in plan.rows for *_, piece in documents)
        return {"data/dropped_documents": plan.num_dropped / plan.num_documents,
                "data/continued_documents": continued / plan.num_documents}

    def check(self, batch) -> None:
        packing.check_batch(batch, self.cfg.model.vocab_size, self.cfg.model.num_patches)


class ImageRows:
    """Row k of the run, as an ImageBatch without the batch axis: the pictures of the mixture, each as often."""

    def __init__(self, cfg: Config, objective, split: str):
        del objective
        self.assets = []
        self.images = pictures(cfg.data, split)
        self.identity = {"pictures": hashlib.sha256(self.images).hexdigest()[:16]}
        size = cfg.image_size
        if self.images.shape[1:] != (size, size, 3):
            raise UserError(f"the pictures are {self.images.shape[1]} pixels wide, model.latent_size x "
                             f"autoencoder.downsample = {size}; change one of them")
        self._order = grain.MapDataset.range(len(self.images)).seed(cfg.seed).shuffle().repeat()

    def __getitem__(self, row: int) -> ImageBatch:
        return ImageBatch(np.int32(row), self.images[self._order[row]])

    def stats(self, row: int) -> dict:
        del row
        return {}

    def check(self, batch) -> None:
        del batch  # uint8 of the size checked above


ROWS = {"transfusion": PackedRows, "autoencoder": ImageRows}


def open_rows(cfg: Config, objective, split: str):
    """The rows of a split: `rows[k]` for any k >= 0."""
    return ROWS[cfg.objective](cfg, objective, split)


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
