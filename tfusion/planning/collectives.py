"""Bytes that a chip receives from other chips in one step: from shardings, never from the compiled text.

What is exchanged, weights and activations in bf16 where the matmuls are bf16, gradients of weights in f32
(tests/collectives.txt lists them for a small step):
  fsdp gather      each weight, before the forward and before the backward pass of every micro-batch; a
                   recomputed forward (remat) shares the backward's gather
  fsdp scatter     each weight's gradient, every micro-batch
  data reduce      each weight's gradient over 'data', every micro-batch, on its fsdp shard
  tensor reduce    activations: after attention's and the MLP's output matrices forward, before their input
                   matrices backward, after attention again where the forward is recomputed; embedding, LM head
  sequence keys    keys and values of whole rows: gathered before attention, again where the forward is
                   recomputed; their gradients summed (the psum that shard_map's transpose makes)
  sequence reduce  each weight's gradient over 'sequence', every micro-batch, on its fsdp shard
Left out: what the LM head and the image adapter gather over 'sequence', about as much as one layer's keys.
A ring over n chips receives (n - 1) / n of the gathered bytes, an all-reduce twice that.
"""

import math
from typing import NamedTuple

import jax
from flax import linen as nn

from tfusion.config import RunConfig
from tfusion.objectives import kind_of
from tfusion.objectives.base import Trunk
from tfusion.sharding import RULES


class Collectives(NamedTuple):
    """Bytes received per chip and step."""

    fsdp_gather: float
    fsdp_scatter: float
    data_reduce: float
    tensor_reduce: float
    sequence_keys: float
    sequence_reduce: float

    @property
    def total(self) -> float:
        return sum(self)


def ring(n: int) -> float:
    return (n - 1) / n


def exchanged_parameters(boxed_params, shape: dict[str, int]) -> float:
    """Parameters that one chip needs whole for its part of the matmuls: all, less what 'tensor' splits."""
    total = 0.0
    for leaf in jax.tree.leaves(boxed_params, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else ()
        split = any(RULES.get(name) == "tensor" for name in names)
        total += math.prod(nn.meta.unbox(leaf).shape) / (shape["tensor"] if split else 1)
    return total


def collectives(cfg: RunConfig, boxed_params, shape: dict[str, int]) -> Collectives:
    """shape: {'data', 'fsdp', 'sequence', 'tensor'} -> number of chips."""
    trunk, micros = kind_of(cfg).trunk(cfg), cfg.train.num_microbatches
    width = 2 if trunk and trunk.model.compute_dtype == "bfloat16" else 4
    parameters = exchanged_parameters(boxed_params, shape)
    weights, grads = parameters * width, parameters * 4
    tensor, keys = activations(cfg, trunk, shape, width) if trunk else (0.0, 0.0)
    return Collectives(
        fsdp_gather=2 * micros * weights * ring(shape["fsdp"]),
        fsdp_scatter=micros * grads * ring(shape["fsdp"]),
        data_reduce=2 * micros * grads / shape["fsdp"] * ring(shape["data"]),
        tensor_reduce=2 * tensor * ring(shape["tensor"]),
        sequence_keys=keys * ring(shape["sequence"]),
        sequence_reduce=2 * micros * grads / shape["fsdp"] * ring(shape["sequence"]))


def activations(cfg: RunConfig, trunk: Trunk, shape: dict[str, int], width: int) -> tuple[float, float]:
    """Bytes per chip and step that 'tensor' reduces, and that 'sequence' exchanges of keys and values."""
    m, recomputed = trunk.model, trunk.model.remat != "none"
    positions = cfg.train.batch_size * trunk.seq_len / (shape["data"] * shape["fsdp"])  # of whole rows
    reduces = m.num_layers * (4 + recomputed) + 2  # + embedding, LM head
    keys = 2 * positions * m.num_kv_heads * m.head_dim / shape["tensor"] * width  # and values, of a layer
    return (reduces * positions / shape["sequence"] * m.d_model * width,
            m.num_layers * (1 + recomputed + 2) * keys)
