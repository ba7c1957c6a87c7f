"""What is saved of a run, and how it is read back, by training and by inference alike.

`<workdir>/checkpoints/<step>/{params,ema,optimizer,buffers,meta}`: each an Orbax item of its own, so that who
needs the parameters reads nothing else; `<workdir>/frozen`: trees that never change, saved once. `meta` is JSON
(the position in the data, totals, what the data were made with, the resolved config, and the form and checksum
of every array; a sum of itself). Saving is asynchronous and atomic: a checkpoint is listed only when it is
whole, an old one is moved out of the list before it is deleted, and nothing is restored whose sums are others
than those of the arrays that were saved.
"""

import contextlib
import json
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict
from orbax.checkpoint import checkpoint_managers as policies
from tqdm import tqdm

from tfusion import checksum, config, distributed, paths
from tfusion.errors import Unreachable, UserError, unanswered
from tfusion.meeting import Left, Meeting
from tfusion.types import FORMAT_VERSION

UNFINISHED = "[0-9]*.orbax-checkpoint-tmp*"  # Orbax's name for a folder until it is whole
DELETING = "deleting"  # folder that old checkpoints are moved into, then deleted from
COMMITTED = "commit_success.txt"  # Orbax's, of a step in a bucket: written last
MARKER = "_CHECKPOINT_METADATA"  # Orbax's, of a step: the time at which it was whole is written into it last
READ_BY = {1: "feb2e22", 2: "4cbf5a4", 3: "722f903", 4: "fa48100"}  # version -> the last that reads it
PAUSES_S = (5, 30)  # before storage that does not answer is asked for the second and the third time
ABANDONED_S = 20  # how long a save is waited for that other processes may not be writing
LATE = "measured.json"  # beside the checkpoints: figures that are not in their meta, {step: {figure: value}}
FROZEN = "frozen"  # folder of the trees that training reads and never changes
NAMED = 4  # leaves that a message names before it counts


class Damaged(UserError):
    """A checkpoint that is not as it was saved: an older one may be."""


class Keep(NamedTuple):
    """Which checkpoints stay when a newer one is whole."""

    last: int = 2
    every: int = 0  # and those of steps that this divides; 0: none
    best: str = "none"  # and the one where this figure, of the `measured`, is least


KEEP = Keep()


class _Best(NamedTuple):
    """An Orbax preservation policy. Their BestN reads figures from a file of each checkpoint, and would not
    open any where one of those is broken."""

    values: dict[int, float]  # of steps

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        best = min((c.step for c in checkpoints if c.step in self.values), key=self.values.get, default=None)
        return [c.step == best for c in checkpoints]


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        return False  # a save is asked for by the loop, which knows; asked of JAX here too, its count would mix


