"""What a source is, which of its records are held out, and how they are read: the same for every kind."""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from tqdm import tqdm

from tfusion import config
from tfusion.data.pictures import read_picture
from tfusion.errors import UserError

READERS = 4  # threads; decoding a picture leaves the others running
AT_ONCE, AHEAD = 8, 8  # records that a thread reads at once, and how often that may be ahead
NAMED = 3  # unreadable records that are named; of more, the number
PATIENCE = 3  # seconds before a progress bar shows
DRAWN = 2**18  # records of a source, at most, that a number of pictures is drawn from
KEPT = "heldout_fraction"  # of kinds that split by keys
WITHOUT = 4096  # records in a row without a picture, after which the others are taken to have none


class Unreadable(UserError):
    """One record cannot be used; those beside it may be well. reason: what kind of fault it is, in a word or
    two, for counting. key: what the record is called."""

    def __init__(self, message: str, reason: str = "unreadable", key: str = ""):
        super().__init__(message)
        self.reason, self.key = reason, key


def read_part(path, size: int | None, key: str, content: bytes | None = None) -> np.ndarray:
    """A record's picture (`read_picture`). Raises Unreadable where it cannot be read."""
    try:
        return read_picture(path, size, content)
    except UserError as e:
        of_file = isinstance(e.__cause__, OSError) and e.__cause__.strerror  # not of what is in it
        missing = isinstance(e.__cause__, FileNotFoundError)
        fault = "missing" if missing else "unreadable" if of_file else "damaged"
        raise Unreadable(str(e), f"{fault} picture", key) from e


class NoPictures(UserError):
    """A split has none."""


class Opened(Protocol):
    """One split of a source: a list whose records are read when they are asked for. So any worker can take any
    range of them, all shards are of one size whatever the files are, and threads can read ahead. Only where a
    record stands is kept: of ArrayRecord nothing, of a line some bytes, of a file its name (docs/data.md).

    `source[i]` may be asked by several threads, and raises Unreadable where the record is damaged. One that
    can tell, without reading its records, when they have changed, has it told by an attribute `fingerprint`, a
    text; of others `prepare` looks at a few records."""

    def __len__(self) -> int: ...

    def __getitem__(self, record: int) -> list: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """What every source in data.sources says of itself; a kind adds what it needs."""

    kind: str
    share: float = config.scheduled()  # of the positions, relative to the other sources' shares; 0: left out

    @property
    def takes_part(self) -> bool:
        """Whether it ever has a share."""
        return any(share for _, share in self.share) if isinstance(self.share, tuple) else self.share > 0

    def open(self, split: str, image_size: int | None = None) -> Opened:
        """split: 'train' or 'heldout'. image_size: side of the pictures in pixels; None: as they are stored.

        Raises UserError where what the spec names is not there or is broken as a whole.
        """
        raise NotImplementedError


def held_out(keys: Iterable[str], fraction: float) -> np.ndarray:
    """bool (n,): which records are held out, by a hash of each one's key and nothing else, so that a record
    stays on its side when others come or go. Records of one key stay together.

    Of two keys and more, one at least is on either side (none is held out where fraction is 0).
    """
    digests = (hashlib.md5(key.encode(errors="surrogateescape"), usedforsecurity=False) for key in keys)
    draws = np.fromiter((int.from_bytes(digest.digest()[:8]) for digest in digests), np.float64) / 2.0**64
    held = draws < fraction
    if fraction > 0 and len(draws):
        if not held.any() and draws.min() < draws.max():
            held = draws == draws.min()
        elif held.all():
            held = draws < draws.max()
    return held


def _attempt(source: Opened, order: list[int]) -> list:
    """The records, and for those that cannot be read why."""
    read = []
    for record in order:
        try:
            read.append(source[int(record)])
        except Unreadable as e:
            read.append(e)
    return read


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)  # between the bars, not into them


@dataclasses.dataclass
class Tally:
    """What came of reading."""

    read: int = 0
    alone: int = 0  # of those read: pictures without text
    unreadable: list = dataclasses.field(default_factory=list)  # why

    def tell(self, title: str, needed: bool = True) -> None:
        """Names what was left out on stderr. Raises UserError where that is all there was, and it is needed."""
        damaged = len(self.unreadable)
        if damaged and needed and not self.read:
            raise UserError(f"{title}: none of {damaged} records can be read. The first: {self.unreadable[0]}")
        if damaged:
            more = [f"and {damaged - NAMED} more"] * (damaged > NAMED)
            of = f"{damaged} of {damaged + self.read}"
            head = f"warning: {title}: {of} records cannot be read and are left out:"
            _say("\n  ".join([head, *map(str, self.unreadable[:NAMED]), *more]))


