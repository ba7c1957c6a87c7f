"""Where a run begins: afresh, or from its latest checkpoint, once all that must be the same was compared."""

from typing import Any, NamedTuple

import jax
from flax import linen as nn

from tfusion import checkpoint, config, distributed, sharding, workdir
from tfusion.checkpoint import Checkpoints, changes, check_identity, check_same
from tfusion.errors import UserError
from tfusion.objectives.base import Objective
from tfusion.training import state as states
from tfusion.training.optimizer import learning_rate_schedule


class Start(NamedTuple):
    state: states.TrainState
    frozen: Any  # trees that the step reads and never changes, whole on every device
    next_row: int  # the position in the data
    totals: dict | None  # tokens, images, ... trained on so far; None at the beginning
    goodput: dict  # seconds of each part until the checkpoint
    unwritten: dict | None  # the line of its step, which waits for an evaluation that was abandoned


def start(cfg: config.RunConfig, objective: Objective, tx, mesh, checkpoints: Checkpoints, rows,
          folder) -> Start:
    """The state to go on from. Leaves in the run's folder all that its use will need, and what was changed.

    Raises UserError where the checkpoint is of another model or of other data, before anything is written.
    """
    ema, found = cfg.optimizer.ema_decay > 0, checkpoints.steps()
    changed, step, whole = {}, max(found, default=0), sharding.replicated(mesh)
    if found:
        meta = checkpoints.meta(step)
        check_same(meta["config"], cfg, checkpoints.folder)
        check_identity(meta["identity"], rows.identity, checkpoints.folder, rows.where)
        if step > cfg.train.num_steps:
            raise UserError(f"{checkpoints.folder} is at step {step}, beyond train.num_steps = "
                            f"{cfg.train.num_steps}: raise it, or start in another --workdir")
        items = checkpoints.restore(step, states.items(states.restore_target(objective, tx, ema, mesh)))
        begun = Start(states.from_items(step, items, mesh), checkpoint.load_frozen(folder, meta, whole),
                      meta["next_row"], meta["totals"], meta.get("goodput", {}), meta.get("unwritten"))
        changed = changes(meta["config"], cfg)
        if step == cfg.train.num_steps:  # nothing is left to train: no changed key counts
            print(f"step {step} of {step} is done")
            cfg, changed = config.from_dict(meta["config"]), {}
        else:
            report(step, meta["config"], cfg, changed)
    else:
        frozen = jax.device_put(nn.meta.unbox(objective.frozen()), whole)
        checkpoint.save_frozen(folder, frozen)
        begun = Start(states.init_state(objective, tx, ema, cfg.seed, mesh), frozen, 0, None, {}, None)
    if not distributed.is_writer():
        return begun
    if step < cfg.train.num_steps:
        (folder / "summary.json").unlink(missing_ok=True)  # who finds it takes the run to be done
    config.save(cfg, folder)
    workdir.copy_in(rows.assets, folder)
    if changed:
        workdir.note_changes(folder, step, changed)
    return begun


def report(step: int, saved: dict, cfg: config.RunConfig, changed: dict) -> None:
    """Says from where a run goes on, and what is no longer as it was."""
    print(f"resumed from step {step} of {cfg.train.num_steps}")
    for key, (old, new) in changed.items():
        print(f"changed since step {step}: {key} = {new} (was {old})")
    before = config.OptimizerConfig(**saved["optimizer"]), saved["train"]["num_steps"]
    after = cfg.optimizer, cfg.train.num_steps
    old, new = (float(learning_rate_schedule(*each)(step)) for each in (before, after))
    if old != new and step < cfg.train.num_steps:
        print(f"changed since step {step}: the learning rate goes on at {new:.3g}, not at {old:.3g}")
