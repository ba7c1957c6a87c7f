"""A folder of pictures with captions: NAME.txt beside NAME.jpg, or a table (docs/data.md)."""

import csv
import dataclasses
import functools
import hashlib
import io
import json
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tfusion import config
from tfusion.data.sources.base import Source, Unreadable, held_out, read_part
from tfusion.data.sources.files import inside, read_text, state, walk, whole
from tfusion.errors import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABLES = ("metadata.jsonl", "metadata.csv")
FILE, TEXT = ("file_name", "image", "path"), ("text", "caption")  # names of a table's columns, first come first
LONGEST_CAPTION = 2**16  # bytes of NAME.txt; more is something else


def _column(row: dict, wanted: tuple[str, ...], where: str) -> str:
    """The row's text under the first of the wanted names, '' for null."""
    names = {str(name).strip().lower(): name for name in row}
    found = next((names[name] for name in wanted if name in names), None)
    if found is None:
        raise UserError(f"{where}: it has {', '.join(map(str, row))}; {' or '.join(wanted)} is needed")
    if not isinstance(row[found], str | None):
        raise UserError(f"{where}: {found} is {row[found]!r}, a text is needed")
    return whole(row[found] or "").strip()


def _csv_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(line, its columns) of a table with commas, semicolons or tabs."""
    text = read_text(path)
    delimiter = max(",;\t", key=text.split("\n", 1)[0].count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as e:
        raise UserError(f"{path}, line {reader.line_num}: {e}") from e


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                row = dict(json.loads(line))
            except (ValueError, TypeError, RecursionError) as e:
                raise UserError(f"{path}, line {number}: no JSON object ({e})") from e
            yield number, row


def read_table(path: Path) -> Iterator[tuple[str, str]]:
    """(file, caption) of each line; '' where the caption is blank. Other columns are passed over."""
    for number, row in (_csv_rows if path.suffix.lower() == ".csv" else _jsonl_rows)(path):
        where = f"{path}, line {number}"
        file, caption = _column(row, FILE, where), _column(row, TEXT, where)
        if not file:
            raise UserError(f"{where}: no file is named")
        yield file, caption


def _tables(root: Path, files: list[str], texts: bool) -> list[str]:
    """The tables of captions: metadata.* of any folder, else, without a NAME.txt, the only CSV of the root."""
    tables = [file for file in files if os.path.basename(file) in TABLES]
    folders = [os.path.dirname(file) for file in tables]
    if len(set(folders)) < len(tables):
        raise UserError(f"{root / max(folders, key=folders.count)} holds {' and '.join(TABLES)}: leave one")
    others = [file for file in files if file.lower().endswith(".csv") and os.sep not in file]
    return tables or (others if len(others) == 1 and not texts else [])


@dataclasses.dataclass(frozen=True, slots=True)  # there may be millions
class Captioned:
    """A picture file, and its caption. Paths are relative to the folder."""

    key: str  # the picture's path, the same on every system
    file: str
    caption: str | None  # a text, or the path of the file that holds it
    in_file: bool = False  # the latter


def _same_everywhere(path: str) -> str:
    same = unicodedata.normalize("NFC", path.replace(os.sep, "/"))  # macOS takes letters and accents apart
    return path if same == path else same  # one text in memory, not two


def find(root: Path) -> list[Captioned]:
    """All pictures of a folder, sorted by their paths; one with several captions stands there as often."""
    if not root.is_dir():
        raise UserError(f"{root} {'is a file' if root.exists() else 'not found'}: the path of a source of kind "
                        "'folder' names a folder of pictures; --config.data.sources.NAME.path=DIR")
    files = list(walk(root))
    pictures = {_same_everywhere(file): file for file in files if file.lower().endswith(PICTURES)}
    texts = {_same_everywhere(file[:-4]): file for file in files if file.lower().endswith(".txt")}

    def beside(key: str) -> str | None:
        return texts.get(os.path.splitext(key)[0])

    found, named = [], set()
    for table in _tables(root, files, any(map(beside, pictures))):
        for file, caption in read_table(root / table):
            key = _same_everywhere(os.path.normpath(os.path.join(os.path.dirname(table), file)))
            file = pictures.get(key, key)
            found.append(Captioned(file if file == key else key, file, caption or None))
            named.add(key)
    del files
    found += [Captioned(key, file, beside(key), in_file=True) for key, file in pictures.items()
              if key not in named]
    if not found:
        raise UserError(f"{root} holds no pictures ({', '.join(PICTURES)}): name the folder that does in "
                        "--config.data.sources.NAME.path=DIR")
    return sorted(found, key=lambda item: item.key)


class Folder:
    """Record i is [caption, picture], or [picture] where there is no caption."""

    def __init__(self, items: list[Captioned], image_size: int | None, root: Path):
        self.items, self.image_size, self.root = items, image_size, root

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, record: int) -> list:
        item = self.items[record]
        if not inside(self.root, self.root / item.file):
            raise Unreadable(f"{item.key} leads out of {self.root}: pictures are taken from there alone",
                             "path out of the folder", item.key)
        caption = self._caption_in_file(item) if item.caption and item.in_file else item.caption
        picture = read_part(self.root / item.file, self.image_size, item.key)
        return [caption, picture] if caption else [picture]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the captions of tables, and of every file's name, size and time."""
        digest = hashlib.sha256()
        for item in self.items:
            files = [item.file, item.caption] if item.caption and item.in_file else [item.file]
            caption = item.caption if len(files) == 1 else ""
            states = (state(self.root / file) for file in files)
            digest.update(repr((item.key, caption, *states)).encode())
        return digest.hexdigest()

    def _caption_in_file(self, item: Captioned) -> str:
        path = self.root / item.caption
        try:
            if (size := path.stat().st_size) > LONGEST_CAPTION:
                raise Unreadable(f"{path} has {size} bytes, a caption has at most {LONGEST_CAPTION}",
                                 "long caption", item.key)
            return read_text(path).strip()
        except Unreadable:
            raise
        except (UserError, OSError) as e:
            raise Unreadable(str(e), "unreadable caption", item.key) from e


@config.register("source", "folder")
@dataclasses.dataclass(frozen=True)
class FolderSource(Source):
    """Pictures with captions in a folder and those below it."""

    path: str = config.path()
    heldout_fraction: float = config.fraction()  # of the pictures, by a hash of each one's path

    def open(self, split: str, image_size: int | None = None) -> Folder:
        items = find(Path(self.path))
        held = held_out((item.key for item in items), self.heldout_fraction)
        chosen = np.flatnonzero(held == (split == "heldout"))
        return Folder([items[i] for i in chosen], image_size, Path(self.path))
