"""Measures a trained Transfusion and writes `<workdir>/evaluation/`: metrics.json, samples, pictures' data.

  python -m tfusion.evaluate --workdir=runs/quickstart/transfusion
  python -m tfusion.evaluate --workdir=/mnt/copied --config.data.prepared=/mnt/data     where the data are now
"""

import json
import time
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from tfusion import config, distributed, paths, sharding
from tfusion.config import replace_text
from tfusion.errors import UserError, parsing, run
from tfusion.evals.measure import measure
from tfusion.inference import trained
from tfusion.training.metrics import write_timing

WORKDIR = paths.define("workdir", None, "workdir of a trained Transfusion")
NUM_SCENES = flags.DEFINE_integer("num_scenes", 256, "held-out scenes to draw and to describe",
                                  lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of the sampling", lower_bound=0, upper_bound=2**32 - 1)
STEP = flags.DEFINE_integer("step", None, "which checkpoint; default: the latest")
MESH = flags.DEFINE_string("mesh", None, "devices to spread the model over, such as fsdp=4; default: one")
with parsing():
    DATA = config_flags.DEFINE_config_dict(
        "config", ConfigDict({"data": {"prepared": config_dict.placeholder(str)}}),
        help_string="--config.data.KEY=VALUE: other than in the run's config.json")


def main() -> None:
    if WORKDIR.value is None:
        raise UserError("--workdir=DIR is needed: the workdir of a trained Transfusion")
    distributed.start_process()
    began, workdir = time.perf_counter(), Path(WORKDIR.value)
    mesh = sharding.parse_mesh(MESH.value)
    jax.set_mesh(mesh)
    run_ = trained.load(workdir, STEP.value, mesh)
    cfg = config.changed(run_.cfg, {"data.prepared": DATA.value.data.prepared})
    if cfg.objective != "transfusion":
        raise UserError(f"{workdir} holds a run with objective = '{cfg.objective}', not 'transfusion'")
    folder = workdir / "evaluation"
    folder.mkdir(exist_ok=True)
    needs_data = DATA.value.data.prepared is not None
    result = measure(run_, cfg, folder, NUM_SCENES.value, SEED.value, needs_data)
    tree = cfg.to_dict()
    result |= {"seed": SEED.value, "step": run_.step, "data": tree["data"], "sampling": tree["sampling"],
               "jax": jax.__version__}
    write_timing(folder, "evaluate", time.perf_counter() - began)
    replace_text(folder / "metrics.json", json.dumps(result, indent=1) + "\n")  # last: all is there
    by_class = result.get("classes", {}).values()
    for m in (*result["metrics"].values(), *(m for figures in by_class for m in figures.values())):
        interval = f"  [{m['low']:.3f}, {m['high']:.3f}]" if m["low"] is not None else ""
        chance = f"  chance {m['chance']:.3f}" if m["chance"] is not None else ""
        count = f"  n {m['n']}" if m["n"] is not None else ""
        value = "    none" if m["value"] is None else f"{m['value']:8.3f}"
        print(f"{value}  {m['title']}{count}{interval}{chance}")


if __name__ == "__main__":
    run(main)
