"""From prepared sources to batches, through Grain's step-indexed MapDataset.

Batch k of the run = rows [first + k B, first + (k + 1) B); process p reads the p-th share of them. The
position in the data is therefore one integer, the next row, for any number of processes.
"""

import functools
import threading
import zlib

import grain
import numpy as np

from tfusion.config import Config
from tfusion.data import packing, prepared, transforms
from tfusion.data.prepared import PreparedSource
from tfusion.data.sources import pictures
from tfusion.errors import UserError
from tfusion.types import ImageBatch

READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
WINDOWS_KEPT = 4
MEAN_SAMPLE = 65_536  # records from which a source's mean length is taken


class PackedRows:
    """Row k of the run, as a Batch without the batch axis: the mixture, planned and packed."""

    def __init__(self, cfg: Config, objective, split: str):
        data = cfg.data
        self.cfg, self.objective = cfg, objective
        self.seed = cfg.seed if split == "train" else cfg.seed + 1
        self.dropout = split == "train"
        names = [name for name, share in data.mixture.items() if share > 0]
        meta = prepared.read_meta(data.prepared)
        if tuple(meta["latent_shape"]) != cfg.model.latent_shape:
            raise UserError(f"{data.prepared} holds latents of shape {tuple(meta['latent_shape'])}, the "
                             f"model expects {cfg.model.latent_shape}: change model.latent_* or prepare again")
        self.identity = prepared.identity(meta)
        self.sources = [PreparedSource(data.prepared, name, split) for name in names]
        self._keys = [zlib.crc32(name.encode()) for name in names]  # the source's, whatever stands beside it
        self._order = [grain.MapDataset.range(len(source)).seed(self.seed ^ key).shuffle().repeat()
                       for key, source in zip(self._keys, self.sources)]
        self._check()
        means = [self._mean_length(source) for source in self.sources]
        self.per_window = packing.documents_per_window(
            [data.mixture[name] for name in names], means, data.window_rows, data.seq_len)
        for name, count in zip(names, self.per_window):
            if count == 0:
                raise UserError(f"data.mixture.{name} = {data.mixture[name]} is less than one document per "
                                f"data.window_rows = {data.window_rows} rows: raise one of them")
        self._lock = threading.Lock()
        self.plan = functools.lru_cache(WINDOWS_KEPT)(self._plan)

    def _mean_length(self, source) -> float:
        """Mean positions of a document as it is packed: captions dropped, long texts cut; over a sample."""
        some = slice(None, None, max(1, len(source) // MEAN_SAMPLE))
        text, images = source.text_tokens[some], source.images[some]
        keep = 1 - self.cfg.data.caption_dropout * self.dropout
        whole = np.minimum(self.objective.length(text, images), self.cfg.data.seq_len)
        return float(np.where(images > 0, self.objective.length(keep * text, images), whole).mean())

    def _check(self) -> None:
        data = self.cfg.data
        for source in self.sources:
            if source.meta["max_token_id"] >= self.cfg.model.text_vocab_size:
                raise UserError(
                    f"{source.folder}: token id {source.meta['max_token_id']} is not below "
                    f"model.text_vocab_size = {self.cfg.model.text_vocab_size}; was it prepared with "
                    "another tokenizer?")
            lengths = self.objective.length(source.text_tokens, source.images)
            bad = (source.images > 0) & ((lengths > data.seq_len) | (source.images > data.max_images))
            if bad.any():
                record = int(np.argmax(bad))
                raise UserError(
                    f"{source.folder}: record {record} has {source.images[record]} images and needs "
                    f"{lengths[record]} positions; data.seq_len = {data.seq_len}, data.max_images = "
                    f"{data.max_images} (a document with images is never cut)")

    def _plan(self, window: int) -> packing.Plan:
        candidates = []
        for index, (source, count) in enumerate(zip(self.sources, self.per_window)):
            places = range(window * count, (window + 1) * count)
            records = np.array([self._order[index][place] for place in places], np.int64)
            epochs = np.asarray(places, np.int64) // len(source)
            images = np.asarray(source.images[records])
            text = np.where(self._drops(index, epochs, records) & (images > 0), 0,
                            source.text_tokens[records])
            candidates.append(packing.Candidate(epochs, records, self.objective.length(text, images), images))
        data = self.cfg.data
        return packing.plan_window(self.seed, window, candidates, data.window_rows, data.seq_len,
                                   data.max_images)

    def _drops(self, source: int, epoch, record):
        drops = transforms.drops_caption(self.cfg.data, self.seed, self._keys[source], epoch, record)
        return drops & self.dropout

    def example(self, source: int, epoch: int, record: int):
        """One document, arranged and laid out."""
        first = transforms.puts_image_first(self.cfg.data, self.seed, self._keys[source], epoch, record)
        document = transforms.arrange(
            self.sources[source].read(record), bool(self._drops(source, epoch, record)), bool(first),
            self.cfg.data.image_first_max_t)
        return packing.cut_text(self.objective.layout(document), self.cfg.data.seq_len)

    def __getitem__(self, row: int):
        data = self.cfg.data
        window, index = divmod(row, data.window_rows)
        with self._lock:  # one thread plans, the others wait for it
            documents = self.plan(window).rows[index]
        return packing.pack_row(row, [self.example(*d) for d in documents], data.seq_len,
                                data.max_images, self.cfg.model.latent_shape)

    def stats(self, row: int) -> dict:
        """What the plan of the row's window left out."""
        plan = self.plan(row // self.cfg.data.window_rows)
        return {"data/dropped_documents": plan.num_dropped / plan.num_documents,
                "data/cut_documents": plan.num_cut / plan.num_documents}

    def check(self, batch) -> None:
        packing.check_batch(batch, self.cfg.model.vocab_size, self.cfg.model.num_patches)


class ImageRows:
    """Row k of the run, as an ImageBatch without the batch axis: the pictures of the mixture, each as often."""

    def __init__(self, cfg: Config, objective, split: str):
        del objective
        self.identity = {}
        self.images = pictures(cfg.data, split)
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
