"""HBM per chip by part: exact where it follows from shardings, an estimate for what the compiler decides."""

import math
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh

from tfusion.config import Config
from tfusion.planning.collectives import exchanged_parameters
from tfusion.planning.compile import abstract_batch, place
from tfusion.planning.walk import Work
from tfusion.training.state import TrainState


class Memory(NamedTuple):
    """Bytes per chip. The first four are exact; the rest is estimated."""

    parameters: float
    optimizer: float
    ema: float
    batch: float
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


def estimate(cfg: Config, boxed_state: TrainState, mesh: AbstractMesh, work: Work) -> Memory:
    """The working set: two copies of the largest matrix product (logits and their gradient), one layer's
    activations, two layers' gathered weights."""
    shape = mesh.shape
    state = place(boxed_state, mesh)
    m, micros = cfg.model, cfg.train.num_microbatches
    width = 2 if m.compute_dtype == "bfloat16" else 4
    rows = cfg.train.batch_size / (shape["data"] * shape["fsdp"] * micros)
    length = cfg.data.seq_len / shape["sequence"]
    layer = rows * length * (8 * m.d_model + 4 * m.d_ff / shape["tensor"]) * width
    weights = 2 * exchanged_parameters(boxed_state.params, shape) / m.num_layers * width * (shape["fsdp"] > 1)
    largest = work.largest_bytes / math.prod(shape.values())
    parameters = bytes_per_chip(state.params)
    return Memory(
        parameters=parameters,
        optimizer=bytes_per_chip(state.opt_state),
        ema=bytes_per_chip(state.ema_params),
        batch=bytes_per_chip(abstract_batch(cfg, mesh)),
        gradients=parameters * (1 if micros == 1 else 2),  # the running sum, and one micro-batch's
        residuals=work.residual_bytes / (shape["data"] * shape["fsdp"] * shape["sequence"]),
        working=2 * largest + layer + weights)