def attempts(source: Opened, order: Iterable[int], ahead: int = AHEAD) -> Iterator[list | Unreadable]:
    """The records of `order`, or why one cannot be read, read by a few threads, AT_ONCE times `ahead` of them
    at most before they are asked for."""
    order, reading = iter(order), collections.deque()
    pool = ThreadPoolExecutor(READERS)
    try:
        while True:
            while len(reading) < ahead and (some := list(itertools.islice(order, AT_ONCE))):
                reading.append(pool.submit(_attempt, source, some))
            if not reading:
                return
            yield from reading.popleft().result()
    finally:  # also where the reader stops early
        pool.shutdown(cancel_futures=True)


def _read(source: Opened, order: Iterable[int], tally: Tally) -> Iterator[list]:
    """The records of `order` but for those that are Unreadable."""
    with contextlib.closing(attempts(source, order)) as read:
        for record in read:
            if isinstance(record, Unreadable):
                tally.unreadable.append(record)
            else:
                tally.read += 1
                tally.alone += not any(isinstance(part, str) for part in record)
                yield record


def records(source: Opened, title: str, needed: bool = True) -> Iterator[list]:
    """All records in their order, but those that are Unreadable: these are counted and named on stderr at the
    end, and so is how many records are pictures without a word. Raises UserError where none can be read, if
    they are needed.
    """
    tally = Tally()
    yield from _read(source, range(len(source)), tally)
    tally.tell(title, needed)
    if tally.alone:
        _say(f"{title}: {tally.alone} of {tally.read} records are pictures without text, learnt as such")


def drawn(records: int) -> np.ndarray:
    """Places of a source in random order: all, or DRAWN of more, one of each of so many equal parts."""
    rng = np.random.default_rng(0)
    if records <= DRAWN:
        return rng.permutation(records)
    return rng.permutation(np.arange(DRAWN) * records // DRAWN + rng.integers(records // DRAWN, size=DRAWN))


def _pictures(records: Iterable[list], without: int | None) -> Iterator[np.ndarray]:
    """Of some records, until so many in a row have none."""
    since = 0
    for record in records:
        some = [part for part in record if not isinstance(part, str)]
        yield from some
        since = 0 if some else since + 1
        if since == without:
            return


def pictures(sources: dict[str, Source], split: str, image_size: int,
             limit: int | None = None) -> np.ndarray:
    """uint8 (n, H, W, 3): the pictures of every source that has a share, and pictures.

    All, as they are stored; with a limit at most so many, equally many of each source as far as it has them,
    drawn from all of it, without reading on in one that seems to have none. Raises UserError where there are
    none, or of another size.
    """
    found = {}
    for name, spec in sources.items():
        if spec.takes_part:
            source, tally = spec.open(split, image_size), Tally()
            order = range(len(source)) if limit is None else drawn(len(source))
            with contextlib.closing(_read(source, order, tally)) as read:
                shown = tqdm(read, f"pictures of {name}", len(source), unit="record", leave=False,
                             delay=PATIENCE)
                found[name] = list(itertools.islice(_pictures(shown, limit and WITHOUT), limit))
                shown.close()
            tally.tell(f"{name}/{split}", needed=split == "train")
    found = {name: some for name, some in found.items() if some}
    if not found:
        then, own = "give a share to one that does", [name for name in sources if hasattr(sources[name], KEPT)]
        if split == "heldout" and own:
            then = f"hold out more: --config.data.sources.{own[0]}.{KEPT}=0.1"
        raise NoPictures(f"data.sources = {', '.join(sources)}: none of these has pictures in its {split} "
                         f"split that can be read; {then}")
    each = None if limit is None else max(1, limit // len(found))
    chosen = [picture for some in found.values() for picture in some[:each]]
    sizes = sorted({picture.shape for picture in chosen})
    if sizes != [(image_size, image_size, 3)]:
        raise UserError(f"the pictures of {', '.join(found)} are {sizes[0][0]} to {sizes[-1][0]} pixels high, "
                        f"{image_size} are wanted: bring them to that size")
    return np.stack(chosen)