class Checkpoints:
    def __init__(self, workdir, *, writing: bool = False, keep: Keep = KEEP):
        """Opens those of a run. Only a writer, who holds the workdir, clears away what killed saves and
        deletions left; of several processes the first does."""
        self.folder = paths.path(paths.absolute(workdir)) / "checkpoints"
        self._writing, self._keep, self._best = writing, keep, {}
        self._clears = writing and distributed.is_writer()
        self._saving = self._failed = None  # the step under way; the error of the last save
        self._sweeper = None
        self._sweep_unfinished()  # what was being deleted is swept beside every save
        distributed.wait_for_all()
        self._manager = self._open()
        if writing and keep.best != "none":
            for step in self.steps():
                with contextlib.suppress(UserError):
                    self.note(step, self.meta(step)["measured"] | self._late().get(str(step), {}))

    def _open(self) -> _Manager:
        keep = [policies.LatestN(self._keep.last), _Best(self._best)]
        if self._keep.every:
            keep.append(policies.EveryNSteps(self._keep.every))
        return _Manager(self.folder, options=ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep), create=self._writing,
            todelete_subdir=None if paths.in_bucket(self.folder) else DELETING,  # there renaming is copying
            async_options=ocp.AsyncOptions(barrier_sync_fn=Meeting() if jax.process_count() > 1 else None),
            lightweight_initialize=True))

    def _reopen(self) -> None:
        """After a failure, or a folder was moved: what the manager remembers is no longer so."""
        with contextlib.suppress(Exception):  # of what failed: it has been told
            self._manager.close()
        self._sweep_unfinished()
        self._manager = self._open()

    def _sweep_unfinished(self) -> None:
        if self._clears:
            self._sweep(UNFINISHED, *never_whole(self.folder))

    def _sweep(self, *patterns: str) -> None:
        for pattern in patterns if self._clears else ():
            for left in self.folder.glob(pattern):
                with contextlib.suppress(OSError):
                    left.rmtree()

    def note(self, step: int, measured: dict) -> None:
        """Figures of a step's state, which `keep.best` compares."""
        if np.isfinite(value := measured.get(self._keep.best) or np.nan):
            self._best[step] = value

    def note_late(self, step: int, measured: dict) -> None:
        """As `note`, of a step that was saved before it was evaluated: kept beside the checkpoints."""
        self.note(step, measured)
        if distributed.is_writer() and step in self._best:
            late = self._late() | {str(step): {self._keep.best: self._best[step]}}
            paths.replace_text(self.folder.parent / LATE, json.dumps(late))

    def _late(self) -> dict:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder.parent / LATE).read_text())
        return {}

    def steps(self) -> list[int]:
        """Those that are whole, in order, as process 0 sees them."""
        return distributed.broadcast(sorted(self._manager.all_steps()))

    # ------------------------------------------------------------ saving

    def save(self, step: int, items: dict, meta: dict, *, frozen=None, measured: dict | None = None) -> None:
        """Starts saving; returns as soon as the items are copied off the device.

        items: {name: tree of arrays}. meta: JSON values. frozen: the run's frozen trees, saved before: their
        sums go with it. measured: {name: figure} of this state. A save that cannot be written, this one or the
        one before it, is said on stderr, and the next is tried anew: only `close` raises.
        """
        self._settle()
        leaves = {}
        for name, tree in {**items, FROZEN: frozen}.items():
            leaves |= checksum.leaves(name, tree)
        meta = {"format_version": FORMAT_VERSION, "leaves": leaves, "measured": measured or {}, **meta}
        trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        trees["meta"] = ocp.args.JsonSave({"sum": _sum(meta), **meta})
        self.note(step, meta["measured"])
        self._saving = step
        with self._attempt():
            self._manager.save(step, args=ocp.args.Composite(**trees), force=True)

    def _settle(self) -> None:
        """Waits for the save under way, and starts to delete what it made superfluous."""
        if self._saving is not None:
            with self._attempt():
                self._manager.wait_until_finished()
            self._saving = None
        if self._sweeper:
            self._sweeper.join()
        self._sweeper = threading.Thread(target=self._sweep, args=(f"{DELETING}/*",))
        self._sweeper.start()

    @contextlib.contextmanager
    def _attempt(self):
        """A part of a save. What orbax and tensorstore raise where they cannot write, in any process, is one
        line; the checkpoints that are whole stay."""
        error = None
        try:
            yield
        except Exception as e:  # a bucket's client has kinds of its own
            error = e
        if (why := _why("save", self._saving, error)) is None:
            self._failed = None
            return
        step, self._saving = self._saving, None
        self._best.pop(step, None)
        self._failed = UserError(f"a checkpoint, of step {step}, cannot be written to {self.folder} ({why}); "
                                 "those listed there are whole: make room, and the same command goes on")
        self._failed.__cause__ = error
        self._reopen()
        steps = self.steps()
        last = f"the last one is of step {max(steps)}" if steps else "there is none yet"
        warn(f"the checkpoint of step {step} cannot be written to {self.folder} ({why}); training goes on, "
             f"{last}: make room before the next is due")

    def wait(self) -> None:
        """Returns when everything is on disk. Raises UserError, once, where the last save could not be
        written."""
        self._settle()
        failed, self._failed = self._failed, None
        if failed:
            raise failed

    def close(self) -> None:
        """As `wait`, and lets go of the folder."""
        try:
            self.wait()
        finally:
            self._sweeper.join()
            with contextlib.suppress(Exception):
                self._manager.close()

    def abandon(self) -> None:
        """Of several processes, after an error that the others may not have: asks them nothing. Where they have
        it too, the save under way has time to become whole."""
        def finish():
            with contextlib.suppress(Exception):
                self._manager.wait_until_finished()

        finishing = threading.Thread(target=finish, name="last save", daemon=True)
        finishing.start()
        finishing.join(ABANDONED_S)

    def set_aside(self, steps: list[int]) -> None:
        """Renames damaged ones, `<step>.damaged`: they are listed no longer, and their steps can be saved."""
        for step in steps if distributed.is_writer() else ():
            names = (f"{step}.damaged{n}" for n in ("", *(f".{i}" for i in range(2, 1000))))
            target = next(self.folder / name for name in names if not (self.folder / name).exists())
            (self.folder / str(step)).rename(target)
            warn(f"{self.folder / str(step)} is now {target.name}")
        distributed.wait_for_all()
        if steps:
            self._reopen()

    # ------------------------------------------------------------ reading

    def meta(self, step: int) -> dict:
        """What was saved beside the arrays. Raises UserError where it is of another format, Damaged where it is
        not as it was saved, or the checkpoint was never whole."""
        folder = self.folder / str(step)
        if _anywhere(not self._tried(step, lambda: _is_committed(folder))):
            raise Damaged(f"checkpoint {folder} has no commit marker ({MARKER}): it was never whole, or lost "
                          f"it; {self._instead(step)}")
        meta = self._read(step, meta=ocp.args.JsonRestore())["meta"]
        meta = meta if isinstance(meta, dict) else {}
        version, intact = meta.get("format_version"), _sum(meta) == meta.get("sum")
        if _anywhere(not intact and version not in READ_BY):  # the first three had no sum
            raise Damaged(f"checkpoint {folder / 'meta'} is damaged: it is not as it was saved; "
                          f"{self._instead(step)}")
        if version != FORMAT_VERSION:
            by = f"revision {READ_BY[version]} of tfusion reads it" if version in READ_BY else (
                "use the code that wrote it")
            raise UserError(f"{folder} has format version {version}, this code reads {FORMAT_VERSION}: {by}")
        return meta

    def restore(self, step: int, targets: dict, partly: bool = False) -> dict:
        """{name: tree} as in `save`, for the names asked for; the others' files are not opened.

        targets: {name: tree of jax.ShapeDtypeStruct with shardings}: where the arrays go, on any mesh. partly:
        they may lack leaves that were saved. Raises UserError that names the leaves where an item is of another
        model, Damaged where one cannot be read or is not as it was saved.
        """
        saved = self.meta(step)["leaves"]
        for name, target in targets.items():
            forms = {leaf: form for leaf, (form, *_) in _of(name, saved).items()}
            check_forms(forms, checksum.forms(name, target), self.folder / str(step), partly)
        trees = self._read(step, **{name: (
            ocp.args.PyTreeRestore(target, ocp.checkpoint_utils.construct_restore_args(target),
                                   partial_restore=True) if partly else ocp.args.StandardRestore(target))
            for name, target in targets.items()})
        for name in targets:
            wrong = _differing(saved, checksum.leaves(name, trees[name]))
            if _anywhere(bool(wrong)):
                raise Damaged(f"checkpoint {self.folder / str(step)} is damaged, not as it was saved: "
                              f"{some(wrong) or 'another process read other bytes'}; {self._instead(step)}")
        return {name: trees[name] for name in targets}

    def _read(self, step: int, **items):
        return self._tried(step, lambda: self._manager.restore(step, args=ocp.args.Composite(**items)))

    def _tried(self, step: int, read: Callable):
        """What `read` gives, in all processes. Storage that does not answer, in any, is asked anew."""
        folder = self.folder / str(step)
        for pause in (*PAUSES_S, None):
            error = out = None
            try:
                out = read()
            except Exception as e:  # orbax and tensorstore raise many kinds, all meaning: cannot be read
                error = e
            if (why := _why("read", step, error)) is None:
                return out
            if _anywhere(error is not None and not unanswered(error)):
                break
            if pause is None:
                raise Unreachable(f"checkpoint {folder} cannot be read now ({why}): its storage does not "
                                  "answer; the same command tries again") from error
            warn(f"checkpoint {folder} cannot be read now ({why}); tried again in {pause} s")
            time.sleep(pause)
        if "RESOURCE_EXHAUSTED" in str(error):
            raise UserError(f"checkpoint {folder} does not fit the memory of these devices; "
                            "to sample or evaluate, --mesh=fsdp=N spreads it over N") from error
        raise Damaged(f"checkpoint {folder} cannot be read ({why}); if it is damaged, "
                      f"{self._instead(step)}") from error

    def _instead(self, step: int) -> str:
        older = [s for s in self._manager.all_steps() if s < step]  # of one process, perhaps
        if not older:
            return "move that folder away to start again"
        return f"train with --resume=latest_good to go on from step {max(older)}, or move that folder away"


