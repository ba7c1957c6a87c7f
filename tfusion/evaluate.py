"""Measures a trained run and writes `<workdir>/evaluation/`: metrics.json, and what the report shows.

  python -m tfusion.evaluate --workdir=runs/quickstart/transfusion
  python -m tfusion.evaluate --workdir=/mnt/copied --config.data.prepared=/mnt/data     where the data are now;
      pictures are read from the raw ones: --config.data.sources.NAME.path=DIR
  python -m tfusion.evaluate --workdir=runs/quickstart/transfusion --follow     each checkpoint of a run under
      way, into evaluation/steps/<step>/, until the run is done

Any run: what it cannot do, or has no data for, is named and left out.
"""

import contextlib
import re
import sys
import tempfile
import time
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from tfusion import config, distributed, paths, sharding
from tfusion.errors import UserError, parsing, run
from tfusion.evals.base import Options, prepared_folder
from tfusion.evals.follow import follow
from tfusion.evals.measure import evaluate
from tfusion.inference import trained

WORKDIR = paths.define("workdir", None, "workdir of a run; gs:// too", buckets=True)
NUMBER = flags.DEFINE_integer("number", 256, "of pictures, captions and documents looked at", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of the sampling", lower_bound=0, upper_bound=2**32 - 1)
STEP = flags.DEFINE_integer("step", None, "which checkpoint; default: the latest")
MESH = flags.DEFINE_string("mesh", None,
                           "devices to spread the model over, such as fsdp=4; default: one, or all processes'")
FOLLOW = flags.DEFINE_bool("follow", False, "wait for new checkpoints and evaluate each, until the run is done")
POLL = flags.DEFINE_float("poll_seconds", 30.0, "how long --follow waits between looks", lower_bound=0.1)
# Sources are the run's own: those that flags name have a place for their path; `load` sees whether it has them.
NAMED = re.findall(r"(?m)^--?config\.data\.sources\.(\w+)\.path\b", "\n".join(sys.argv))
with parsing():
    DATA = config_flags.DEFINE_config_dict(
        "config", ConfigDict({"data": {"prepared": config_dict.placeholder(str), "sources": {
            name: {"path": config_dict.placeholder(str)} for name in NAMED}}}),
        help_string="--config.data.prepared=DIR, --config.data.sources.NAME.path=DIR: where the data are now")


def load(workdir: Path, step: int | None, mesh) -> trained.Trained:
    """The run, its config with the flags put in. Data that are there, or named by flag, must be the run's."""
    opened = trained.load(workdir, step, mesh)
    named, sources = DATA.value.data.prepared, DATA.value.data.sources
    cfg = config.changed(opened.cfg, {"data.prepared": named} | {
        f"data.sources.{name}.path": sources[name].path for name in sources})
    folder = prepared_folder(cfg)
    if folder and (named or folder.exists()):
        trained.check_data(opened, folder)
    return opened._replace(cfg=cfg)


@contextlib.contextmanager
def written(folder: Path):
    """The folder itself in the process that writes; of others, which measure the same, one that goes again."""
    if distributed.is_writer():
        yield folder
    else:
        with tempfile.TemporaryDirectory() as other:
            yield Path(other)


def show(metrics: dict) -> None:
    for m in metrics.values():
        interval = f"  [{m['low']:.3f}, {m['high']:.3f}]" if m["low"] is not None else ""
        chance = f"  chance {m['chance']:.3f}" if m["chance"] is not None else ""
        count = f"  n {m['n']}" if m["n"] is not None else ""
        value = "    none" if m["value"] is None else f"{m['value']:8.3f}"
        print(f"{value}  {m['title']}{count}{interval}{chance}")


def main() -> None:
    if WORKDIR.value is None:
        raise UserError("--workdir=DIR is needed: the workdir of a run")
    if FOLLOW.value and STEP.value is not None:
        raise UserError("--follow and --step exclude each other")
    distributed.start_process()
    workdir, mesh = paths.path(WORKDIR.value), sharding.parse_mesh(MESH.value)
    jax.set_mesh(mesh)
    options = Options(SEED.value, NUMBER.value)

    def one(step: int | None, folder: Path) -> None:
        opened = load(workdir, step, mesh)
        print(f"step {opened.step}")
        with written(folder) as place:
            show(evaluate(opened, place, options)["metrics"])

    if not FOLLOW.value:
        return one(STEP.value, workdir / "evaluation")
    if jax.process_count() > 1:
        raise UserError("--follow is for one process: start it alone, beside the run")
    if not workdir.is_dir():
        raise UserError(f"there is no run at {workdir}")
    follow(workdir, one, lambda: time.sleep(POLL.value))


if __name__ == "__main__":
    run(main)
