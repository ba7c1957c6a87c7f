"""Will it fit, how long will it take, what will it cost: for a TPU slice that you do not have yet.

  python -m tfusion.plan --config=experiments/transfusion.py:7b --topology=v5p-256 --tokens=0.5e12
  ... --topology=2xv5litepod-256 --config.mesh.data=2    two slices
  ... --search     tries other meshes, remat policies and micro-batches
  ... --json       one JSON object on stdout
  ... --topology=h100-64     GPUs: by formula, nothing is compiled

Compiles the real training step ahead of time (1-3 minutes at 7B), with no TPU and no data; needs libtpu:
`pip install '.[tpu]'`. The same step for the same slice is not compiled again (planning/cache.py), but for
--search.
"""

import json

from absl import flags

from tfusion import config, distributed, experiment
from tfusion.accelerators import parse_accelerator
from tfusion.errors import UserError, run
from tfusion.planning import cache, text, topology
from tfusion.planning.plan import make_plan

CONFIG = experiment.define()
TOPOLOGY = flags.DEFINE_string("topology", None, "v5p-256, v5litepod-16, 2xv6e-256, h100-64, ...")
NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "TPU slices over the data-centre network", lower_bound=1)
TOKENS = flags.DEFINE_float("tokens", None, "tokens and patches to train on; default: the config's num_steps")
FLOPS = flags.DEFINE_float("flops", None, "or a budget by the paper's 6 N D")
SEARCH = flags.DEFINE_bool("search", False, "look for the fastest configuration that fits")
JSON = flags.DEFINE_bool("json", False, "print one JSON object")


def main() -> None:
    if CONFIG.value is None or TOPOLOGY.value is None:
        raise UserError("--config=experiments/FILE.py and --topology=v5p-256 are both needed; see --help")
    if TOKENS.value is not None and FLOPS.value is not None:
        raise UserError("--tokens and --flops exclude each other")
    for name, value in (("tokens", TOKENS.value), ("flops", FLOPS.value)):
        if value is not None:
            config.check_number(f"--{name}", value)
    accelerator = parse_accelerator(TOPOLOGY.value, NUM_SLICES.value)
    cfg = experiment.read(CONFIG)
    topology.use_host_only()
    distributed.limit_heaps()
    asked = cfg, accelerator, experiment.given(), TOKENS.value, FLOPS.value
    plan = make_plan(*asked, search_too=True) if SEARCH.value else cache.planned(*asked)
    print(json.dumps(plan) if JSON.value else text.render(plan))


if __name__ == "__main__":
    run(main)
