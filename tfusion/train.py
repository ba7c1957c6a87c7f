"""Trains an experiment; run again with the same workdir, it resumes.

  python -m tfusion.train --config=experiments/quickstart.py --workdir=runs/quickstart/transfusion
  python -m tfusion.train --config=experiments/transfusion.py:0.16b --workdir=/tmp/x --dry_run
  ... --config.train.num_steps=100 overrides one value
  ... --profile=100:5 writes a trace of five steps, which TensorBoard and xprof open
  ... --resume=latest_good passes over a checkpoint that is damaged
  ... --config.train.branch_from=runs/a/checkpoints/1000 goes on from another run's state, under a new schedule
  ... --config.train.init_from=runs/a begins with another run's parameters
  ... --wandb=PROJECT logs to Weights & Biases too (pip install '.[wandb]'; WANDB_MODE=offline for no network)
"""

import contextlib
import platform
import secrets
from pathlib import Path

import jax
from absl import flags

from tfusion import config, distributed, experiment, exported, objectives, paths, sharding
from tfusion import workdir as workdirs
from tfusion.errors import Unreachable, UserError, run, unanswered

CONFIG = experiment.define()
WORKDIR = paths.define("workdir", None, "where checkpoints, metrics and the config go; gs:// too", buckets=True)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "build and compile, print parameters and one batch, exit")
RESUME = flags.DEFINE_enum("resume", "latest", ["latest", "latest_good"],
                           "where the newest checkpoint is damaged: refuse, or move it aside and go on from an "
                           "older one")
WANDB = flags.DEFINE_string("wandb", None, "project of Weights & Biases to log to as well")
PROFILE = flags.DEFINE_string("profile", None, "START:N traces N steps from step START into WORKDIR/profile")


def profiled_steps(text: str | None, num_steps: int):
    """'START:N' -> (START, N). Raises UserError where the run has no such steps."""
    if text is None:
        return None
    start, _, n = text.partition(":")
    if not (start.isdecimal() and n.isdecimal() and int(n) > 0 and int(start) + int(n) <= num_steps):
        raise UserError(f"--profile={text} must be START:N with START + N at most train.num_steps = "
                        f"{num_steps}, such as --profile=10:3")
    return int(start), int(n)


def writable_folder(path: str) -> Path:
    """Makes the folder. Raises UserError where this process cannot write there, or it is another than that of
    process 0."""
    folder, token = paths.path(path), distributed.broadcast(secrets.token_hex(8))
    proof = folder / ".writable"
    try:
        if distributed.is_writer():
            folder.mkdir(parents=True, exist_ok=True)
            proof.write_text(token)
        distributed.wait_for_all()
        same = proof.exists() and proof.read_text() == token
        if same and not distributed.is_writer():
            mine = proof.with_name(f"{proof.name}.{jax.process_index()}")
            mine.write_text(token)
            mine.unlink()
        distributed.wait_for_all()
        if distributed.is_writer():
            proof.unlink()
    except OSError as e:
        who = f" by process {jax.process_index()}, on {platform.node()}," if jax.process_count() > 1 else ""
        kind = Unreachable if unanswered(e) else UserError
        raise kind(f"--workdir={path} is not writable{who} ({e.strerror or e}); choose another folder") from e
    if not same:
        raise UserError(f"--workdir={path} is not the folder that process 0 writes to: name one that all hosts "
                        "share")
    return folder


def main() -> None:
    if CONFIG.value is None or WORKDIR.value is None:
        raise UserError("--config=experiments/FILE.py and --workdir=DIR are both needed; see --help")
    distributed.start_process(saves=True)
    cfg = config.absolute(experiment.read(CONFIG))
    workdir = writable_folder(WORKDIR.value)
    if exported.about(workdir):
        raise UserError(f"{workdir} is an export, which has no optimizer to go on with: train in another "
                        "--workdir, which can begin with its parameters (train.init_from)")
    if paths.in_bucket(workdir) and PROFILE.value:
        raise UserError("--profile writes to a local --workdir only")
    mesh = sharding.make_mesh(cfg.mesh)
    objectives.check_mesh(cfg, mesh)
    with jax.set_mesh(mesh):
        if DRY_RUN.value:
            from tfusion.training.dry_run import dry_run
            dry_run(cfg, mesh)
            return
        from tfusion.training.goodput import process_began
        from tfusion.training.loop import train
        with workdirs.hold(workdir / workdirs.LOCK) if distributed.is_writer() else contextlib.nullcontext():
            train(cfg, workdir, mesh, profiled_steps(PROFILE.value, cfg.train.num_steps), WANDB.value,
                  RESUME.value, process_began())


if __name__ == "__main__":
    run(main)
