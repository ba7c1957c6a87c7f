"""Orbax checkpoints: the state, and beside it the position in the data and the resolved config.

`<workdir>/checkpoints/<step>/{state,meta}`. Saving is asynchronous and atomic: a checkpoint is listed only
when it is whole.
"""

from pathlib import Path

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from tfusion import config, sharding
from tfusion.data.prepared import check_identity
from tfusion.errors import UserError
from tfusion.objectives import make_objective
from tfusion.training import state as states
from tfusion.training.optimizer import make_optimizer
from tfusion.types import FORMAT_VERSION

KEPT = 2
SAME_ON_RESUME = (  # what the parameters mean, and what the position in the data counts in
    "objective", "seed", "model.", "diffusion.prediction", "data.tokenizer", "data.mixture.", "data.seq_len",
    "data.max_images", "data.window_rows")
MAY_CHANGE = ("model.remat", "model.compute_dtype")


class Checkpoints:
    def __init__(self, workdir):
        self.folder = Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=KEPT, create=True))

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state, next_row: int, totals: dict, identity: dict, cfg: config.Config) -> None:
        """Starts saving; returns as soon as the state is copied off the device.

        next_row: the position in the data. totals: tokens, images, ... trained on so far. identity: what
        made the data (data/prepared.py).
        """
        meta = {"format_version": FORMAT_VERSION, "next_row": next_row, "totals": totals,
                "identity": identity, "config": cfg.to_dict()}
        self._manager.save(int(state.step), args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)))

    def restore(self, target, cfg: config.Config):
        """(state, next row, totals) of the latest checkpoint.

        Raises UserError where it does not fit the config or cannot be read.
        """
        step = self.latest()
        meta = self._read(step, meta=ocp.args.JsonRestore()).meta
        if meta["format_version"] != FORMAT_VERSION:
            raise UserError(f"{self.folder / str(step)} has format version {meta['format_version']}, this "
                            f"code reads {FORMAT_VERSION}: use the code that wrote it")
        check_same(meta["config"], cfg, self.folder)
        check_identity(meta["identity"], cfg.data.prepared, self.folder)
        state = self._read(step, state=ocp.args.StandardRestore(target)).state
        return state, meta["next_row"], meta["totals"]

    def _read(self, step: int, **items):
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as e:  # orbax and tensorstore raise many kinds, all meaning: cannot be read
            older = [s for s in self._manager.all_steps() if s != step]
            then = f"resume from step {max(older)}" if older else "start again"
            raise UserError(f"checkpoint {self.folder / str(step)} cannot be read "
                            f"({type(e).__name__}: {str(e).splitlines()[0][:120]}); delete that folder to "
                            f"{then}") from e

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def check_same(saved: dict, cfg: config.Config, where) -> None:
    """Raises UserError where a run is resumed with another model or order of data than it was saved with."""
    old, new = (flatten_dict(tree, sep=".") for tree in (saved, cfg.to_dict()))
    for key in sorted({*old, *new}):
        fixed = key.startswith(SAME_ON_RESUME) and key not in MAY_CHANGE
        if fixed and old.get(key) != new.get(key):
            raise UserError(f"{where} was saved with {key} = {old.get(key)}, the config has {new.get(key)}: "
                            "set it back, or start in another --workdir")
    a, b = saved["optimizer"]["ema_decay"], cfg.optimizer.ema_decay
    if (a > 0) != (b > 0):  # one state holds a moving average, the other none
        raise UserError(f"{where} was saved with optimizer.ema_decay = {a}, the config has {b}: set it "
                        "back, or start in another --workdir")


def load_run(workdir):
    """(config, parameters to sample with) of a run's latest checkpoint, on one device.

    The moving average where the run kept one. Raises UserError where there is no checkpoint.
    """
    cfg, folder = config.load(workdir), Path(workdir) / "checkpoints"
    checkpoints = Checkpoints(workdir) if folder.is_dir() else None
    if checkpoints is None or checkpoints.latest() is None:
        raise UserError(f"no checkpoint in {folder}: run `python -m tfusion.train --workdir={workdir}` first")
    mesh = sharding.make_mesh(config.MeshConfig(1, 1, 1, 1), jax.devices()[:1])
    tx = make_optimizer(cfg.optimizer, cfg.train.num_steps)
    target = states.restore_target(make_objective(cfg), tx, cfg.optimizer.ema_decay > 0, mesh)
    state, _, _ = checkpoints.restore(target, cfg)
    checkpoints.close()
    return cfg, states.sampling_params(state)
