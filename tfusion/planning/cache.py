"""Plans that were made before: a compile takes minutes, and what it says depends on few things.

A JSON file a plan in $XDG_CACHE_HOME/tfusion/plans, or ~/.cache/tfusion/plans, named by a digest of all that
decides it: the config without values that only scale numbers or name places, the slice and its chip's figures,
the versions of what compiles, XLA's flags, and this package's own source as far as a plan is made of it. The
package's version would not do: it stands still while the model is worked on. Steps and prices are not in it:
the run's length and cost are worked out anew at every reading.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path

import jax

from tfusion import distributed
from tfusion.accelerators import Accelerator
from tfusion.config import RunConfig
from tfusion.objectives import kind_of
from tfusion.paths import replace_text
from tfusion.planning import plan, roofline, topology

# What may be edited without an old plan being wrong is not here: verbs, prices (the chip's figures are in the
# key), how a run is read, logged, saved, evaluated. tests/planning/test_cache.py holds it against what a plan
# imports.
SOURCES = ("config.py", "sharding.py", "types.py", "data", "diffusion", "kernels", "models", "objectives",
           "planning", "training/optimizer.py", "training/state.py", "training/step.py")
COMPILERS = ("jax", "jaxlib", "flax", "optax")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
NEEDED = {"step", "parameters", "notes", "fits", "compiler", "memory"}  # of a plan that was kept
ASIDE = ("seed", "data.prepared", "optimizer.learning_rate", "train.num_steps", "train.branch_from",
         "train.init_from")  # two configs that differ in these alone have one plan


def planned(cfg: RunConfig, accelerator: Accelerator, experiment: str, tokens: float | None = None,
            total_flops: float | None = None) -> dict:
    """plan.make_plan's, read where it was made before. Raises UserError on what cannot be."""
    name = key(cfg, accelerator)
    if (found := read(name)) is not None:
        where = f"from {folder() / name}.json, as it was made before"
        return for_run(found | {"notes": [*found["notes"], where]}, cfg, accelerator, experiment, tokens,
                       total_flops)
    made = plan.make_plan(cfg, accelerator, experiment, tokens, total_flops)
    keep(name, made)
    return made


def for_run(found: dict, cfg: RunConfig, accelerator: Accelerator, experiment: str, tokens: float | None = None,
            total_flops: float | None = None) -> dict:
    """A plan that was made of the same step, with the length and the price of this run."""
    step = roofline.Step(**found["step"])
    run = roofline.run(cfg, accelerator, step, found["parameters"], tokens, total_flops)
    return found | {"experiment": experiment, "accelerator": plan.accelerator_facts(accelerator),
                    "run": run._asdict()}


def folder() -> Path | None:
    """None where there is no home folder or it cannot be written: plans are made each time then."""
    return distributed.cache_folder("plans")


def key(cfg: RunConfig, accelerator: Accelerator) -> str:
    config = cfg.to_dict()
    for name in ASIDE:
        *groups, last = name.split(".")
        functools.reduce(lambda node, group: node.get(group, {}), groups, config).pop(last, None)
    versions = {name: importlib.metadata.version(name) for name in COMPILERS}
    if accelerator.chip.is_tpu:
        versions["libtpu"] = topology.libtpu_version()
    decides = [config, dataclasses.asdict(accelerator), accelerator.torus, accelerator.num_hosts, versions,
               {name: os.environ.get(name, "") for name in FLAGS}, jax.config.jax_enable_x64, source_digest(),
               own_source(cfg)]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:24]


@functools.cache
def source_digest() -> str:
    """Of the files that a plan is made of, by name and content."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(file for name in SOURCES for file in [root / name, *(root / name).rglob("*.py")]
                       if file.is_file()):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def own_source(cfg: RunConfig) -> str:
    """The file of a kind of training that is not of the package; '' of those that are."""
    path = Path(sys.modules[kind_of(cfg).make.__module__].__file__)
    return "" if path.is_relative_to(Path(__file__).parents[1]) else path.read_text()


def read(name: str) -> dict | None:
    """None where it is absent, or broken."""
    try:
        found = json.loads((folder() / f"{name}.json").read_text()) if folder() else None
    except (OSError, ValueError):
        return None
    whole = isinstance(found, dict) and found.keys() >= NEEDED and isinstance(found["step"], dict)
    return found if whole and found["step"].keys() == set(roofline.Step._fields) else None


def keep(name: str, made: dict) -> None:
    """Writes it in one move; where it cannot be written it is made again next time."""
    if folder():
        with contextlib.suppress(OSError):
            replace_text(folder() / f"{name}.json", json.dumps(made) + "\n")
