"""Where a run begins, by one rule, once all that must be the same was compared: it resumes from its own latest
checkpoint, else branches from another run's (train.branch_from), else takes parameters (train.init_from), else
begins afresh. It says which.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from tfusion import checkpoint, checksum, config, distributed, exported, paths, sharding, workdir
from tfusion.checkpoint import Checkpoints, Damaged, changes, check_identity, check_same, some, warn
from tfusion.errors import UserError
from tfusion.objectives.base import Objective
from tfusion.training import state as states
from tfusion.training.initialise import from_llama
from tfusion.training.optimizer import learning_rate_schedule

LATEST, LATEST_GOOD = "latest", "latest_good"  # --resume
PARAMS = "params"


class Start(NamedTuple):
    state: states.TrainState
    frozen: Any  # trees that the step reads and never changes, whole on every device
    next_row: int  # the position in the data
    totals: dict | None  # tokens, images, ... trained on so far; None at the beginning
    goodput: dict  # seconds of each part until the checkpoint
    unwritten: dict | None  # the line of its step, which waits for an evaluation that was abandoned


def start(cfg: config.RunConfig, objective: Objective, tx, mesh, checkpoints: Checkpoints, rows, folder,
          resume: str = LATEST) -> Start:
    """The state to go on from. Leaves in the run's folder all that its use will need, and what was changed.

    resume: LATEST_GOOD passes over damaged checkpoints, and moves them aside. Raises UserError where the
    checkpoint is damaged, of another model or of other data, before anything is written.
    """
    def restore(source: Checkpoints, step: int) -> tuple[Start, dict]:
        return _restore(cfg, objective, tx, mesh, source, step, rows)

    changed, step = {}, 0
    if found := checkpoints.steps():
        begun, saved, step = _newest(checkpoints, found, restore, resume)
        changed = changes(saved, cfg)
        if step == cfg.train.num_steps:  # nothing is left to train: no changed key counts
            print(f"step {step} of {step} is done")
            cfg, changed = config.from_dict(saved), {}
        else:
            report("resumed from", step, saved, cfg, changed)
    elif cfg.train.branch_from != "none":
        run, step = find(cfg.train.branch_from)
        with contextlib.closing(Checkpoints(run)) as source:
            begun, saved = restore(source, step)
        begun, changed = begun._replace(goodput={}, unwritten=None), changes(saved, cfg)
        report(f"branched from {run} at", step, saved, cfg, changed)
    else:
        state = states.init_state(objective, tx, cfg.optimizer.ema_decay > 0, cfg.seed, mesh)
        frozen = jax.device_put(nn.meta.unbox(objective.frozen()), sharding.replicated(mesh))
        if exported.is_llama(cfg.train.init_from):
            state = from_llama(cfg, state, Path(cfg.train.init_from))
        elif cfg.train.init_from != "none":
            state = initialise(state, read_params(cfg.train.init_from), rows.identity)
        else:
            print(f"begins afresh, step 0 of {cfg.train.num_steps}")
        begun = Start(state, frozen, 0, None, {}, None)
    if not found:
        checkpoint.save_frozen(folder, begun.frozen)
    if not distributed.is_writer():
        return begun
    if step < cfg.train.num_steps:
        (folder / "summary.json").unlink(missing_ok=True)  # who finds it takes the run to be done
    config.save(cfg, folder)
    workdir.copy_in(rows.assets, folder)
    if changed:
        workdir.note_changes(folder, step, changed)
    return begun


def _newest(checkpoints: Checkpoints, found: list[int], restore: Callable, resume: str):
    """(start, the config it was saved with, step) of the newest checkpoint, or the newest that is good."""
    damaged = []
    for step in reversed(found):
        try:
            begun, saved = restore(checkpoints, step)
        except Damaged as e:
            if resume != LATEST_GOOD:
                raise
            warn(str(e))
            damaged.append(step)
        else:
            checkpoints.set_aside(damaged)
            return begun, saved, step
    raise UserError(f"none of the checkpoints in {checkpoints.folder} is good (steps "
                    f"{some(list(map(str, found)))}): move that folder away to start again")


def _restore(cfg, objective, tx, mesh, checkpoints: Checkpoints, step: int, rows) -> tuple[Start, dict]:
    """(start, the config it was saved with) of a checkpoint that this run may go on from."""
    meta, folder = checkpoints.meta(step), checkpoints.folder
    check_same(meta["config"], cfg, folder)
    check_identity(meta["identity"], rows.identity, folder, rows.where)
    if step > cfg.train.num_steps:
        raise UserError(f"{folder} is at step {step}, beyond train.num_steps = {cfg.train.num_steps}: raise "
                        "it, or start in another --workdir")
    target = states.restore_target(objective, tx, cfg.optimizer.ema_decay > 0, mesh)
    items = checkpoints.restore(step, states.items(target))
    frozen = checkpoint.load_frozen(folder.parent, meta, sharding.replicated(mesh))
    begun = Start(states.from_items(step, items, mesh), frozen, meta["next_row"], meta["totals"],
                  meta["goodput"], meta["unwritten"])
    return begun, meta["config"]


def report(how: str, step: int, saved: dict, cfg: config.RunConfig, changed: dict) -> None:
    """Says from where a run goes on, and what is no longer as it was."""
    print(f"{how} step {step} of {cfg.train.num_steps}")
    for key, (old, new) in changed.items():
        print(f"changed since step {step}: {key} = {new} (was {old})")
    before = config.OptimizerConfig(**saved["optimizer"]), saved["train"]["num_steps"]
    after = cfg.optimizer, cfg.train.num_steps
    old, new = (float(learning_rate_schedule(*each)(step)) for each in (before, after))
    if old != new and step < cfg.train.num_steps:
        print(f"changed since step {step}: the learning rate goes on at {new:.3g}, not at {old:.3g}")


# ---------------------------------------------------------------- another run's checkpoints

def find(path) -> tuple[Path, int]:
    """(workdir, step) of a run's newest checkpoint, or of a certain one: `<workdir>/checkpoints/<step>`."""
    path = paths.path(path)
    certain = path.parent.name == "checkpoints" and path.name.isdecimal()
    run, step = (path.parents[1], int(path.name)) if certain else (path, None)
    found = Checkpoints(run).steps() if (run / "checkpoints").is_dir() else []
    if not found or step not in (None, *found):
        have = f"there are {', '.join(map(str, found))}" if found else "it is no run's --workdir"
        raise UserError(f"no checkpoint to begin from in {path}: {have}")
    return run, max(found) if step is None else step


