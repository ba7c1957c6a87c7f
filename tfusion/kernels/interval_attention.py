"""Attention over key intervals: query q sees the keys k_start[q] <= k < k_end[q].

FlashAttention-2 (Dao, arXiv 2307.08691): the softmax is built block by block, so that no T x S array ever
exists; the backward builds the blocks again from the saved logsumexp. Blocks out of sight are skipped
(block_map.py). What runs is decided when the program is lowered, by the platform it is lowered for:

  tpu     interval_attention_tpu.py   Pallas; compiled ahead of time for v5e, v5p and v6e, interpreted on a CPU
  cuda    interval_attention_gpu.py   Pallas-Triton; lowered to Triton IR and interpreted, not yet run on a GPU
  others  interval_attention_cpu.py   plain jax.numpy; dense where T x S is small

Each of the three has the same two functions:
  forward(q, k, v, k_start, k_end) -> out_BTHE, lse_BHT
  backward(q, k, v, k_start, k_end, out_BTHE, lse_BHT, dout_BTHE) -> dq, dk, dv

Kernels are not partitioned by the compiler: on a mesh of several devices call this inside shard_map
(`sharding.sharded`), with whole intervals. Queries may be a slice of the positions, against all keys.

B batch, T queries, S keys, H query heads, K key/value heads (H a multiple of K), E head dimension.
"""


import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tfusion.errors import UserError
from tfusion.kernels import interval_attention_cpu as cpu
from tfusion.kernels import interval_attention_gpu as gpu
from tfusion.kernels import interval_attention_tpu as tpu

# What a remat policy must keep (save_only_these_names) so that the backward does not run the forward again.
RESIDUAL_NAMES = ("attention_out", "attention_lse")


def attention(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT):
    """softmax(q k^T / sqrt(E)) v over each query's interval. Returns (B, T, H, E) in q's dtype.

    Intervals are positions in S, 0 <= k_start < k_end <= S: none may be empty (not checked; the result
    would be garbage). Softmax and accumulation are float32. Query head h reads key/value head h // (H / K).
    Raises UserError where shapes disagree.
    """
    _check(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT)
    return _attention(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT)


def reference(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT):
    """The definition: dense, float32, differentiated by jax."""
    _check(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT)
    (S, K), (H, E) = k_BSKE.shape[1:3], q_BTHE.shape[2:]
    q, k, v = (x.astype(jnp.float32) for x in (q_BTHE, k_BSKE, v_BSKE))
    k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    logits = jnp.einsum("bthe,bshe->bhts", q, k, precision="highest") * E**-0.5
    key = jnp.arange(S).reshape(1, 1, S)
    visible = (k_start_BT[..., None] <= key) & (key < k_end_BT[..., None])
    weights = jax.nn.softmax(jnp.where(visible[:, None], logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshe->bthe", weights, v, precision="highest").astype(q_BTHE.dtype)


def _check(q, k, v, k_start, k_end):
    B, T, H, E = q.shape
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != E:
        raise UserError(f"attention: queries {q.shape}, keys {k.shape} and values {v.shape} do not fit; "
                        "they are (B, T, H, E), (B, S, K, E), (B, S, K, E)")
    if H % k.shape[2]:
        raise UserError(f"attention: {H} query heads are not a multiple of {k.shape[2]} key/value heads")
    if k_start.shape != (B, T) or k_end.shape != (B, T):
        raise UserError(f"attention: intervals {k_start.shape}, {k_end.shape} are not (B, T) = {(B, T)}")


@jax.custom_vjp
def _attention(q, k, v, k_start, k_end):
    return _forward(q, k, v, k_start, k_end)[0]


def _forward(q, k, v, k_start, k_end):
    return jax.lax.platform_dependent(
        q, k, v, k_start, k_end, tpu=tpu.forward, cuda=gpu.forward, default=cpu.forward)


def _forward_and_residuals(q, k, v, k_start, k_end):
    out, lse = _forward(q, k, v, k_start, k_end)
    out, lse = (checkpoint_name(x, name) for x, name in zip((out, lse), RESIDUAL_NAMES))
    return out, (q, k, v, k_start, k_end, out, lse)


def _backward(residuals, dout):
    q, k, v, k_start, k_end, out, lse = residuals
    grads = jax.lax.platform_dependent(
        q, k, v, k_start, k_end, out, lse, dout, tpu=tpu.backward, cuda=gpu.backward, default=cpu.backward)
    return *grads, None, None


_attention.defvjp(_forward_and_residuals, _backward)
