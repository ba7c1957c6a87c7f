"""What is saved of a run, and how it is read back, by training and by inference alike.

`<workdir>/checkpoints/<step>/{params,ema,optimizer,buffers,meta}`: each an Orbax item of its own, so that who
needs the parameters reads nothing else; `<workdir>/frozen`: trees that never change, saved once. `meta` is JSON
(the position in the data, totals, what the data were made with, the resolved config). Saving is asynchronous
and atomic: a checkpoint is listed only when it is whole.
"""

import contextlib
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from tfusion import config, paths
from tfusion.errors import UserError
from tfusion.types import FORMAT_VERSION

KEPT = 2
UNFINISHED = "[0-9]*.orbax-checkpoint-tmp*"  # Orbax's name for a folder until it is whole
READ_BY = {1: "feb2e22", 2: "4cbf5a4"}  # older format version -> the last revision that reads it
FROZEN = "frozen"  # folder of the trees that training reads and never changes


class Checkpoints:
    def __init__(self, workdir, *, writing: bool = False):
        """Opens those of a run. Only a writer, who holds the workdir, clears away what a killed save left."""
        self.folder = paths.path(paths.absolute(workdir)) / "checkpoints"
        for left in self.folder.glob(UNFINISHED) if writing else ():
            left.rmtree()
        self._manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(
            max_to_keep=KEPT if writing else None, create=writing))

    def steps(self) -> list[int]:
        """Those that are whole, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, items: dict, meta: dict) -> None:
        """Starts saving; returns as soon as the items are copied off the device.

        items: {name: tree of arrays}. meta: JSON values. Raises UserError where this save, or the one before
        it, cannot be written.
        """
        trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        meta = {"format_version": FORMAT_VERSION, **meta}
        with _one_line(self.folder):
            self._manager.save(step, args=ocp.args.Composite(**trees, meta=ocp.args.JsonSave(meta)))

    def meta(self, step: int) -> dict:
        """What was saved beside the arrays. Raises UserError where it is of another format or broken."""
        meta = self._read(step, meta=ocp.args.JsonRestore())["meta"]
        version = meta.get("format_version")
        if version != FORMAT_VERSION:
            by = f"revision {READ_BY[version]} of tfusion reads it" if version in READ_BY else (
                "use the code that wrote it")
            raise UserError(f"{self.folder / str(step)} has format version {version}, this code reads "
                            f"{FORMAT_VERSION}: {by}")
        return meta

    def restore(self, step: int, targets: dict) -> dict:
        """{name: tree} as in `save`, for the names asked for; the others' files are not opened.

        targets: {name: tree of jax.ShapeDtypeStruct with shardings}: where the arrays go, on any mesh.
        Raises UserError where an item does not fit, cannot be read, or holds numbers that training never
        makes.
        """
        trees = self._read(step, **{name: ocp.args.StandardRestore(t) for name, t in targets.items()})
        for name in targets:
            for where in _insane(trees[name]):
                raise UserError(f"checkpoint {self.folder / str(step) / name} is damaged: {where} holds "
                                f"numbers beyond all bounds; {self._instead(step)}")
        return {name: trees[name] for name in targets}

    def _read(self, step: int, **items):
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as e:  # orbax and tensorstore raise many kinds, all meaning: cannot be read
            if "RESOURCE_EXHAUSTED" in str(e):
                raise UserError(f"checkpoint {self.folder / str(step)} does not fit the memory of these "
                                "devices; to sample or evaluate, --mesh=fsdp=N spreads it over N") from e
            raise UserError(f"checkpoint {self.folder / str(step)} cannot be read "
                            f"({_first_line(e)}); if it is damaged, {self._instead(step)}") from e

    def _instead(self, step: int) -> str:
        older = [s for s in self.steps() if s < step]
        then = f"go on from step {max(older)}" if older else "start again"
        return f"move that folder away to {then}"

    def close(self) -> None:
        """Waits until everything is on disk. Raises UserError where it cannot be written."""
        with _one_line(self.folder), contextlib.closing(self._manager):
            self._manager.wait_until_finished()


@contextlib.contextmanager
def _one_line(folder: Path):
    """A failed save, whatever orbax and tensorstore raise for it, becomes a UserError."""
    try:
        yield
    except Exception as e:
        raise UserError(f"a checkpoint cannot be written to {folder} ({_first_line(e)}); those listed there "
                        "are whole: make room, and the same command goes on") from e


def _first_line(error: Exception) -> str:
    """Its kind and first line: of a long one both ends, for tensorstore ends with the system's reason."""
    line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {line if len(line) <= 160 else line[:60] + ' ... ' + line[-100:]}"


@jax.jit
def _norms(leaves):
    return [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves]


def _insane(tree) -> list[str]:
    """Names of the float arrays that hold NaN, infinity or numbers so large that their squares do not add up
    in float32: bytes that were changed on disk look so, for want of a checksum.
    """
    named = [(path, x) for path, x in jax.tree_util.tree_leaves_with_path(tree)
             if jnp.issubdtype(x.dtype, jnp.floating)]
    norms = jax.device_get(_norms([x for _, x in named]))
    return [jax.tree_util.keystr(path) for (path, _), norm in zip(named, norms) if not jnp.isfinite(norm)]


def save_frozen(workdir, tree) -> None:
    """Saves the frozen trees of a run; nothing where there are none.

    Raises UserError where they are not dicts and lists: what is read back is, and the step must see the same.
    """
    if jax.tree.leaves(tree):
        if not (isinstance(tree, dict) and _is_read_back(tree)):
            raise UserError("Objective.frozen must give a dict, of arrays and further dicts and lists")
        folder = paths.path(paths.absolute(workdir)) / FROZEN
        with _one_line(folder), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, tree, force=True)


def _is_read_back(tree) -> bool:
    """Whether a tree has the containers that a checkpoint gives back."""
    inside = tree.values() if type(tree) is dict else tree if type(tree) is list else None
    return hasattr(tree, "dtype") if inside is None else all(map(_is_read_back, inside))


def load_frozen(workdir, meta: dict, place):
    """The frozen trees of a run, each array with the sharding `place`; {} where, by its checkpoint's meta, it
    has none. Raises UserError where they cannot be read."""
    folder = paths.path(paths.absolute(workdir)) / FROZEN
    if not meta.get(FROZEN):
        return {}
    try:
        if not folder.is_dir():  # else Orbax warns first
            raise FileNotFoundError("it is not there")
        with ocp.StandardCheckpointer() as checkpointer:
            saved = checkpointer.metadata(folder).item_metadata.tree
            return checkpointer.restore(folder, jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), saved))
    except Exception as e:  # as in Checkpoints._read
        raise UserError(f"{folder} cannot be read ({_first_line(e)}): bring it back from where the run was "
                        "copied, or start again") from e


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
        if key not in free or other_state:
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
