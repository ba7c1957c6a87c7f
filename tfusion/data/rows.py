"""Rows of training: row k of the run, whatever process asks for it and when.

A window holds a number of records of each source that follows from the shares (data/mixture.py), taken in the
source's own order (data/order.py), and is planned on lengths alone (data/packing.py). The position in the data
is therefore one integer, the next row, for any number of processes, and any row costs two packings and what it
reads.
"""

import dataclasses
import functools
import hashlib
import json
import math
import sys
import threading
from collections.abc import Sequence

import numpy as np

from tfusion import paths
from tfusion.data import mixture, packing, store, transforms
from tfusion.data.config import SLOTS_PER_IMAGE, RowFormat, shares
from tfusion.data.documents import Documents
from tfusion.data.order import Order
from tfusion.data.sources import pictures
from tfusion.data.tokenizers import load_tokenizer
from tfusion.errors import UserError
from tfusion.types import Batch, ImageBatch

ORDER = 2  # version of what decides which document stands in row k
WINDOWS_KEPT = 4
NO_DOCUMENTS = packing.Candidates(*[np.zeros(0, np.int64)] * len(packing.Candidates._fields))


def read_meta(format: RowFormat) -> dict:
    """The meta of the prepared data. Raises UserError where their images or vocabulary are not the model's, or
    their tokenizer is not the config's, as far as that is here: it may be gone, the data have a copy."""
    root, V = format.data.prepared, format.vocabulary.text_vocab_size
    meta = store.read_meta(root)
    if meta["vocab_size"] != V:
        raise UserError(f"{root} was tokenised with {meta['vocab_size']} pieces, model.text_vocab_size = {V}: "
                        "change it or prepare again")
    name = format.data.tokenizer
    if (name in ("byte", "default") or paths.path(name).is_file()) and (
            _fingerprint(name) != store.identity(meta)["tokenizer"]):
        raise UserError(f"{root} was tokenised by another tokenizer than data.tokenizer = '{name}': set it to "
                        "the one that prepared them, or prepare again")
    format.check_images(f"{root} holds", meta["image_shape"], meta["num_codes"], "prepare again")
    return meta


@functools.cache  # asked by the training rows and by each source's held-out ones; a large one takes seconds
def _fingerprint(tokenizer: str) -> str:
    return load_tokenizer(tokenizer).fingerprint


