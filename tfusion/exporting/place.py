"""The folder that `export` writes: `<out>.unfinished`, beside the one that it will be, whose place it takes at
the end. What stood there is replaced only if asked, and only if all of it was made here."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from tfusion import distributed, exported, paths
from tfusion.errors import UserError
from tfusion.paths import replace_text
from tfusion.workdir import LOCK, hold

UNFINISHED = ".unfinished"


def check(out: Path, overwrite: bool) -> None:
    """Raises UserError where something stands at `out` that is not to be, or not ours to be, replaced."""
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise UserError(f"{out} is there already: name another --out; --overwrite replaces an export")
    made = exported.about(out).get("files") if out.is_dir() else None
    if made is None:
        raise UserError(f"{out} was not made by export: it is left as it is, name another --out")
    strange = sorted(_files(out) - {*made, exported.MARK})
    if strange:
        raise UserError(f"{out} holds {strange[0]}, which export did not make: move it away, or name another "
                        "--out")


@contextlib.contextmanager
def begun(out: Path, overwrite: bool, about: dict) -> Iterator[Path]:
    """Yields the folder to write into, which then stands at `out`; of one that failed, nothing stays. Of
    several processes the first makes it, and puts it in place when all are done.

    about: JSON values, which the export says of itself. Raises UserError as `check`, and where another process
    writes the same export.
    """
    check(out, overwrite)
    if not distributed.is_writer():
        distributed.wait_for_all()
        yield out.with_name(out.name + UNFINISHED)
        distributed.wait_for_all()
        return
    beside, old = (out.with_name(out.name + end) for end in (UNFINISHED, ".old"))
    for folder in (beside, old):
        if os.path.lexists(folder) and not _is_ours(folder):
            raise UserError(f"{folder} was not made by export, which needs that name: move it away")
    beside.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(hold(beside / LOCK)):
        try:
            _mark(beside, about | {"files": []})  # first: by it the next one knows that this is left over
            paths.empty(beside, (LOCK, exported.MARK))
            distributed.wait_for_all()
            yield beside
            distributed.wait_for_all()
            for left in (beside / LOCK, *beside.glob(f"{exported.MARK}.*")):  # the latter of those killed
                left.unlink()
            _mark(beside, about | {"files": sorted(_files(beside) - {exported.MARK})})
            check(out, overwrite)  # again: writing may have taken an hour
            if out.exists():
                paths.delete(old, exported.MARK)
                os.replace(out, old)
            os.replace(beside, out)
            paths.delete(old, exported.MARK)
        except BaseException:
            paths.delete(beside, exported.MARK)
            raise


def _is_ours(folder: Path) -> bool:
    """Whether export made a folder, or was killed before it could say so."""
    names = os.listdir(folder) if folder.is_dir() else []
    return exported.MARK in names or (bool(names) and all(x.startswith((LOCK, exported.MARK)) for x in names))


def _mark(folder: Path, about: dict) -> None:
    replace_text(folder / exported.MARK, json.dumps(about, indent=2) + "\n")


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