class Source(NamedTuple):
    """Parameters that a run can begin with. Leaves have the names of our checkpoints: 'params/blocks/wq'."""

    where: str
    forms: dict[str, str]  # {leaf: 'float32[2,3]'}
    read: Callable  # {leaf: jax.ShapeDtypeStruct of that form, with a sharding} -> {leaf: array}
    identity: dict  # {what: fingerprint} of the data they were trained on; {} where that is not known


def read_params(path) -> Source:
    """Those of what stands at a path: a run, or one of its checkpoints. They are the weights to sample with,
    the moving average where the run kept one."""
    run, step = find(path)
    checkpoints = Checkpoints(run)
    meta = checkpoints.meta(step)
    item = "ema" if any(leaf.startswith("ema/") for leaf in meta["leaves"]) else PARAMS
    forms = {PARAMS + leaf.removeprefix(item): form for leaf, (form, *_) in meta["leaves"].items()
             if leaf.startswith(f"{item}/")}

    def read(targets: dict) -> dict:
        tree = unflatten_dict({leaf.removeprefix(f"{PARAMS}/"): x for leaf, x in targets.items()}, sep="/")
        with contextlib.closing(checkpoints):
            tree = checkpoints.restore(step, {item: tree}, partly=True)[item]
        return {f"{PARAMS}/{leaf}": x for leaf, x in flatten_dict(tree, sep="/").items()}

    return Source(f"{run}, step {step}, {'moving average' if item == 'ema' else 'parameters'}", forms, read,
                  meta["identity"])


def initialise(state: states.TrainState, source: Source, identity: dict) -> states.TrainState:
    """A fresh state with a source's parameters where it has them, and an average that begins there. Says what
    was loaded. Raises UserError that names the leaves of other shapes."""
    wanted = checksum.forms(PARAMS, state.params)
    loaded, new = ([leaf for leaf in wanted if (leaf in source.forms) == there] for there in (True, False))
    left = [leaf for leaf in source.forms if leaf not in wanted]
    other = [f"{leaf} is {source.forms[leaf]}, not {wanted[leaf]}" for leaf in loaded
             if _shape(source.forms[leaf]) != _shape(wanted[leaf])]
    if other:
        raise UserError(f"train.init_from: {source.where}: {some(other)}: begin with a model of the same size")
    if not loaded:
        raise UserError(f"train.init_from: {source.where} has no parameter of this model, but {some(left)}; "
                        f"this model has {some(new)}")
    for name in sorted({"tokenizer", "codec"} & identity.keys() & source.identity.keys()):
        if identity[name] != source.identity[name]:
            warn(f"{source.where} was trained with another {name}: what its parameters know of it is lost")
    targets = {leaf: jax.ShapeDtypeStruct(x.shape, source.forms[leaf].partition("[")[0], sharding=x.sharding)
               for leaf, x in zip(wanted, jax.tree.leaves(state.params)) if leaf in loaded}
    read = source.read(targets)
    print(f"begins with the parameters of {source.where}")
    for what, leaves in (("loaded", loaded), ("new", new), ("left over", left)):
        print(f"  {what}: {len(leaves)}" + (f" ({some(leaves)})" if leaves else ""))
    params = jax.tree.unflatten(jax.tree.structure(state.params), [
        read[leaf].astype(x.dtype) if leaf in read else x
        for leaf, x in zip(wanted, jax.tree.leaves(state.params))])
    ema = None if state.ema_params is None else jax.tree.map(jnp.copy, params)
    return state._replace(params=params, ema_params=ema)


def _shape(form: str) -> str:
    return form.partition("[")[2]
