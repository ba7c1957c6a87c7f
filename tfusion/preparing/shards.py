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
from tfusion.data.sources.base import Opened, Unreadable, attempts
from tfusion.errors import UserError
from tfusion.types import Part

RECORDS = 4096  # of the source per shard
PICTURES = 256  # encoded at once
TEXTS = 1024  # records that wait to be tokenised at once
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
            contextlib.closing(attempts(job.opened, job.records)) as read:
        for parts in encoded(_usable(read, job, writer, advance), encoders):
            writer.add(parts)


def _usable(read: Iterable, job: Job, writer: store.Writer, advance: Callable) -> Iterator[list]:
    """The records that can be used, without their blank texts; the others are counted."""
    for number, record in zip(job.records, read):
        advance(1)
        if isinstance(record, Unreadable):
            writer.skip(record.reason, record.key or f"record {number}")
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
    wait for theirs."""
    waiting, pictures, images = collections.deque(), [], collections.deque()

    def ready() -> Iterator[list[Part]]:
        """Those that wait no longer, tokenised at once."""
        some, number = [], len(images)
        while waiting and (needs := _pictures(waiting[0])) <= number:
            some.append(waiting.popleft())
            number -= needs
        ids = iter(encoders.text([part for record in some for part in record if isinstance(part, str)]))
        for record in some:
            yield [layout.text(next(ids)) if isinstance(part, str) else layout.image(images.popleft())
                   for part in record]

    for record in records:
        waiting.append(record)
        pictures += [part for part in record if not isinstance(part, str)]
        if len(pictures) >= PICTURES or len(waiting) >= TEXTS:
            while len(pictures) >= PICTURES:
                images.extend(_encode(pictures[:PICTURES], encoders))
                del pictures[:PICTURES]
            yield from ready()
    if pictures:
        images.extend(_encode(pictures, encoders))
    yield from ready()


def _pictures(record: list) -> int:
    return sum(not isinstance(part, str) for part in record)


def _encode(pictures: list, encoders: Encoders):
    if encoders.images is None:
        raise UserError(NO_CODEC)
    sizes = sorted({picture.shape for picture in pictures})
    if len(sizes) > 1:
        raise UserError(f"pictures of {sizes[0]} and {sizes[-1]} in one source: bring all to one size")
    images = np.asarray(encoders.images(np.stack(pictures)))
    if len(images) != len(pictures):
        raise UserError(f"the encoder made {images.shape} of {len(pictures)} pictures")
    return images
