"""Attention over key intervals on a mesh: rows over batch, heads over heads, positions over length.

Context parallelism is in the axes alone: each device has a slice of the queries and gathers all keys and
values of its rows (their gradients are summed back), with the queries' intervals in whole-row positions.
A ring would hide that gather behind compute, but its steps are uneven under this mask, and keys and
values, a fraction of the activations with grouped heads, fit.

B batch, T queries, S positions of the row, L layers, H query heads, K key/value heads, E head dimension.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tfusion.kernels import interval_attention
from tfusion.sharding import sharded

QUERIES = ("batch", "length", "heads", "head_dim")
KEYS = ("batch", None, "kv_heads", "head_dim")
BOUNDS = ("batch", "length")


class Cache(NamedTuple):
    """What the positions of a row left for later ones to attend to, by position. A row holds one document."""

    keys_LBSKE: jax.Array  # in the compute dtype, rotated
    values_LBSKE: jax.Array


def write(cache: Cache, layer, k_BTKE, v_BTKE, positions_BT) -> Cache:
    """The cache with a layer's keys and values put at their positions; those past its end are dropped."""
    at = layer, jnp.arange(len(positions_BT))[:, None], positions_BT
    return Cache(*(old.at[at].set(new, mode="drop") for old, new in zip(cache, (k_BTKE, v_BTKE))))


def attention(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT):
    """softmax(q k^T / sqrt(E)) v over each query's interval k_start <= k < k_end. Returns (B, T, H, E)."""
    kernel = sharded(interval_attention.attention, (QUERIES, KEYS, KEYS, BOUNDS, BOUNDS), QUERIES)
    return kernel(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT)
