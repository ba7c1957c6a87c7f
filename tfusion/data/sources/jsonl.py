"""Lines of JSON: texts, or texts and pictures in their order (docs/data.md)."""

import array
import dataclasses
import functools
import glob
import gzip
import hashlib
import json
import os
import tempfile
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tfusion import config
from tfusion.data.sources.base import PATIENCE, Source, Unreadable, held_out, read_part
from tfusion.data.sources.files import inside, state, walk, whole
from tfusion.errors import UserError

ENDINGS = (".jsonl", ".jsonl.gz")
BOM = b"\xef\xbb\xbf"
FORMS = '"a text", {"text": ...} or {"segments": [{"text": ...} or {"image": PATH}, ...]}'


def find(path: str) -> list[Path]:
    """The files of a path: itself, those below a folder, or what a pattern names; sorted."""
    if os.path.isdir(path):
        files = [Path(path, file) for file in walk(Path(path)) if file.endswith(ENDINGS)]
    else:
        files = [Path(path)] if os.path.isfile(path) else map(Path, glob.glob(path, recursive=True))
        files = [file for file in files if file.is_file()]
    unique = {os.path.realpath(file): file for file in sorted(files, key=lambda f: (-len(f.parts), f))}
    if not files:
        raise UserError(f"{path}: no such file, no folder with {' or '.join(ENDINGS)} in it, and no pattern "
                        "that names some; --config.data.sources.NAME.path=PATH")
    return sorted(unique.values())  # each once, whatever links lead to it


def parts_of(line: bytes, image: type = str) -> tuple[object, list[tuple[str, object]]]:
    """(id or None, [('text' | 'image', value), ...]) of a line; blank texts are no parts. Raises ValueError.

    image: what names a picture: str, its path, or int, its number of bytes.
    """
    wanted = FORMS if image is str else FORMS.replace("PATH", "BYTES")
    tree = json.loads(line.decode())  # else json guesses, and takes UTF-16 too
    tree = {"text": tree} if isinstance(tree, str) else tree
    if not isinstance(tree, dict):
        raise ValueError(f"{wanted} is wanted")
    forms = tree.keys() & {"text", "segments"}
    if len(forms) != 1:
        raise ValueError(f"{wanted} is wanted, it has {', '.join(tree) or 'no keys'}")
    segments = tree["segments"] if "segments" in forms else [{"text": tree["text"]}]
    if not isinstance(segments, list):
        raise ValueError('"segments" must be a list')
    parts = []
    for segment in segments:
        alone = isinstance(segment, dict) and len(segment) == 1
        kind, value = next(iter(segment.items())) if alone else ("", "")
        if type(value) is not {"text": str, "image": image}.get(kind):
            names = '{"text": "..."} nor {"image": ' + ('"PATH"}' if image is str else "BYTES}")
            raise ValueError(f"{json.dumps(segment)[:80]} is neither {names}")
        blank = isinstance(value, str) and not value.strip()
        if kind == "image":
            if blank:
                raise ValueError("an image's path is blank")
            parts.append((kind, whole(value) if image is str else value))
        elif not blank:
            parts.append((kind, whole(value)))
    return tree.get("id"), parts


def _record(line: bytes, where: str) -> tuple[object, list[tuple[str, str]]]:
    try:
        return parts_of(line)
    except (ValueError, RecursionError) as e:
        why = f"{e.msg} at column {e.pos + 1}" if isinstance(e, json.JSONDecodeError) else e
        raise UserError(f"{where}: {why}") from e


def _blocks(path: Path) -> Iterator[bytes]:
    """The lines of a file, unpacked."""
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            yield from file
    except (EOFError, zlib.error, OSError) as e:
        raise UserError(f"{path} cannot be read: {getattr(e, 'strerror', None) or e}") from e


