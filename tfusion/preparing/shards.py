"""A shard: a fixed range of a source's records, read, tokenised and encoded, in bounded memory.

What is in a shard, and in which batches its pictures were encoded, follows from the source alone. So any
process makes the same bytes of it.
"""

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from tfusion.data import layout, store
from tfusion.data.sources.base import AT_ONCE, Opened, Unreadable, attempts
from tfusion.data.sources.files import whole
from tfusion.errors import UserError
from tfusion.types import Part

RECORDS = 4096  # of the source per shard
PICTURES = 256  # encoded at once
AHEAD = PICTURES // AT_ONCE  # as many records are read while a batch is encoded
TEXTS, LETTERS = 1024, 2**22  # records that wait to be tokenised at once, at most; letters of them
NO_CODEC = "data.sources names a source with pictures: --codec=WORKDIR is needed to encode them"


class Encoders(NamedTuple):
    text: Callable  # list[str] -> list of id lists
    images: Callable | None  # uint8 (n, H, W, 3) -> (n, *shape); None: sources with pictures are refused


class Job(NamedTuple):
    """One shard to write: records [shard * size, (shard + 1) * size) of what was opened."""

    source: str
    split: str
    shard: int
    opened: Opened
    size: int  # records of the source in a full shard

    @property
    def records(self) -> range:
        return range(self.shard * self.size, min((self.shard + 1) * self.size, len(self.opened)))


def jobs(sources: dict, size: int) -> list[Job]:
    """All shards of {(source, split): opened}; a split without records has one, which says so."""
    return [Job(name, split, shard, opened, size) for (name, split), opened in sources.items()
            for shard in range(max(1, -(-len(opened) // size)))]


def write(root, job: Job, encoders: Encoders, advance: Callable[[int], None] = lambda records: None) -> None:
    """Writes a shard. advance: is told how many records more are done.

    Raises UserError where the source is broken, or a record holds something else than texts and pictures;
    records that are Unreadable, or empty, are skipped and counted in the ledger.
    """
    with store.Writer(root, job.source, job.split, job.shard) as writer, \
            contextlib.closing(attempts(job.opened, job.records, AHEAD)) as read:
        for parts in encoded(_usable(read, job, writer, advance), encoders):
            writer.add(parts)


def _usable(read: Iterable, job: Job, writer: store.Writer, advance: Callable) -> Iterator[list]:
    """The records that can be used, without their blank texts; the others are counted."""
    for number, record in zip(job.records, read, strict=True):
        advance(1)
        if isinstance(record, Unreadable):
            writer.skip(record.reason, whole(record.key) or f"record {number}")
            continue
        for part in record:
            _check(part, f"{job.source}/{job.split}, record {number}")
        record = [part for part in record if not isinstance(part, str) or part.strip()]
        if not record:
            writer.skip("empty", f"record {number}")
            continue
        yield record


def _check(part, where: str) -> None:
    if isinstance(part, str):
        return
    kind, shape = getattr(part, "dtype", type(part).__name__), getattr(part, "shape", "")
    if kind != np.uint8 or len(shape) != 3 or shape[2] != 3:
        raise UserError(f"{where}: a part is {kind} {shape}; a text is a str, a picture uint8 (H, W, 3) with "
                        "values 0 to 255")


def encoded(records: Iterable[list], encoders: Encoders) -> Iterator[list[Part]]:
    """The records as ids and encoded images. Pictures are encoded PICTURES at a time, across records; records
    wait for theirs, at most to the shard's end. Texts are tokenised about LETTERS at a time: their ids take
    several times the memory."""
    waiting, batch, images = collections.deque(), _Pictures(encoders), collections.deque()
    letters = 0  # since `ready` was last asked

    def ready() -> Iterator[list[Part]]:
        """Those that wait no longer."""
        some, number, long = [], len(images), 0
        while waiting and (needs := waiting[0].count(None)) <= number:
            some.append(waiting.popleft())
            number, long = number - needs, long + _letters(some[-1])
            if long >= LETTERS:
                yield from tokenised(some)
                some, long = [], 0
        yield from tokenised(some)

    def tokenised(some: list) -> Iterator[list[Part]]:
        ids = iter(encoders.text([text for record in some for text in record if text is not None]))
        for record in some:
            yield [layout.image(images.popleft()) if text is None else layout.text(next(ids))
                   for text in record]

    for record in records:
        for part in record:
            if not isinstance(part, str):
                images.extend(batch.add(part))
        waiting.append([part if isinstance(part, str) else None for part in record])
        letters += _letters(waiting[-1])
        if len(images) >= PICTURES or len(waiting) >= TEXTS or letters >= LETTERS:
            yield from ready()
            letters = 0
    images.extend(batch.encode())
    yield from ready()


def _letters(record: list) -> int:
    return sum(len(text) for text in record if text is not None)


class _Pictures:
    """Those that wait to be encoded, in one array that is filled again and again: fresh memory costs more than
    decoding does."""

    def __init__(self, encoders: Encoders):
        self._encode, self._filled, self._array = encoders.images, 0, None

    def add(self, picture):
        """The encoded batch where this picture fills it, else nothing."""
        if self._encode is None:
            raise UserError(NO_CODEC)
        if self._array is None:
            self._array = np.empty((PICTURES, *picture.shape), np.uint8)
        if picture.shape != self._array.shape[1:]:
            raise UserError(f"pictures of {self._array.shape[1:]} and {picture.shape} in one source: bring all "
                            "to one size")
        self._array[self._filled] = picture
        self._filled += 1
        return self.encode() if self._filled == PICTURES else ()

    def encode(self):
        number, self._filled = self._filled, 0
        if not number:
            return ()
        images = np.asarray(self._encode(self._array[:number]))
        if len(images) != number:
            raise UserError(f"the encoder made {images.shape} of {number} pictures")
        return images
