"""`train --dry_run`: everything a run would build, compiled and printed, nothing trained."""

import math
import time

import jax
import numpy as np
from flax import linen as nn

from tfusion import sharding
from tfusion.config import RunConfig
from tfusion.data import pipeline
from tfusion.objectives import kind_of
from tfusion.training import state as states
from tfusion.training import step as steps
from tfusion.training.optimizer import make_optimizer


def parameter_table(params, mesh) -> list[str]:
    """One line per parameter: name, shape, count, logical axes, and the sharding those give on the mesh."""
    boxed = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    placed = jax.tree.leaves(sharding.shardings(params, mesh))
    lines, total = [], 0
    for (path, leaf), place in zip(boxed, placed):
        name = "/".join(str(key.key) for key in path)
        axes = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else ()
        shape = nn.meta.unbox(leaf).shape
        total += math.prod(shape)
        lines.append(f"{name:48s} {shape!s:20s} {math.prod(shape):>13,d}  "
                     f"{','.join(str(a) for a in axes):24s} {place.spec}")
    return [*lines, f"{'total':48s} {'':20s} {total:>13,d}"]


def dry_run(cfg: RunConfig, mesh) -> None:
    kind, objective = kind_of(cfg), kind_of(cfg).make(cfg)
    tx, ema = make_optimizer(cfg.optimizer, cfg.train.num_steps), cfg.optimizer.ema_decay > 0
    print(f"mesh {dict(mesh.shape)} on {mesh.size} x {jax.devices()[0].device_kind}")
    print("\n".join(parameter_table(states.abstract_state(objective, tx, ema).params, mesh)))
    rows = kind.open_rows(cfg)
    batch = next(pipeline.batches(rows, 0, 1, cfg.train.batch_size,
                                  sharding.local_rows(mesh, cfg.train.batch_size)))
    for name, value in batch._asdict().items():
        print(f"batch.{name:18s} {value.shape!s:20s} {value.dtype}  {np.array2string(value.ravel()[:12])}")
    state = states.restore_target(objective, tx, ema, mesh)
    frozen = sharding.whole(jax.eval_shape(objective.frozen), mesh)
    began = time.perf_counter()
    step = steps.jit_train_step(objective, tx, cfg, state)
    compiled = step.lower(state, frozen, sharding.put_batch(batch, mesh, cfg.train.batch_size)).compile()
    print(f"the training step compiles in {time.perf_counter() - began:.1f} s")
    chip, memory = jax.devices()[0].device_kind, compiled.memory_analysis()
    print(f"memory as this machine's compiler lays it out for {chip}; for a TPU slice: python -m tfusion.plan")
    for name in ("argument", "output", "alias", "temp"):
        print(f"memory.{name:12s} {getattr(memory, name + '_size_in_bytes') / 2**20:10.1f} MiB per {chip}")
    print("--dry_run stops here")
