"""ArrayRecord files that were written elsewhere, pictures and all (docs/data.md).

A record is a line of `jsonl`, in which {"image": BYTES} gives a picture's length, then the pictures themselves,
as in their files, one after the other in their order.
"""

import dataclasses
import glob
import os
import re
from pathlib import Path

from tfusion import config
from tfusion.data.sources.base import Source, Unreadable, read_part
from tfusion.data.sources.files import walk, whole
from tfusion.data.sources.jsonl import parts_of
from tfusion.data.sources.shards import NONE, Chosen, Shards, count, on_side
from tfusion.errors import UserError

NUMBERED = re.compile(r"(.*?)-?(\d+)-of-(\d+)(.*)")
ARRAY_RECORD = ".array_record"


def find(path: str) -> list[str]:
    """The files of a path: itself, those below a folder, or what a pattern names; sorted. Raises UserError
    where there are none, or a number is missing of those that are numbered I-of-N."""
    if os.path.isdir(path):
        names = (file for file in walk(Path(path)) if ARRAY_RECORD in os.path.basename(file))
        files = [os.path.join(path, name) for name in names]
    else:
        files = [path] if os.path.isfile(path) else filter(os.path.isfile, glob.glob(path, recursive=True))
    files = sorted({os.path.realpath(file): file for file in files}.values())  # each once, whatever links there
    if not files:
        raise UserError(f"{path}: no such file, no folder with *{ARRAY_RECORD}* in it, and no pattern that "
                        "names some; --config.data.sources.NAME.path=PATH")
    groups = {}
    for file in files:
        folder, name = os.path.split(file)
        if numbered := NUMBERED.fullmatch(name):
            before, number, total, after = numbered.groups()
            groups.setdefault((os.path.join(folder, before), int(total), after), {})[int(number)] = file
    for (before, total, _), there in groups.items():
        if missing := sorted(set(range(total)) - set(there)):
            raise UserError(f"{before}*: {len(missing)} of {total} files are missing, the first has the number "
                            f"{missing[0]}: bring them back")
    return files


def parse(data: bytes) -> tuple[object, list]:
    """(id or None, [text or a picture's content, ...]) of a record. Raises ValueError."""
    line, _, content = data.partition(b"\n")
    name, parts = parts_of(line, image=int)
    values, at = [], 0
    for kind, value in parts:
        if kind == "text":
            values.append(value)
        else:
            if not 0 < value <= len(content) - at:
                raise ValueError(f"a picture of {value} bytes is announced, {len(content) - at} are left")
            values.append(content[at:at + value])
            at += value
    if at < len(content):
        raise ValueError(f"{len(content) - at} bytes follow the last picture that is announced")
    if not values:
        raise ValueError("it holds neither text nor picture")
    return name, values


class ArrayRecords:
    """Record i is what the i-th record of the files says."""

    def __init__(self, files: list[str], image_size: int | None):
        self.shards, self.image_size = Shards(map(count, files)), image_size

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def fingerprint(self) -> str:
        return self.shards.fingerprint

    def _record(self, record: int) -> tuple[str, list]:
        """(its key, its parts)."""
        data = self.shards[record]
        try:
            name, values = parse(data)
        except (ValueError, RecursionError) as e:
            where = "{}, record {}".format(*self.shards.place(record))
            raise Unreadable(f"{where}: {e}", "malformed record", self.shards.name(record)) from e
        return self.shards.name(record) if name is None else whole(str(name)), values

    def key(self, record: int) -> str:
        """Its id; else, or where it cannot be read, its file's name and its number there."""
        try:
            return self._record(record)[0]
        except Unreadable as e:
            return e.key

    def __getitem__(self, record: int) -> list:
        key, values = self._record(record)
        where = "{}, record {}".format(*self.shards.place(record))
        return [value if isinstance(value, str) else read_part(where, self.image_size, key, value)
                for value in values]


@config.register("source", "array_record")
@dataclasses.dataclass(frozen=True)
class ArrayRecordSource(Source):
    """ArrayRecord files; which are held out have files of their own, or are chosen by a hash."""

    path: str = config.path()  # a file, a folder, or a pattern such as pairs/train-*.array_record
    heldout_path: str = config.path(NONE)  # likewise
    heldout_fraction: float = config.fraction()  # without a heldout_path: of the records, by a hash of the id

    def check(self, name: str) -> None:
        if self.heldout_path != NONE and self.heldout_fraction:
            raise UserError(f"{name}.heldout_path = {self.heldout_path!r} and {name}.heldout_fraction = "
                            f"{self.heldout_fraction}: set one of them to '{NONE}' or 0")

    def open(self, split: str, image_size: int | None = None) -> Chosen | ArrayRecords:
        if self.heldout_path == NONE:
            source = ArrayRecords(find(self.path), image_size)
            return on_side(source, source.key, self.heldout_fraction, split)
        files = {"train": find(self.path), "heldout": find(self.heldout_path)}
        real = [{os.path.realpath(file) for file in some} for some in files.values()]
        if both := sorted(real[0] & real[1]):
            raise UserError(f"{both[0]} is held out and trained on: path = {self.path} and heldout_path = "
                            f"{self.heldout_path} must name different files")
        return ArrayRecords(files[split], image_size)
