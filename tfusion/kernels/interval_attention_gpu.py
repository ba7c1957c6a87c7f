"""Interval attention as Pallas-Triton kernels: forward, dq, and dk with dv.

FlashAttention-2 (Dao, arXiv 2307.08691). One program per (query block, head, batch row), or (key block,
key/value head, batch row) for dk and dv. It loops over the blocks of its range only (block_map.Bounds):
first the fully visible ones, without mask arithmetic, then those at either side of them, masked. Arrays
stay (B, T, H, E): blocks are read with strides.

Not run on a GPU yet: lowered to Triton IR for cuda by `jax.export`, numbers checked by the interpreter on a
CPU. Block sizes follow what FlashAttention-2 uses on A100 and H100; they are not tuned.

B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, E head dimension; q, k in names of
blocks: queries and keys of a block.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tfusion.kernels.block_map import Bounds, key_bounds, num_blocks, pad_intervals, query_bounds

HIDDEN = -1e30  # not -inf: the difference of two must stay a number
SMALLEST = 16  # side of the smallest tensor-core product


class Launch(NamedTuple):
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


def launch(T: int, S: int, E: int, dtype, *, gradient: bool) -> Launch:
    """Tile sizes by the bytes of a head's row, shrunk to short sequences."""
    row = _power_of_two(E) * jnp.dtype(dtype).itemsize
    if gradient:  # two accumulators and twice the operands of the forward
        q, k, warps, stages = (64, 64, 4, 2) if row <= 256 else (32, 32, 4, 1)
    else:
        q, k, warps, stages = (128, 64, 4 if row <= 128 else 8, 2) if row <= 256 else (64, 32, 4, 1)
    return Launch(min(q, _power_of_two(T)), min(k, _power_of_two(S)), warps, stages)


def forward(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT, *, sizes=None, interpret=False):
    """out_BTHE in q's dtype and lse_BHT in float32."""
    (B, T, H, E), S = q_BTHE.shape, k_BSKE.shape[1]
    sizes = sizes or launch(T, S, E, q_BTHE.dtype, gradient=False)
    q, k, v = _pad(q_BTHE, sizes.block_q), _pad(k_BSKE, sizes.block_k), _pad(v_BSKE, sizes.block_k)
    bounds = key_bounds(k_start_BT, k_end_BT, sizes.block_q, sizes.block_k)
    at = _Specs(sizes.block_q, q, k)
    out, lse = pl.pallas_call(
        partial(_forward_kernel, block_k=sizes.block_k, scale=E**-0.5),
        grid=(q.shape[1] // sizes.block_q, H, B),
        in_specs=[at.bounds, at.queries, at.all_keys, at.all_keys, at.interval, at.interval],
        out_specs=[at.queries, at.per_query],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype),
                   jax.ShapeDtypeStruct((B, H, q.shape[1]), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=sizes.num_warps, num_stages=sizes.num_stages),
        interpret=interpret, name="interval_attention_forward",
    )(_stack(bounds), q, k, v, *pad_intervals(k_start_BT, k_end_BT, sizes.block_q))
    return out[:, :T, :, :E], lse[:, :, :T]


