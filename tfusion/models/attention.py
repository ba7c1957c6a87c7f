"""Attention over key intervals on a mesh: rows over batch, heads over heads, positions over length.

Context parallelism is in the axes alone: each device has a slice of the queries and gathers all keys and
values of its rows (their gradients are summed back), with the queries' intervals in whole-row positions.
A ring would hide that gather behind compute, but its steps are uneven under this mask, and keys and
values, a fraction of the activations with grouped heads, fit.

B batch, T positions, H query heads, K key/value heads, E head dimension.
"""

from tfusion.kernels import interval_attention
from tfusion.sharding import sharded

QUERIES = ("batch", "length", "heads", "head_dim")
KEYS = ("batch", None, "kv_heads", "head_dim")
BOUNDS = ("batch", "length")


def attention(q_BTHE, k_BTKE, v_BTKE, k_start_BT, k_end_BT):
    """softmax(q k^T / sqrt(E)) v over each query's interval k_start <= k < k_end. Returns (B, T, H, E)."""
    kernel = sharded(interval_attention.attention, (QUERIES, KEYS, KEYS, BOUNDS, BOUNDS), QUERIES)
    return kernel(q_BTHE, k_BTKE, v_BTKE, k_start_BT, k_end_BT)