class Jsonl:
    """Record i is what its line says. Of the lines only their places are kept; those of packed files are read
    from an unpacked copy, a file without a name that goes when this does.
    """

    def __init__(self, files: list[Path], image_size: int | None, root: Path | None = None):
        """root: the folder that pictures must lie in; None: each file's own."""
        self.files, self.image_size, self.root = files, image_size, root
        self._unpacked = tempfile.TemporaryFile()  # noqa: SIM115
        self._places = array.array("q")  # (n, 2): from and to which byte
        self._pictures = False  # whether any line names one
        self._ends = np.zeros(len(files), np.int64)  # how many records there are up to each file's last
        weakref.finalize(self, self._unpacked.close)

    def scan(self) -> Iterator[str]:
        """Finds every record and checks it; yields their keys. Blank lines and lines of no text are none."""
        size = sum(path.stat().st_size for path in self.files)
        with tqdm(desc="lines", total=size, unit="B", unit_scale=True, leave=False, delay=PATIENCE) as bar:
            for file, path in enumerate(self.files):
                packed = path.name.endswith(".gz")
                start = self._unpacked.tell() if packed else 0
                for number, line in enumerate(_blocks(path), start=1):
                    if packed:
                        self._unpacked.write(line)
                    bar.update(0 if packed else len(line))
                    skipped = len(BOM) if number == 1 and line.startswith(BOM) else 0
                    text, stop = line[skipped:], start + len(line)
                    if text.strip():
                        name, parts = _record(text, f"{path}, line {number}")
                        if parts:
                            self._places.extend((start + skipped, stop))
                            self._pictures |= any(kind == "image" for kind, _ in parts)
                            yield f"{path.name}:{number}" if name is None else whole(str(name))
                    start = stop
                self._ends[file] = len(self._places) // 2
                bar.update(path.stat().st_size if packed else 0)
        self._unpacked.flush()

    def keep(self, chosen: np.ndarray) -> None:
        """chosen: bool (records found,)."""
        self._places = np.frombuffer(self._places, np.int64).reshape(-1, 2)[chosen]
        self._ends = np.cumsum([some.sum() for some in np.split(chosen, self._ends[:-1])])

    def __len__(self) -> int:
        return len(self._places)

    def _line(self, record: int) -> tuple[Path, list[tuple[str, str]]]:
        """(its file's folder, its parts)."""
        start, stop = self._places[record].tolist()
        path = self.files[np.searchsorted(self._ends, record, side="right")]
        if path.name.endswith(".gz"):
            line = os.pread(self._unpacked.fileno(), stop - start, start)
        else:
            with path.open("rb") as lines:
                line = os.pread(lines.fileno(), stop - start, start)
        _, parts = _record(line, f"{path}, byte {start}")
        return path.parent, parts

    def __getitem__(self, record: int) -> list:
        folder, parts = self._line(record)
        return [value if kind == "text" else self._picture(folder, value) for kind, value in parts]

    def _picture(self, folder: Path, value: str) -> np.ndarray:
        root, path = self.root or folder, Path(os.path.normpath(folder / value))  # `..` goes back in the text
        if not inside(root, path):
            raise Unreadable(f"{value} leads out of {root}: pictures are taken from there alone",
                             "path out of the folder", value)
        return read_part(path, self.image_size, str(path))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the lines that were chosen, and of every file's name, size and time, pictures' too: where there
        are some, the lines are read for it."""
        digest = hashlib.sha256(repr([(path.name, state(path)) for path in self.files]).encode())
        digest.update(self._places.tobytes())
        for folder, parts in map(self._line, range(len(self)) if self._pictures else ()):
            digest.update(repr([state(folder / value) for kind, value in parts if kind == "image"]).encode())
        return digest.hexdigest()


@config.register("source", "jsonl")
@dataclasses.dataclass(frozen=True)
class JsonlSource(Source):
    """Texts, or texts and pictures, one record a line."""

    path: str = config.path()  # a file, a folder, or a pattern such as texts/*.jsonl.gz
    heldout_fraction: float = config.fraction()  # of the lines, by a hash of the id, or of file name and number

    def open(self, split: str, image_size: int | None = None) -> Jsonl:
        root = Path(self.path)
        source = Jsonl(find(self.path), image_size, root if root.is_dir() else None)
        held = held_out(source.scan(), self.heldout_fraction)
        if not len(held):
            raise UserError(f"{self.path} holds no records: every line is blank")
        source.keep(held == (split == "heldout"))
        return source
