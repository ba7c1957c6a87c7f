"""A kind of training that the package knows nothing of: a line fitted to points.

It has what none of the package's own kinds has: buffers (how many points it has seen) and a frozen tree (the
offset that is taken off its points). `python -m tfusion.<verb>` runs it where this module was imported.
"""

import dataclasses
import runpy
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.common import run
from tfusion import inference
from tfusion.config import RunConfig, fraction
from tfusion.data import pipeline
from tfusion.objectives.base import Aux, Expected, Kind, Objective, register

OFFSET = 3.0


@dataclasses.dataclass(frozen=True)
class ToyConfig(RunConfig):
    width: int
    noise: float = fraction()


class ToyBatch(NamedTuple):
    row_ids_B: np.ndarray
    x_BD: np.ndarray
    y_B: np.ndarray


class ToyRows:
    identity, where, assets = {"points": "of a line"}, "the line", ()

    def __init__(self, width: int, seed: int, number: int | None = None):
        self.width, self.seed, self.number = width, seed, number

    def __len__(self) -> int:
        return self.number

    def read(self, rows) -> list[ToyBatch]:
        return [self._row(row) for row in rows]

    def _row(self, row: int) -> ToyBatch:
        x_D = np.random.default_rng([self.seed, row]).standard_normal(self.width).astype(np.float32)
        return ToyBatch(np.int32(row), x_D, np.float32(x_D.sum() + OFFSET))

    def stats(self, row: int) -> dict:
        return {"data/row": row}

    def check(self, batch) -> None:
        assert batch.x_BD.shape[1:] == (self.width,)

    def batches(self, batch_size: int, local_rows=None):
        return pipeline.batches(self, 0, self.number // batch_size, batch_size, local_rows)


def make(cfg: ToyConfig) -> Objective:
    def init(key):
        weights = jax.random.normal(key, (cfg.width,))
        return {"line_kernel": nn.LogicallyPartitioned(weights, ("embed",))}

    def loss(params, aux: Aux, batch: ToyBatch, key):
        draw = jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(key, row)))
        noise = cfg.noise * draw(batch.row_ids_B)
        error = batch.x_BD @ params["line_kernel"] + noise - (batch.y_B - aux.frozen["offset"])
        return {"error": (jnp.sum(error**2), len(error))}

    return Objective(
        init=init, loss=loss, counts=lambda batch: {"error": len(batch.y_B)}, weights={"error": 1.0},
        init_buffers=lambda key: {"seen": jnp.zeros((), jnp.int32)},
        after_update=lambda params, buffers, batch, key: {"seen": buffers["seen"] + len(batch.y_B)},
        frozen=lambda: {"offset": jnp.float32(OFFSET)})


def abstract_batch(cfg: ToyConfig) -> ToyBatch:
    B = cfg.train.batch_size
    return ToyBatch(jax.ShapeDtypeStruct((B,), jnp.int32), jax.ShapeDtypeStruct((B, cfg.width), jnp.float32),
                    jax.ShapeDtypeStruct((B,), jnp.float32))


def flops(cfg: ToyConfig) -> float:
    return 4.0 * cfg.width * cfg.train.batch_size


register("toy", Kind(
    config=ToyConfig, make=make,
    open_rows=lambda cfg: ToyRows(cfg.width, cfg.seed),
    open_heldout=lambda cfg, documents=None: {"line": ToyRows(cfg.width, 1000, min(documents or 32, 32))},
    abstract_batch=abstract_batch,
    totals=lambda cfg, batch: {"points": len(batch.y_B), "flops": flops(cfg)},
    expected=lambda cfg: Expected(0, 0, 0, {"line": flops(cfg)}, "points as they come")))
inference.register("toy", lambda run: inference.Decoder(
    reconstruct=lambda run, pictures: pictures,
    go_on=lambda run, documents, **options: [["a line"] for _ in documents]))


def get_config(arg=None) -> dict:
    tree = dict(objective="toy", **run(), width=8, noise=0.01)
    tree["optimizer"] |= dict(learning_rate=0.05, warmup_steps=2, ema_decay=0.5)
    tree["train"] |= dict(num_steps=200, batch_size=8, log_every=10, eval_every=100, eval_documents=16,
                          diagnostics_every=100, checkpoint_every=100)
    return tree


if __name__ == "__main__":  # python -m tests.toy VERB FLAGS
    del sys.argv[0]
    runpy.run_module(f"tfusion.{sys.argv[0]}", run_name="__main__", alter_sys=True)