def never_whole(folder) -> list[str]:
    """Names of steps in a bucket that a killed save left: there Orbax writes to the step's own name, and lists
    it once its last object is there."""
    steps = folder.glob("[0-9]*") if paths.in_bucket(folder) else ()
    return [step.name for step in steps
            if step.name.isdecimal() and not (step / COMMITTED).exists() and not _is_committed(step)]


def warn(text: str) -> None:
    """One line on stderr, from one process, that a progress bar leaves whole."""
    if distributed.is_writer():
        tqdm.write(f"warning: {text}", file=sys.stderr)


def _first_line(error: Exception) -> str:
    """Its kind and first line: of a long one both ends, for tensorstore ends with the system's reason."""
    line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {line if len(line) <= 160 else line[:60] + ' ... ' + line[-100:]}"


def _sum(meta: dict) -> int:
    """Of the values, however they are spaced and ordered."""
    rest = {key: value for key, value in meta.items() if key != "sum"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _why(doing: str, step: int | None, error: Exception | None) -> str | None:
    """What was wrong with a step, here or in another process; None where it went well in all."""
    mine = _first_line(error) if error and not isinstance(error, Left) else None
    distributed.tell(doing, [step, mine])
    if not _anywhere(error is not None):
        return None
    others = [f"process {process}: {why}" for process, (of, why) in distributed.told(doing).items()
              if why and of == step]
    return mine or some(others) or "another process failed"


def _anywhere(wrong: bool) -> bool:
    """Whether it is so in any process: all must take the same way on."""
    return bool(distributed.largest(wrong))


def _is_committed(folder: Path) -> bool:
    """Whether the marker is there. On a local disk a folder is renamed when it is whole, and Orbax asks no
    more; but a copy that broke off has the name too."""
    try:
        return bool(json.loads((folder / MARKER).read_text())["commit_timestamp_nsecs"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return False


def some(names: list[str]) -> str:
    """The first few of them, and how many more."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _of(name: str, saved: dict) -> dict:
    """The leaves of an item."""
    return {leaf: form for leaf, form in saved.items() if leaf.startswith(f"{name}/")}


def _differing(saved: dict, read: dict) -> list[str]:
    """The leaves that were read and are not as they were saved."""
    return [leaf for leaf in read if saved.get(leaf) != read[leaf]]


def check_forms(saved: dict, wanted: dict, where, partly: bool = False) -> None:
    """Raises UserError where a model has other leaves than were saved.

    saved, wanted: {leaf: 'float32[2,3]'}. partly: what was saved may have more.
    """
    other = [f"{leaf} is {saved[leaf]}, not {form}" for leaf, form in wanted.items()
             if saved.get(leaf, form) != form]
    absent = [leaf for leaf in wanted if leaf not in saved]
    extra = [leaf for leaf in saved if leaf not in wanted and not partly]
    parts = [some(other), absent and f"it lacks {some(absent)}", extra and f"it has {some(extra)} besides"]
    if any(parts):
        raise UserError(f"checkpoint {where} is of another model: {'; '.join(filter(None, parts))}: use the "
                        "code and the config that it was saved with")


def save_frozen(workdir, tree) -> None:
    """Saves the frozen trees of a run; nothing where there are none.

    Raises UserError where they are not dicts and lists: what is read back is, and the step must see the same.
    """
    if jax.tree.leaves(tree):
        if not (isinstance(tree, dict) and _is_read_back(tree)):
            raise UserError("Objective.frozen must give a dict, of arrays and further dicts and lists")
        folder = paths.path(paths.absolute(workdir)) / FROZEN
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(folder, tree, force=True)
        except Exception as e:  # as in Checkpoints._attempt, but nothing can go on without them
            raise UserError(f"{folder} cannot be written ({_first_line(e)}): make room, and the same command "
                            "goes on") from e


def _is_read_back(tree) -> bool:
    """Whether a tree has the containers that a checkpoint gives back."""
    inside = tree.values() if type(tree) is dict else tree if type(tree) is list else None
    return hasattr(tree, "dtype") if inside is None else all(map(_is_read_back, inside))


def load_frozen(workdir, meta: dict, place):
    """The frozen trees of a run, each array with the sharding `place`; {} where, by its checkpoint's meta, it
    has none. Raises UserError where they cannot be read, or are not those that it was trained with."""
    folder = paths.path(paths.absolute(workdir)) / FROZEN
    sums = _of(FROZEN, meta["leaves"])
    if not sums:
        return {}
    try:
        if not folder.is_dir():  # else Orbax warns first
            raise FileNotFoundError("it is not there")
        with ocp.StandardCheckpointer() as checkpointer:
            saved = checkpointer.metadata(folder).item_metadata.tree
            tree = checkpointer.restore(folder, jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), saved))
        read = checksum.leaves(FROZEN, tree)
        if wrong := _differing(sums, read) + _differing(read, sums):
            raise ValueError(f"not as it was saved: {some(sorted(set(wrong)))}")
    except Exception as e:  # as in Checkpoints._tried
        raise (Unreachable if unanswered(e) else UserError)(
            f"{folder} cannot be read ({_first_line(e)}): bring it back from where the run was copied, or "
            "start again") from e
    return tree


def changes(saved: dict, cfg: config.RunConfig) -> dict:
    """{key: [old, new]} of a run's config since its checkpoint, keys as 'optimizer.learning_rate'."""
    old, new = (flatten_dict(tree, sep=".") for tree in (saved, cfg.to_dict()))
    return {key: [old.get(key), new.get(key)] for key in sorted({*old, *new}) if old.get(key) != new.get(key)}


def check_same(saved: dict, cfg: config.RunConfig, where) -> None:
    """Raises UserError where a run is resumed with another model or order of data than it was saved with: what
    each component says of its keys (config.py)."""
    changed, free = changes(saved, cfg), config.may_change(cfg)
    a, b = saved["optimizer"]["ema_decay"], cfg.optimizer.ema_decay
    for key, (old, new) in changed.items():
        other_state = key == "optimizer.ema_decay" and (a > 0) != (b > 0)  # one has an average, one none
        off = old in (None, 0) and new in (None, 0)  # a source without a share is as one that is not there
        if not (key in free or off) or other_state:
            raise UserError(f"{where} was saved with {key} = {old}, the config has {new}: set it back, or "
                            "start in another --workdir")


def check_identity(saved: dict, now: dict, where, data) -> None:
    """Raises UserError where the data are not those that the run was trained on.

    saved, now: {what: fingerprint}, of the tokenizer, the codec, each source's records, ...
    """
    changed = [name for name in sorted({*saved, *now}) if saved.get(name) != now.get(name)]
    if changed:
        raise UserError(f"{where} was trained on other data than {data} now holds (changed: "
                        f"{', '.join(changed)}): name the folder it was trained on with "
                        "--config.data.prepared, or train in another --workdir")
