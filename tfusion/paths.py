"""Paths as a user writes them, in flags and in the config, and files written there in one move.

`Path("~/run")` is a folder of the name `~`, and `Path("gs://bucket/run")` one of the name `gs:`. Here `~` is
the home folder, and a URL names a bucket where a bucket will do, and is refused where not. Buckets are reached
through epath and fsspec; an object there is written whole or not at all, and cannot be appended to.
"""

import contextlib
import importlib.util
import io
import os
import pathlib
import re
import secrets
import tempfile

from absl import flags
from etils import epath

from tfusion.errors import UserError

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
BUCKETS = {"gs://": "gcsfs"}  # and the package that epath needs for it; on s3:// nothing is renamed in one move

flags.disclaim_key_flags()  # `--help` of a verb lists its path flags among its own


def local(text: str) -> str:
    """The path with `~` expanded. Raises UserError where it names nothing on this machine."""
    if URL.match(text):
        raise UserError("a local path is needed here; a bucket can be mounted (docs/data.md)")
    if not text.strip() or "\0" in text:
        raise UserError("a path is needed")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise UserError("no such home folder is known here; write the path in full (./~ for that name itself)")
    return path


def anywhere(text: str) -> str:
    """As `local`; or a path in a bucket, as it is. Raises UserError on another URL, and where the package that
    reaches the bucket is not installed."""
    package = next((package for scheme, package in BUCKETS.items() if text.startswith(scheme)), None)
    if package is None:
        if URL.match(text):
            raise UserError(f"a local path is needed, or one that begins with {' or '.join(BUCKETS)}")
        return local(text)
    if importlib.util.find_spec(package) is None:
        raise UserError(f"this needs the package {package}: pip install {package}, or tfusion[buckets]")
    if not text.split("://")[1].strip("/"):
        raise UserError("the bucket has no name")
    return text


def in_bucket(path) -> bool:
    return os.fspath(path).startswith(tuple(BUCKETS))


def path(text) -> epath.Path:
    """One type for both: code that may meet a bucket keeps to what it offers."""
    return epath.Path(text)


def absolute(text) -> str:
    text = os.fspath(text)
    return text if in_bucket(text) else str(pathlib.Path(text).absolute())


def check_writable(path, flag: str) -> None:
    """Before long work, and without making anything: raises UserError where nothing can be written at or below
    a path. flag: what names it."""
    try:
        if not in_bucket(path):
            path = pathlib.Path(absolute(path))
            there = next(folder for folder in (path, *path.parents) if folder.exists())
            tempfile.TemporaryFile(dir=there).close()
    except OSError as e:
        raise UserError(f"{flag}={path} is not writable ({e.strerror or e}); choose another folder") from e


def replace_bytes(path, content: bytes) -> None:
    """Writes a file in one move: whoever is killed meanwhile, and a full disk, leave the old one whole; two
    writers at once, one of theirs."""
    path = epath.Path(path)
    if in_bucket(path):
        path.write_bytes(content)
        return
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.unfinished")
    try:
        with open(unfinished, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a crash of the machine can leave the new name empty
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def replace_text(path, text: str) -> None:
    """The same for a text, as UTF-8."""
    replace_bytes(path, text.encode())


def replace_by(path, write) -> None:
    """The same for what a function writes into a file it is given: `write(file)`."""
    buffer = io.BytesIO()
    write(buffer)
    replace_bytes(path, buffer.getvalue())


def empty(folder, but: str | tuple[str, ...]) -> None:
    """Deletes what is in a folder of this machine, but for names that begin so."""
    for left in sorted(epath.Path(folder).iterdir()):
        if not left.name.startswith(but):
            left.rmtree() if left.is_dir() and not os.path.islink(left) else left.unlink()


def delete(folder, mark: str) -> None:
    """Deletes a folder of this machine, and last the mark by which the next one knows, if this one is killed,
    that what is left may be deleted. One that is absent, or open elsewhere, is passed over."""
    with contextlib.suppress(OSError):
        empty(folder, mark)
        epath.Path(folder).rmtree()


class _Parser(flags.ArgumentParser):
    def __init__(self, buckets: bool):
        self._read = anywhere if buckets else local

    def parse(self, argument):
        return self._read(argument)


def define(name: str, default: str | None, help: str, buckets: bool = False, **args):
    """A flag that holds a path: `flags.DEFINE_string` with `local` applied, or `anywhere`."""
    return flags.DEFINE(_Parser(buckets), name, default, help, serializer=flags.ArgumentSerializer(), **args)


def define_multi(name: str, default: list[str], help: str):
    """The same for a flag that may be repeated."""
    return flags.DEFINE_multi(_Parser(False), flags.ArgumentSerializer(), name, default, help)
