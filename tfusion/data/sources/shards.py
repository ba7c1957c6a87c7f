"""Records of ArrayRecord files, read where they stand."""

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from tfusion.data.readers import Readers, reader_of
from tfusion.data.sources.base import PATIENCE, Unreadable, held_out
from tfusion.data.sources.files import state
from tfusion.errors import UserError

NONE = "none"  # where a spec's name of a split, a path or a feature may be left out


class Shard(NamedTuple):
    """A range of a file's records."""

    path: str
    first: int
    records: int


def open_shard(path: str):
    """A reader. Raises UserError: of a file that is missing or cut the library's own says only that it holds
    nothing."""
    reader = reader_of(path)
    if not reader.ok():
        try:
            reader.close()
            why = "no reason given"
        except RuntimeError as e:
            why = str(e) or "no reason given"
        missing = "No such file" in why
        raise UserError(f"{path} {'is missing' if missing else f'is no whole ArrayRecord file ({why[:80]})'}: "
                        "bring it back, or write it again")
    return reader


def count(path: str) -> Shard:
    """All of a file."""
    reader = open_shard(path)
    shard = Shard(path, 0, reader.num_records())
    reader.close()
    return shard


class Shards:
    """The records of several files, one after the other, as bytes; may be asked by several threads."""

    def __init__(self, shards: Iterable[Shard]):
        self.shards = list(shards)
        self._ends = np.cumsum([shard.records for shard in self.shards], dtype=np.int64)
        self._needs = {}  # records of each file
        for path, first, records in self.shards:
            self._needs[path] = max(first + records, self._needs.get(path, 0))
        self._readers = Readers(self._open)

    def _open(self, path: str):
        reader = open_shard(path)
        if (there := reader.num_records()) < self._needs[path]:
            raise UserError(f"{path} has {there} records, {self._needs[path]} are wanted: bring it back, or "
                            "write it again")
        return reader

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of every file's name, size and time, and of what was chosen of it."""
        about = [(os.path.basename(path), state(path), *some) for path, *some in self.shards]
        return hashlib.sha256(repr(about).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.shards else 0

    def place(self, record: int) -> tuple[str, int]:
        """(file, number of the record in it)."""
        if not 0 <= record < len(self):
            raise IndexError(record)
        shard = int(np.searchsorted(self._ends, record, side="right"))
        path, first, records = self.shards[shard]
        return path, first + record - int(self._ends[shard]) + records

    def name(self, record: int) -> str:
        """What a record is called that has no key of its own."""
        path, number = self.place(record)
        return f"{os.path.basename(path)}:{number}"

    def __getitem__(self, record: int) -> bytes:
        path, number = self.place(record)
        try:
            return self._readers.read(path, [number])[0]
        except RuntimeError as e:
            raise Unreadable(f"{path}, record {number}: {str(e)[:120]}", "damaged record",
                             self.name(record)) from e


class Chosen:
    """Some records of an opened source."""

    def __init__(self, source, records: Sequence[int]):
        self.source, self.records = source, records

    @property
    def fingerprint(self) -> str:
        """The source's, and of which records were chosen."""
        some = self.records
        chosen = repr(some).encode() if isinstance(some, range) else np.asarray(some, np.int64).tobytes()
        return hashlib.sha256(self.source.fingerprint.encode() + chosen).hexdigest()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, record: int) -> list:
        return self.source[int(self.records[record])]


def on_side(source, key: Callable[[int], str], fraction: float, split: str) -> Chosen:
    """The records of `source` that are in 'train' or 'heldout', by a hash of each one's key. Asks for no key
    where the fraction is 0."""
    if not fraction:
        return Chosen(source, range(len(source) if split == "train" else 0))
    keys = map(key, tqdm(range(len(source)), "keys", unit="record", leave=False, delay=PATIENCE))
    return Chosen(source, np.flatnonzero(held_out(keys, fraction) == (split == "heldout")))


def check_apart(name: str, train: list[Shard], heldout: list[Shard]) -> None:
    """Raises UserError where a record is in both."""
    ranges = {}
    for path, first, records in train:
        ranges.setdefault(path, []).append((first, first + records))
    for path, first, records in heldout:
        if any(first < stop and start < first + records for start, stop in ranges.get(path, [])):
            raise UserError(f"{name}: records of {path} are held out and trained on")
