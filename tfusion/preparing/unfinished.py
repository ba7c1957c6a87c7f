"""The folder that `prepare` writes: `<root>.unfinished` beside the one that it will be, which it replaces at
the end, and only if `prepare` made that too.

    plan.json           what is being made of what; who finds his own plan here goes on, any other begins anew
    .lock               held for a moment by who begins or completes, or writes what all share
    .lock.<k>of<n>      held by worker k of n as long as it lives

Killed at any point, the same command goes on. Several workers write side by side, each its shards; who is last
completes the folder.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tfusion.config import replace_text
from tfusion.errors import UserError
from tfusion.workdir import LOCK, hold

MARK = ".made_by_prepare"  # stands in every folder that was completed here: the names of all files left there
PLAN = "plan.json"


@contextlib.contextmanager
def begun(root, plan: dict, worker: int = 0, workers: int = 1) -> Iterator[Path | None]:
    """Yields the unfinished folder of a plan (JSON values), held for this worker; None where root is already
    what the plan makes.

    Raises UserError where root, or a folder beside it, holds anything that was not made here, for it would be
    deleted; and where another process writes there what would clash.
    """
    check(root)
    root, beside, _ = _folders(root)
    if _holds(root, plan):
        yield None
        return
    with contextlib.ExitStack() as held:
        with _gate(beside, make=True):
            if _holds(root, plan):  # another worker has completed it meanwhile, and this folder is a new one
                shutil.rmtree(beside)
                yield None
                return
            held.enter_context(hold(beside / f"{LOCK}.{worker}of{workers}"))
            _enter(beside, plan, worker, workers)
        yield beside


def check(root) -> None:
    """Brings back what stood at root, where one was killed between his two last moves. Raises UserError where
    something else than `prepare` made what stands there or beside it."""
    root, beside, old = _folders(root)
    if not root.exists() and (old / MARK).exists():
        with contextlib.suppress(FileNotFoundError), _gate(beside):  # not between the moves of another worker
            if not root.exists():
                os.replace(old, root)
    for folder in (root, old):
        _check_ours(folder)
    if beside.exists() and any(beside.iterdir()) and not (beside / LOCK).exists():
        raise _not_ours(beside, "a file")


def _folders(root) -> tuple[Path, Path, Path]:
    """(root, the unfinished one, the former one); of a symlink, beside what it points to."""
    root = Path(root).resolve()
    return root, *(root.with_name(root.name + end) for end in (".unfinished", ".old"))


def _enter(beside: Path, plan: dict, worker: int, workers: int) -> None:
    """Goes on with what stands in the folder, or empties it. Raises UserError where others write there that
    divide the work in another way, or make something else."""
    goes_on = _holds(beside, plan)
    for lock in beside.glob(f"{LOCK}.*"):
        same = lock.name.endswith(f"of{workers}")
        if lock.name != f"{LOCK}.{worker}of{workers}" and not (goes_on and same):
            hold(lock).close()
    if goes_on:
        return
    if (beside / PLAN).exists():
        print(f"{beside} was made of other sources, another tokenizer or another codec: begun anew",
              file=sys.stderr)
        (beside / PLAN).unlink()  # first: what is half deleted must not be gone on with
    for left in sorted(beside.iterdir()):
        if not left.name.startswith(LOCK):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    replace_text(beside / PLAN, _text(plan))


def first(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file of the unfinished folder in one move, unless another worker has."""
    with _gate(path.parent):
        if not path.exists():
            write(beside := path.with_name(f".{path.name}"))
            os.replace(beside, path)


def complete(root, plan: dict, finish: Callable[[Path], None]) -> None:
    """Puts the unfinished folder in the place of root. finish: writes into it what is still missing; called
    again where an earlier one was killed. Another worker may have done all that."""
    root, beside, old = _folders(root)
    try:
        with _gate(beside):
            finish(beside)
            for lock in beside.glob(f"{LOCK}.*"):
                lock.unlink()
            (beside / MARK).write_text("".join(f"{name}\n" for name in sorted(_files(beside))))
            _check_ours(root)  # again: writing may have taken hours
            if root.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(root, old)
            os.replace(beside, root)
            shutil.rmtree(old, ignore_errors=True)
    except FileNotFoundError:
        if beside.exists() or not _holds(root, plan):
            raise


def _text(plan: dict) -> str:
    return json.dumps(plan, indent=2, sort_keys=True) + "\n"


def _holds(folder: Path, plan: dict) -> bool:
    path = folder / PLAN
    return path.is_file() and path.read_text(errors="replace") == _text(plan)


@contextlib.contextmanager
def _gate(folder: Path, make: bool = False) -> Iterator[None]:
    """Waits until no other process is in here. Raises FileNotFoundError where the folder is gone, unless it
    may be made."""
    while True:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOCK).open("a+") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, folder / LOCK):  # else the folder was completed meanwhile
                yield
                return


def _is_at(file, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _files(folder: Path) -> set[str]:
    """What stands in a folder, but for locks and the mark."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")
            if not path.is_dir() and path.relative_to(folder) != Path(MARK)
            and not (path.parent == folder and path.name.startswith(LOCK))}


def _not_ours(folder: Path, what: str) -> UserError:
    return UserError(f"{folder} holds {what} that `python -m tfusion.prepare` did not make, and that would be "
                     "deleted: name another folder in data.prepared, or move it away")


def _check_ours(folder: Path) -> None:
    """Raises UserError where a folder holds a file that its mark does not name."""
    if folder.exists() and not folder.is_dir():
        raise _not_ours(folder, "a file")
    mark = folder / MARK
    foreign = sorted(_files(folder) - set(mark.read_text().splitlines() if mark.exists() else ()))
    if foreign:
        raise _not_ours(folder, foreign[0])
