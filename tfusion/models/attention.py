"""Attention over key intervals: query q sees the keys k_start[q] <= k < k_end[q].

B batch, T tokens, H query heads, K key/value heads (H a multiple of K), G = H / K, E head dimension.
"""

import jax
import jax.numpy as jnp

HIDDEN = -1e9  # added to the logit of a key out of sight; every query sees itself, so no row is empty


def attention(q_BTHE, k_BTKE, v_BTKE, k_start_BT, k_end_BT):
    """softmax(q k^T / sqrt(E)) v over each query's interval; softmax in float32. Returns (B, T, H, E)."""
    B, T, H, E = q_BTHE.shape
    K, G = k_BTKE.shape[2], H // k_BTKE.shape[2]
    keys = jnp.arange(T, dtype=jnp.int32)
    visible_BTS = (k_start_BT[..., None] <= keys) & (keys < k_end_BT[..., None])
    bias_BTS = jnp.where(visible_BTS, 0.0, HIDDEN).astype(jnp.float32)
    # Batch and heads folded, heads in front of positions: the batched matmul that XLA:CPU runs fastest.
    q = (q_BTHE * E**-0.5).reshape(B, T, K, G, E).transpose(0, 2, 3, 1, 4).reshape(B * K, G * T, E)
    k = k_BTKE.transpose(0, 2, 1, 3).reshape(B * K, T, E)
    v = v_BTKE.transpose(0, 2, 1, 3).reshape(B * K, T, E)
    logits = jnp.einsum("nqe,nse->nqs", q, k, preferred_element_type=jnp.float32)
    logits = (logits.reshape(B, K * G, T, T) + bias_BTS[:, None]).reshape(B * K, G * T, T)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    weights = (weights / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
    out = jnp.einsum("nqs,nse->nqe", weights, v)
    return out.reshape(B, K, G, T, E).transpose(0, 3, 1, 2, 4).reshape(B, T, H, E)
