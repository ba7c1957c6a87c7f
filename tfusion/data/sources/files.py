"""Files and texts as people have them: what lies in a folder, and what is in a text."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from tfusion.errors import UserError

NOT_OURS = "__MACOSX"  # what macOS packs beside the files of an archive


def walk(root: Path) -> Iterator[str]:
    """The files below a folder, as sorted as their names, as paths relative to it. Links are followed, each
    folder is seen once, so that one that leads back ends there; hidden files and folders are passed over.
    """

    def entries(folder: str) -> Iterator[str]:
        try:
            about = os.stat(root / folder)
            names = sorted(os.listdir(root / folder))
        except OSError as e:
            raise UserError(f"{root / folder} cannot be read: {e.strerror}") from e
        if (about.st_dev, about.st_ino) in seen:
            return
        seen.add((about.st_dev, about.st_ino))
        for name in names:
            if name.startswith(".") or name == NOT_OURS:
                continue
            path = os.path.join(folder, name)
            try:
                mode = os.stat(root / path).st_mode
            except OSError:  # a link to nowhere: whoever wants to read the file says so
                mode = stat.S_IFREG
            if stat.S_ISDIR(mode):
                yield from entries(path)
            elif stat.S_ISREG(mode):  # a pipe would never end
                yield path

    seen = set()
    yield from entries("")


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark. Raises UserError."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 (byte {e.start}): save it as UTF-8, as by "
                        f"`iconv -f LATIN1 -t UTF-8`") from e


def state(path) -> tuple | None:
    """Size and time of a file, by which a change is noticed; None where there is none: whoever wants to read it
    says so."""
    try:
        about = os.stat(path)
    except (OSError, ValueError):  # the latter of a name that no file can have
        return None
    return about.st_size, about.st_mtime_ns


def inside(root: Path, path: Path) -> bool:
    """Whether a path, as it is written, stays below a folder. A link in there may lead anywhere."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root))


def whole(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
