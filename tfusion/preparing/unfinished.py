"""The folder that `prepare` writes: `<root>.unfinished` beside the one that it will be, which it replaces at
the end, and only if `prepare` made that too.

    plan.json           what is being made of what; who finds his own plan here goes on, any other begins anew
    .lock               held for a moment by who begins or completes, or writes what all share
    .lock.<k>of<n>      held by worker k of n as long as it writes
    .moving             its files are on their way to root, one by one

Several workers write side by side, each its shards; who is last to let go of the folder completes it: it is not
taken away from one who writes. What stood at root is `<root>.old` while the two change places: killed at any
point, the same command goes on, and brings that back or deletes it.

Where a file system renames no folders (a mounted bucket without a hierarchical namespace), what stood at root
is deleted, its meta.json first, and the files come one by one, meta.json after all that it tells of; killed,
the next one moves the rest.
"""

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tfusion import paths
from tfusion.errors import UserError
from tfusion.paths import replace_text
from tfusion.workdir import LOCK, hold

MARK = ".made_by_prepare"  # stands in every folder that was completed here: the names of all files left there
PLAN = "plan.json"
MOVING = ".moving"
LAST = ("meta.json", PLAN)  # by which readers, and `begun`, know that all is there


@contextlib.contextmanager
def begun(root, plan: dict, worker: int = 0, workers: int = 1) -> Iterator[Path | None]:
    """Yields the unfinished folder of a plan (JSON values), held for this worker; None where root is already
    what the plan makes.

    Raises UserError where root, or a folder beside it, holds anything that was not made here, for it would be
    deleted; and where another process writes there what would clash.
    """
    check(root)
    root, beside, old = _folders(root)
    if _holds(root, plan) and not beside.exists() and not old.exists():
        yield None
        return
    with contextlib.ExitStack() as held:
        with _gate(beside, make=True):
            _bring_back(root, old)
            _delete(old)
            if (beside / MOVING).exists():
                _move_files(beside, root)
            if done := _holds(root, plan):
                _leave(beside)
            else:
                held.enter_context(hold(beside / f"{LOCK}.{worker}of{workers}"))
                _enter(beside, plan, worker, workers)
        yield None if done else beside


def check(root) -> None:
    """Brings back what stood at root, where one was killed between his two last moves. Raises UserError where
    something else than `prepare` made what stands there or beside it."""
    root, beside, old = _folders(root)
    with contextlib.ExitStack() as held, contextlib.suppress(FileNotFoundError):  # completed meanwhile
        names = os.listdir(beside) if beside.is_dir() else [beside.name] * beside.exists()
        if names and LOCK not in names:
            raise _not_ours(beside, "a file")
        if names:
            held.enter_context(_gate(beside))  # not between the moves of another worker
            _bring_back(root, old)
        for folder in (root, old):
            _check_ours(folder)


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
    _empty(beside, LOCK)
    replace_text(beside / PLAN, _text(plan))


def _empty(folder: Path, but: str) -> None:
    """Deletes what is in a folder but for the names that begin so; its plan first, so that what is half deleted
    is neither gone on with nor brought back."""
    (folder / PLAN).unlink(missing_ok=True)
    paths.empty(folder, but)


def _bring_back(root: Path, old: Path) -> None:
    if not root.exists() and all((old / name).exists() for name in (MARK, PLAN)):
        os.replace(old, root)


def _delete(old: Path) -> None:
    with contextlib.suppress(OSError):  # absent; or open elsewhere, and the next one's to delete
        _empty(old, MARK)
        paths.delete(old, MARK)


def _leave(beside: Path) -> None:
    """Deletes the folder where it was made for its gate alone; in any other somebody's work stands."""
    if os.listdir(beside) == [LOCK]:
        (beside / LOCK).unlink()
        with contextlib.suppress(OSError):  # another one has come to the gate
            beside.rmdir()


def first(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file of the unfinished folder in one move, unless another worker has."""
    with _gate(path.parent):
        if not path.exists():
            write(beside := path.with_name(f".{path.name}"))
            os.replace(beside, path)


def complete(root, plan: dict, finish: Callable[[Path], bool]) -> None:
    """Puts the unfinished folder in the place of root, once every worker has let go of it: to be called after
    `begun`, by each, and not within. finish: writes into it what is still missing, or returns False where that
    is for others to write; called again where an earlier one was killed. Raises UserError where the folder is
    gone and root is something else."""
    root, beside, old = _folders(root)
    try:
        with _gate(beside):
            if (beside / MOVING).exists():
                _move_files(beside, root)
            if _holds(root, plan):
                _leave(beside)
                return
            if not _holds(beside, plan) or _in_use(beside):
                print(f"{root} is left to other workers, who are at it still")
                return
            if not finish(beside):
                return
            for left in (*beside.glob(f"{LOCK}.*"), *beside.glob("*.unfinished")):  # of those who were killed
                left.unlink()
            replace_text(beside / MARK, "".join(f"{name}\n" for name in sorted(_files(beside))))
            for folder in (root, old):
                _check_ours(folder)  # again: writing may have taken hours
            _delete(old)
            _put(beside, root, old)
            _delete(old)
    except FileNotFoundError as e:
        if not _holds(root, plan):  # else another worker has completed it
            raise UserError(f"{e.filename} is gone, and {root} is not what was prepared: somebody deleted "
                            "it, or prepares something else; run the same command again") from e


def _put(beside: Path, root: Path, old: Path) -> None:
    """In the place of root."""
    try:
        if root.exists():
            os.replace(root, old)
        os.replace(beside, root)
    except FileNotFoundError:
        raise
    except OSError:  # no folder is renamed here; the errno is the file system's own choice
        (beside / MOVING).touch()
        _move_files(beside, root)
        _leave(beside)


def _move_files(beside: Path, root: Path) -> None:
    """Also the rest of them, where one was killed at it."""
    if (beside / MARK).exists():  # nothing has come yet
        root.mkdir(exist_ok=True)
        for name in LAST:
            (root / name).unlink(missing_ok=True)
        paths.empty(root, MARK)
        os.replace(beside / MARK, root / MARK)  # it names what comes, which is therefore ours
    for name in sorted(_files(beside) - {MOVING}, key=lambda name: (name in LAST, name)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(beside / name, root / name)
    paths.empty(beside, (LOCK, MOVING))
    (beside / MOVING).unlink()


def _in_use(folder: Path) -> bool:
    """Whether a worker holds the folder; ask within its gate, where none can come to."""
    try:
        for lock in folder.glob(f"{LOCK}.*"):
            hold(lock).close()
    except UserError:
        return True
    return False


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
        try:
            if make:
                folder.mkdir(parents=True, exist_ok=True)
            file = (folder / LOCK).open("a+")
        except (FileNotFoundError, FileExistsError):  # the latter of a folder that is there and then is not
            if make:  # completed between the two
                continue
            raise
        with file:
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
    mark = folder / MARK  # read first: another worker may delete the folder, and the mark last
    made = set(mark.read_text().splitlines() if mark.exists() else ())
    foreign = sorted(_files(folder) - made)
    if foreign:
        raise _not_ours(folder, foreign[0])
