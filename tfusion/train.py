"""Trains an experiment; run again with the same workdir, it resumes.

  python -m tfusion.train --config=experiments/quickstart.py --workdir=runs/quickstart/transfusion
  python -m tfusion.train --config=experiments/transfusion.py:0.16b --workdir=/tmp/x --dry_run
  ... --config.train.num_steps=100 overrides one value
"""

from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from tfusion import config, sharding
from tfusion.errors import UserError, run
from tfusion.objectives import make_objective

CONFIG = config_flags.DEFINE_config_file("config", None, "experiments/FILE.py[:variant]")
WORKDIR = flags.DEFINE_string("workdir", None, "where checkpoints, metrics and the config go")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "build and compile, print parameters and one batch, exit")


def writable_folder(path: str) -> Path:
    """Makes the folder. Raises UserError where nothing can be written there."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as e:
        raise UserError(f"--workdir={path} is not writable ({e.strerror}); choose another folder") from e
    return folder


def main() -> None:
    if CONFIG.value is None or WORKDIR.value is None:
        raise UserError("--config=experiments/FILE.py and --workdir=DIR are both needed; see --help")
    cfg = config.from_dict(CONFIG.value)
    workdir = writable_folder(WORKDIR.value)
    mesh = sharding.make_mesh(cfg.mesh)
    sharding.check_batch_size(cfg.train.batch_size // cfg.train.num_microbatches, mesh)
    objective = make_objective(cfg)
    with jax.set_mesh(mesh):
        if DRY_RUN.value:
            from tfusion.training.dry_run import dry_run
            dry_run(cfg, objective, mesh)
        else:
            from tfusion.training.loop import train
            train(cfg, objective, workdir, mesh)


if __name__ == "__main__":
    run(main)
