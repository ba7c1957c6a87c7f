"""Model FLOPs of one training step, by part: what the mathematics needs, whatever the program recomputes.

A multiply-add is 2 FLOPs. A matrix costs its size times 2 forward and 4 backward (gradient of the input and of
the weights); where the input needs no gradient (an adapter's two inputs, latents and timestep features) only
2 backward. Attention costs 2 multiply-adds per visible (query, key) pair, head and head dimension, thrice.
Counted: positions that hold a token or a patch, the LM head where it is scored, slots that hold an image.

`six_n_d` is the paper's figure beside it: 6 N D with N = all parameters, both embeddings included (only so has
its 7B 6.74 B), D = text tokens and patches.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tfusion.models.transformer import TransformerConfig


class Counts(NamedTuple):
    """What a batch holds: numbers, or float32 scalars on a device."""

    text: Any  # positions with a token
    patches: Any
    scored: Any  # positions with an LM loss
    images: Any
    pairs: Any  # visible (query, key) pairs, padding excluded


def block_params(m: TransformerConfig) -> int:
    """Parameters in one block's matrices."""
    return m.d_model * m.head_dim * (2 * m.num_heads + 2 * m.num_kv_heads) + 3 * m.d_model * m.d_ff


def num_params(params) -> int:
    """N of 6 N D: every parameter of a tree of arrays or shapes, embeddings included."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def six_n_d(n: int, positions: float) -> float:
    """The paper's FLOPs of training N parameters on `positions` tokens and patches."""
    return 6.0 * n * positions


def visible_pairs(k_start_BT, k_end_BT, segment_ids_BT):
    """float32: how many (query, key) pairs a mask's intervals leave visible, padding excluded."""
    seen_BT = jnp.where(segment_ids_BT > 0, k_end_BT - k_start_BT, 0)
    low, high = (jnp.sum(part, axis=1) for part in (seen_BT % 4096, seen_BT // 4096))  # int32 up to T = 2^19
    return jnp.sum(high.astype(jnp.float32) * 4096 + low.astype(jnp.float32))


def transformer_flops(m: TransformerConfig, vocab_size: int, n: Counts) -> dict[str, Any]:
    """{part: FLOPs of forward and backward} of the blocks and the LM head."""
    per_position = 6.0 * m.num_layers * block_params(m)
    return {
        "text matmuls": per_position * n.text,
        "patch matmuls": per_position * n.patches,
        "lm head": 6.0 * m.d_model * vocab_size * n.scored,
        "attention": 12.0 * m.num_layers * m.num_heads * m.head_dim * n.pairs,
    }
