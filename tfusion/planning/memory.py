"""HBM per chip by part: exact where it follows from shardings, an estimate for what the compiler decides."""

import math
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh

from tfusion.config import RunConfig
from tfusion.objectives import kind_of
from tfusion.planning.collectives import exchanged_parameters
from tfusion.planning.compile import abstract_batch, abstract_frozen
from tfusion.planning.walk import Work
from tfusion.sharding import placed
from tfusion.training.state import TrainState


class Memory(NamedTuple):
    """Bytes per chip. The first four are exact; the rest is estimated."""

    parameters: float
    optimizer: float
    ema: float
    batch: float  # and buffers and frozen trees, where there are any
    gradients: float  # float32, sharded as the parameters
    residuals: float  # kept from forward to backward (remat decides)
    working: float  # one layer's arrays, or the LM head's, and gathered weights

    @property
    def total(self) -> float:
        return sum(self)

    @property
    def arguments(self) -> float:
        """What is there before and after the step."""
        return self.parameters + self.optimizer + self.ema + self.batch


def bytes_per_chip(tree) -> int:
    """Bytes of a tree of shaped, sharded leaves on one chip."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(tree))


def estimate(cfg: RunConfig, boxed_state: TrainState, mesh: AbstractMesh, work: Work) -> Memory:
    """The working set: two copies of the largest matrix product (logits and their gradient), one layer's
    activations, two layers' gathered weights."""
    shape, micros = mesh.shape, cfg.train.num_microbatches
    state = placed(boxed_state, mesh)
    largest = work.largest_bytes / math.prod(shape.values())
    parameters = bytes_per_chip(state.params)
    return Memory(
        parameters=parameters,
        optimizer=bytes_per_chip(state.opt_state),
        ema=bytes_per_chip(state.ema_params),
        batch=bytes_per_chip((abstract_batch(cfg, mesh), state.buffers, abstract_frozen(cfg, mesh))),
        gradients=parameters * (1 if micros == 1 else 2),  # the running sum, and one micro-batch's
        residuals=work.residual_bytes / (shape["data"] * shape["fsdp"] * shape["sequence"]),
        working=2 * largest + layers(cfg, boxed_state, shape))


def layers(cfg: RunConfig, boxed_state: TrainState, shape: dict[str, int]) -> float:
    """Bytes of one layer's activations and of two layers' gathered weights; 0 without a transformer."""
    trunk = kind_of(cfg).trunk(cfg)
    if trunk is None:
        return 0.0
    m, width = trunk.model, 2 if trunk.model.compute_dtype == "bfloat16" else 4
    rows = cfg.train.batch_size / (shape["data"] * shape["fsdp"] * cfg.train.num_microbatches)
    length = trunk.seq_len / shape["sequence"]
    weights = 2 * exchanged_parameters(boxed_state.params, shape) / m.num_layers * width * (shape["fsdp"] > 1)
    return rows * length * (8 * m.d_model + 4 * m.d_ff / shape["tensor"]) * width + weights