def backward(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT, out_BTHE, lse_BHT, dout_BTHE, *, sizes=None,
             interpret=False):
    """dq_BTHE, dk_BSKE, dv_BSKE in the dtypes of q, k and v."""
    (T, H, E), (S, K) = q_BTHE.shape[1:], k_BSKE.shape[1:3]
    sizes = sizes or launch(T, S, E, q_BTHE.dtype, gradient=True)
    block_q, block_k = sizes[:2]
    q, k, v, dout = (_pad(q_BTHE, block_q), _pad(k_BSKE, block_k), _pad(v_BSKE, block_k),
                     _pad(dout_BTHE, block_q))
    extra = ((0, 0), (0, 0), (0, q.shape[1] - T))
    delta_BHT = (out_BTHE.astype(jnp.float32) * dout_BTHE.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    arrays = (q, k, v, *pad_intervals(k_start_BT, k_end_BT, block_q), jnp.pad(lse_BHT, extra),
              jnp.pad(delta_BHT, extra), dout)
    settings = dict(scale=E**-0.5)
    call = partial(pl.pallas_call, interpret=interpret, compiler_params=plgpu.CompilerParams(
        num_warps=sizes.num_warps, num_stages=sizes.num_stages))
    at = _Specs(block_q, q, k)
    bounds = key_bounds(k_start_BT, k_end_BT, block_q, block_k)
    dq = call(
        partial(_dq_kernel, block_k=block_k, **settings), grid=(q.shape[1] // block_q, H, q.shape[0]),
        in_specs=[at.bounds, at.queries, at.all_keys, at.all_keys, at.interval, at.interval, at.per_query,
                  at.per_query, at.queries],
        out_specs=at.queries, out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype), name="interval_attention_dq",
    )(_stack(bounds), *arrays)
    bounds = query_bounds(bounds, num_blocks(S, block_k))
    at = _KeySpecs(block_k, q, k)
    dk, dv = call(
        partial(_dkv_kernel, block_q=block_q, **settings), grid=(k.shape[1] // block_k, K, k.shape[0]),
        in_specs=[at.bounds, at.all_queries, at.keys, at.keys, at.interval, at.interval, at.per_query,
                  at.per_query, at.all_queries],
        out_specs=[at.keys, at.keys], out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        name="interval_attention_dkv",
    )(_stack(bounds), *arrays)
    return dq[:, :T, :, :E], dk[:, :S, :, :E], dv[:, :S, :, :E]


class _Specs:
    """A program's view of the arrays: grid (query block, head, batch row)."""

    def __init__(self, block_q: int, q_BTHE, k_BSKE):
        (H, E), (S, K) = q_BTHE.shape[2:], k_BSKE.shape[1:3]
        self.bounds = pl.BlockSpec((None, None, 4), lambda i, h, b: (b, i, 0))
        self.queries = pl.BlockSpec((None, block_q, None, E), lambda i, h, b: (b, i, h, 0))
        self.all_keys = pl.BlockSpec((None, S, None, E), lambda i, h, b: (b, 0, h // (H // K), 0))
        self.interval = pl.BlockSpec((None, block_q), lambda i, h, b: (b, i))
        self.per_query = pl.BlockSpec((None, None, block_q), lambda i, h, b: (b, h, i))


class _KeySpecs:
    """A program's view of the arrays: grid (key block, key/value head, batch row)."""

    def __init__(self, block_k: int, q_BTHE, k_BSKE):
        (T, H, E), K = q_BTHE.shape[1:], k_BSKE.shape[2]
        self.bounds = pl.BlockSpec((None, None, 4), lambda j, h, b: (b, j, 0))
        self.keys = pl.BlockSpec((None, block_k, None, E), lambda j, h, b: (b, j, h, 0))
        self.all_queries = pl.BlockSpec((None, T, H // K, E), lambda j, h, b: (b, 0, h, 0))
        self.interval = pl.BlockSpec((None, T), lambda j, h, b: (b, 0))
        self.per_query = pl.BlockSpec((None, H // K, T), lambda j, h, b: (b, h, 0))


def _forward_kernel(bounds_ref, q_ref, k_ref, v_ref, k_start_ref, k_end_ref, out_ref, lse_ref, *, block_k,
                    scale):
    q, k_start, k_end = q_ref[...], k_start_ref[...], k_end_ref[...]

    def step(j, carry, masked):
        top, total, acc = carry
        at = pl.ds(j * block_k, block_k)
        s_qk = _scores(q, k_ref[at, :], scale)
        if masked:
            s_qk = jnp.where(_visible(s_qk.shape, j * block_k, k_start, k_end), s_qk, HIDDEN)
        new_top = jnp.maximum(top, s_qk.max(1))
        p_qk, rescale = jnp.exp(s_qk - new_top[:, None]), jnp.exp(top - new_top)
        v = v_ref[at, :]
        return (new_top, rescale * total + p_qk.sum(1),
                rescale[:, None] * acc + _dot(p_qk.astype(v.dtype), v, 1, 0))

    block_q, E = q.shape
    empty = (jnp.full((block_q,), HIDDEN, jnp.float32), jnp.zeros((block_q,), jnp.float32),
             jnp.zeros((block_q, E), jnp.float32))
    top, total, acc = _loop(bounds_ref, step, empty)
    out_ref[...] = (acc / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = top + jnp.log(total)


def _dq_kernel(bounds_ref, q_ref, k_ref, v_ref, k_start_ref, k_end_ref, lse_ref, delta_ref, dout_ref, dq_ref,
               *, block_k, scale):
    q, dout, lse, delta = q_ref[...], dout_ref[...], lse_ref[...], delta_ref[...]
    k_start, k_end = k_start_ref[...], k_end_ref[...]

    def step(j, dq, masked):
        at = pl.ds(j * block_k, block_k)
        k = k_ref[at, :]
        visible = _visible((q.shape[0], block_k), j * block_k, k_start, k_end) if masked else None
        _, ds_qk = _probabilities(q, k, v_ref[at, :], dout, lse, delta, visible, scale)
        return dq + _dot(ds_qk.astype(k.dtype), k, 1, 0)

    dq = _loop(bounds_ref, step, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


def _dkv_kernel(bounds_ref, q_ref, k_ref, v_ref, k_start_ref, k_end_ref, lse_ref, delta_ref, dout_ref, dk_ref,
                dv_ref, *, block_q, scale):
    k, v, first_key = k_ref[...], v_ref[...], pl.program_id(0) * k_ref.shape[0]

    def step(i, carry, masked, g):
        dk, dv = carry
        at = pl.ds(i * block_q, block_q)
        q, dout = q_ref[at, g, :], dout_ref[at, g, :]
        visible = None
        if masked:
            visible = _visible((block_q, k.shape[0]), first_key, k_start_ref[at], k_end_ref[at])
        p_qk, ds_qk = _probabilities(q, k, v, dout, lse_ref[g, at], delta_ref[g, at], visible, scale)
        return dk + _dot(ds_qk.astype(q.dtype), q, 0, 0), dv + _dot(p_qk.astype(dout.dtype), dout, 0, 0)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = lax.fori_loop(0, q_ref.shape[1], lambda g, carry: _loop(bounds_ref, partial(step, g=g), carry),
                           (zeros, zeros))
    dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _loop(bounds_ref, step, carry):
    """step(block, carry, masked) over the range: the fully visible blocks, then those before and after."""
    start, end, full_start, full_end = (bounds_ref[n] for n in range(4))
    carry = lax.fori_loop(full_start, full_end, partial(step, masked=False), carry)
    before = full_start - start

    def edge(n, carry):
        return step(jnp.where(n < before, start + n, full_end + n - before), carry, masked=True)

    return lax.fori_loop(0, before + end - full_end, edge, carry)


def _scores(q, k, scale):
    return _dot(q, k, 1, 1) * scale


def _visible(shape, first_key, k_start, k_end):
    key_qk = first_key + lax.broadcasted_iota(jnp.int32, shape, 1)
    return (k_start[:, None] <= key_qk) & (key_qk < k_end[:, None])


def _probabilities(q, k, v, dout, lse, delta, visible, scale):
    """The softmax of one block, and the gradient of its logits (but for the factor `scale`)."""
    s_qk = _scores(q, k, scale)
    p_qk = jnp.exp(s_qk - lse[:, None])
    if visible is not None:
        p_qk = jnp.where(visible, p_qk, 0.0)
    ds_qk = p_qk * (_dot(dout, v, 1, 1) - delta[:, None])
    return p_qk, ds_qk


def _dot(a, b, contract_a: int, contract_b: int):
    """Matrix product accumulated in float32; float32 factors are not rounded to TF32 first."""
    return lax.dot_general(
        a, b, (((contract_a,), (contract_b,)), ((), ())), preferred_element_type=jnp.float32,
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)


def _stack(bounds: Bounds):
    return jnp.stack(bounds, axis=-1)


def _pad(x_BTHE, block: int):
    """Zeros up to whole blocks and to a head dimension that is a power of two."""
    T, E = x_BTHE.shape[1], x_BTHE.shape[3]
    extra_T, extra_E = num_blocks(T, block) * block - T, _power_of_two(E) - E
    return jnp.pad(x_BTHE, ((0, 0), (0, extra_T), (0, 0), (0, extra_E)))


def _power_of_two(n: int) -> int:
    return max(SMALLEST, 1 << (n - 1).bit_length())