def warn_of_other_sources(meta: dict, sources: dict) -> None:
    """A line where a source's spec is no longer what was prepared: its new records wait for `prepare`."""
    for name, spec in sources.items():
        was, now = meta.get("sources", {}).get(name), dataclasses.asdict(spec)
        changed = [key for key in now if was and key != "share" and was.get(key) != now[key]]
        if spec.takes_part and changed:
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
        meta, self.assets = read_meta(format), store.assets(data.prepared)
        warn_of_other_sources(meta, data.sources)
        self.sources = [Documents(format, name, "train") for name in by_name]
        for source in self.sources:
            if not len(source):
                raise UserError(f"{source.source.folder} holds no records: prepare some, or set "
                                f"data.sources.{source.name}.share to 0")
        self.mixture = self._mixture(by_name)
        self.order = [Order([shard.records for shard in source.source.shards], seed, source.key)
                      for source in self.sources]
        self.identity = self._identity(meta, by_name)
        self._lock = threading.Lock()
        self._own = functools.lru_cache(WINDOWS_KEPT)(self._pack)
        self.plan = functools.lru_cache(WINDOWS_KEPT)(self._plan)

    def _mixture(self, by_name: dict) -> mixture.Mixture:
        data, knots = self.format.data, mixture.knots(by_name)
        means, in_images = zip(*(source.means(data.caption_dropout) for source in self.sources))
        for _, there in knots:  # in between it is no more
            check_image_share(data.image_share, there, means, in_images)
        records = [mixture.records_per_window(there, means, data.window_rows, data.seq_len)
                   for _, there in knots]
        for (name, share), counts in zip(by_name.items(), zip(*records)):
            if max(counts) < 0.5:
                raise UserError(f"data.sources.{name}.share = {share} is less than half a record per "
                                f"data.window_rows = {data.window_rows} rows: raise one of them")
        return mixture.Mixture([-(-row // data.window_rows) for row, _ in knots], records)  # never too early

    def _identity(self, meta: dict, by_name: dict) -> dict:
        """Of all that decides which document stands in row k."""
        data = self.format.data
        parts = [number for there in self.mixture.parts for number in there]
        order = [ORDER, self.seed, by_name, parts, data.caption_dropout, data.window_rows, data.seq_len,
                 self.format.image_slots, self.format.vocabulary.num_patches]
        return store.identity(meta) | {
            f"sizes.{source.name}": source.source.digest for source in self.sources} | {
            "order": hashlib.sha256(json.dumps(order).encode()).hexdigest()[:16]}

    def offered(self, window: int) -> packing.Candidates:
        """The documents of the records that a window takes of each source, with their sizes."""
        candidates = [NO_DOCUMENTS]  # a window may be offered none
        for index, (source, order, places) in enumerate(zip(self.sources, self.order,
                                                            self.mixture.taken(window))):
            if not places:
                continue
            epochs, *where = order.between(places.start, places.stop)
            records = source.number(*where)
            of, pieces, lengths, images = source.cut(records, self._drops(index, epochs, records))
            candidates.append((np.full(len(of), index), epochs[of], records[of], pieces, lengths, images))
        return packing.Candidates(*map(np.concatenate, zip(*candidates)))

    def _pack(self, window: int) -> packing.Packed:
        data = self.format.data
        return packing.pack(self.seed, window, self.offered(window), data.window_rows, data.seq_len,
                            self.format.image_slots)

    def _plan(self, window: int) -> packing.Plan:
        before = self._own(window - 1) if window else None
        return packing.plan(self.seed, window, self._own(window), before)

    def _drops(self, source: int, epoch, record):
        return transforms.drops_caption(self.format.data, self.seed, self.sources[source].key, epoch, record)

    def examples(self, documents: Sequence[tuple]) -> list:
        """Documents (source, epoch, record, piece), arranged and laid out, read together."""
        found, data = [None] * len(documents), self.format.data
        for index, source in enumerate(self.sources):
            here = [place for place, document in enumerate(documents) if document[0] == index]
            if here:
                epochs, records, pieces = np.array([documents[place][1:] for place in here], np.int64).T
                first = transforms.puts_image_first(data, self.seed, source.key, epochs, records)
                examples = source.read(list(zip(records.tolist(), pieces.tolist())),
                                       self._drops(index, epochs, records), first, data.image_first_max_t)
                for place, example in zip(here, examples):
                    found[place] = example
        return found

    def documents(self, rows: Sequence[int]) -> list[list[tuple]]:
        """Of several rows, (source, epoch, record, piece) of each document, in order."""
        with self._lock:  # one thread plans, the others wait for it
            return [self.plan(window).rows[index]
                    for window, index in (divmod(row, self.format.data.window_rows) for row in rows)]

    def read(self, rows: Sequence[int]) -> list[Batch]:
        """Several rows, their documents read together."""
        planned = self.documents(rows)
        examples = iter(self.examples([document for documents in planned for document in documents]))
        return [packing.pack_row(row, [next(examples) for _ in documents], self.format)
                for row, documents in zip(rows, planned)]

    def __getitem__(self, row: int) -> Batch:
        return self.read([row])[0]

    def stats(self, row: int) -> dict:
        """Of the row's window: the share of positions filled, how many of its documents go on with a longer
        text, and how many of the last window's found no room in either and are dropped. Of each source besides:
        how often it has been gone through up to the row, and how many of its records no row holds.
        """
        data, window = self.format.data, row // self.format.data.window_rows
        with self._lock:
            plan, before = self.plan(window), self._own(max(window - 1, 0)).offered
        continued = [piece > 0 for documents in plan.rows for *_, piece in documents]
        dropped, of, records = (np.bincount(x, minlength=len(self.sources)) for x in (
            plan.dropped, before.sources, before.sources[before.pieces == 0]))
        values = {"data/fill": plan.num_positions / (data.window_rows * data.seq_len),
                  "data/dropped_documents": dropped.sum() / max(of.sum(), 1),
                  "data/continued_documents": np.mean(continued) if continued else 0}
        given = self.mixture.taken(max(window - 1, 0))
        for index, (source, taken) in enumerate(zip(self.sources, self.taken(row + 1))):
            values[f"data/dropped_documents/{source.name}"] = dropped[index] / max(of[index], 1)
            values[f"data/left_out_records/{source.name}"] = 1 - records[index] / max(len(given[index]), 1)
            values[f"data/epochs/{source.name}"] = taken / len(source)
        return {name: float(value) for name, value in values.items()}

    def taken(self, row: float) -> list[float]:
        """Records of each source that the rows before one were offered; of its own window a part (S,)."""
        window, rest = divmod(row, self.format.data.window_rows)
        places, part = self.mixture.taken(int(window)), rest / self.format.data.window_rows
        return [each.start + part * len(each) for each in places]

    def check(self, batch) -> None:
        packing.check_batch(batch, self.format.vocabulary)


class ImageRows:
    """Row k of the run, as an ImageBatch without the batch axis: the pictures of the sources, each as often."""

    assets, where = (), "data.sources"

    def __init__(self, sources: dict, image_size: int, seed: int):
        self.images = pictures(sources, "train", image_size)
        self.identity = {"pictures": hashlib.sha256(self.images).hexdigest()[:16]}
        self._order = Order([len(self.images)], seed, 0)

    def read(self, rows: Sequence[int]) -> list[ImageBatch]:
        return [ImageBatch(np.int32(row), self.images[self._order.between(row, row + 1).records[0]])
                for row in rows]

    def __getitem__(self, row: int) -> ImageBatch:
        return self.read([row])[0]

    def stats(self, row: int) -> dict:
        del row
        return {}

    def check(self, batch) -> None:
        del batch  # uint8 of one size, as `pictures` reads them
