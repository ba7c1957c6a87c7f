"""Where a run begins: afresh, or from its latest checkpoint, once all that must be the same was compared."""

from typing import NamedTuple

from tfusion import config, workdir
from tfusion.checkpoint import Checkpoints, changes, check_identity, check_same
from tfusion.errors import UserError
from tfusion.objectives.base import Objective
from tfusion.training import state as states
from tfusion.training.optimizer import learning_rate_schedule


class Start(NamedTuple):
    state: states.TrainState
    next_row: int  # the position in the data
    totals: dict | None  # tokens, images, ... trained on so far; None at the beginning


def start(cfg: config.Config, objective: Objective, tx, mesh, checkpoints: Checkpoints, rows, folder) -> Start:
    """The state to go on from. Leaves in the run's folder all that its use will need, and what was changed.

    Raises UserError where the checkpoint is of another model or of other data, before anything is written.
    """
    ema, found = cfg.optimizer.ema_decay > 0, checkpoints.steps()
    begun, changed, step = Start(None, 0, None), {}, max(found, default=0)
    if found:
        meta = checkpoints.meta(step)
        check_same(meta["config"], cfg, checkpoints.folder)
        check_identity(meta["identity"], rows.identity, checkpoints.folder, cfg.data.prepared)
        if step > cfg.train.num_steps:
            raise UserError(f"{checkpoints.folder} is at step {step}, beyond train.num_steps = "
                            f"{cfg.train.num_steps}: raise it, or start in another --workdir")
        items = checkpoints.restore(step, states.items(states.restore_target(objective, tx, ema, mesh)))
        begun = Start(states.from_items(step, items, mesh), meta["next_row"], meta["totals"])
        changed = changes(meta["config"], cfg)
        report(step, meta["config"], cfg, changed)
    else:
        begun = begun._replace(state=states.init_state(objective, tx, ema, cfg.seed, mesh))
    config.save(cfg, folder)
    workdir.copy_in(rows.assets, folder)
    if changed:
        workdir.note_changes(folder, step, changed)
    return begun


def report(step: int, saved: dict, cfg: config.Config, changed: dict) -> None:
    """Says from where a run goes on, and what is no longer as it was."""
    print(f"resumed from step {step} of {cfg.train.num_steps}")
    for key, (old, new) in changed.items():
        print(f"changed since step {step}: {key} = {new} (was {old})")
    before = config.OptimizerConfig(**saved["optimizer"]), saved["train"]["num_steps"]
    after = cfg.optimizer, cfg.train.num_steps
    old, new = (float(learning_rate_schedule(*each)(step)) for each in (before, after))
    if old != new and step < cfg.train.num_steps:
        print(f"changed since step {step}: the learning rate goes on at {new:.3g}, not at {old:.3g}")
