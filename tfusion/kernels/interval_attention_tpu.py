"""Interval attention as Pallas TPU kernels: forward, dq, and dk with dv (FlashAttention-2, arXiv 2307.08691).

A grid step is one (batch row, head, query block, key block). Which blocks those are comes in as prefetched
scalars (block_map.Bounds): step n of query block i is key block start[i] + n. Past end[i] the step computes
nothing and asks for the block that it already has, so nothing is fetched; the grid's last axis is as long as
the longest range of the batch. Fully visible blocks do no mask arithmetic.

Scores are held transposed, (key, query): what belongs to a query (interval, maximum, sum, logsumexp, delta)
is then a row vector along the lanes, in HBM (B, 1, T) or (B, H, 1, T), and no 128-fold copies are needed.
Queries past T, where T is no multiple of the block, are zeros with the last query's interval.

Compiled ahead of time for v5e, v5p and v6e; numbers checked by the interpreter. Not timed on a TPU.

B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, E head dimension; q, k in names of
blocks: queries and keys of a block.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tfusion.kernels.block_map import Bounds, key_bounds, num_blocks, pad_intervals, query_bounds

HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # not -inf: the difference of two must stay a number
LANES = 128  # a block's length lies along the lanes, so it is a multiple of this


def forward(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT, *, blocks=None, interpret=False):
    """out_BTHE in q's dtype and lse_BHT in float32."""
    (B, T, H, E), (S, K) = q_BTHE.shape, k_BSKE.shape[1:3]
    block_q, block_k = blocks or block_sizes(T, S, E, q_BTHE.dtype)
    q, k, v = _heads_first(q_BTHE, block_q), _heads_first(k_BSKE, block_k), _heads_first(v_BSKE, block_k)
    bounds = key_bounds(k_start_BT, k_end_BT, block_q, block_k)
    at = _QueryGrid(block_q, block_k, E, H // K)
    out, lse = pl.pallas_call(
        partial(_forward_kernel, scale=E**-0.5),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4, grid=(B, H, q.shape[2] // block_q, _steps(bounds)),
            in_specs=[at.queries, at.keys, at.keys, at.interval, at.interval],
            out_specs=[at.queries, at.per_query],
            scratch_shapes=[pltpu.VMEM((1, block_q), jnp.float32), pltpu.VMEM((1, block_q), jnp.float32),
                            pltpu.VMEM((E, block_q), jnp.float32)]),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype),
                   jax.ShapeDtypeStruct((*q.shape[:2], 1, q.shape[2]), jnp.float32)],
        compiler_params=_parallel(3, 1), interpret=interpret, name="interval_attention_forward",
    )(*bounds, q, k, v, *_lanes(k_start_BT, k_end_BT, block_q))
    return out[:, :, :T].swapaxes(1, 2), lse[:, :, 0, :T]


def backward(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT, out_BTHE, lse_BHT, dout_BTHE, *, blocks=None,
             interpret=False):
    """dq_BTHE, dk_BSKE, dv_BSKE in the dtypes of q, k and v."""
    (T, H, E), (S, K) = q_BTHE.shape[1:], k_BSKE.shape[1:3]
    block_q, block_k = blocks or block_sizes(T, S, E, q_BTHE.dtype)
    q, k, v = _heads_first(q_BTHE, block_q), _heads_first(k_BSKE, block_k), _heads_first(v_BSKE, block_k)
    out, dout = _heads_first(out_BTHE, block_q), _heads_first(dout_BTHE, block_q)
    lse = jnp.pad(lse_BHT, ((0, 0), (0, 0), (0, q.shape[2] - T)))[:, :, None]
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1)[:, :, None]
    bounds = key_bounds(k_start_BT, k_end_BT, block_q, block_k)
    arrays = (q, k, v, *_lanes(k_start_BT, k_end_BT, block_q), lse, delta, dout)
    settings = dict(scale=E**-0.5)
    dq = _call_dq(arrays, bounds, _QueryGrid(block_q, block_k, E, H // K), settings, interpret)
    bounds = query_bounds(bounds, num_blocks(S, block_k))
    dk, dv = _call_dkv(arrays, bounds, _KeyGrid(block_q, block_k, E, H // K), settings, interpret)
    return tuple(x[:, :, :n].swapaxes(1, 2) for x, n in ((dq, T), (dk, S), (dv, S)))


def _call_dq(arrays, bounds, at, settings, interpret):
    (B, H, T, E), dtype = arrays[0].shape, arrays[0].dtype
    return pl.pallas_call(
        partial(_dq_kernel, **settings),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4, grid=(B, H, T // at.block_q, _steps(bounds)),
            in_specs=[at.queries, at.keys, at.keys, at.interval, at.interval, at.per_query, at.per_query,
                      at.queries],
            out_specs=at.queries, scratch_shapes=[pltpu.VMEM((E, at.block_q), jnp.float32)]),
        out_shape=jax.ShapeDtypeStruct((B, H, T, E), dtype),
        compiler_params=_parallel(3, 1), interpret=interpret, name="interval_attention_dq",
    )(*bounds, *arrays)


def _call_dkv(arrays, bounds, at, settings, interpret):
    k, v = arrays[1:3]
    B, K, S, E = k.shape
    return pl.pallas_call(
        partial(_dkv_kernel, **settings),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4, grid=(B, K, S // at.block_k, at.group, _steps(bounds)),
            in_specs=[at.queries, at.keys, at.keys, at.interval, at.interval, at.per_query, at.per_query,
                      at.queries],
            out_specs=[at.keys, at.keys],
            scratch_shapes=[pltpu.VMEM((at.block_k, E), jnp.float32)] * 2),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        compiler_params=_parallel(3, 2), interpret=interpret, name="interval_attention_dkv",
    )(*bounds, *arrays)


def block_sizes(T: int, S: int, E: int, dtype) -> tuple[int, int]:
    """(block_q, block_k): 512 where the head's row is up to 512 bytes (2048 was seen not to fit VMEM)."""
    limit = max(LANES, min(512, 512 * 512 // (E * jnp.dtype(dtype).itemsize)) // LANES * LANES)
    return _block_size(T, limit), _block_size(S, limit)


def _block_size(length: int, limit: int) -> int:
    """The largest block up to the limit whose padding is under an eighth of the length."""
    for block in (limit, 256, LANES):
        if block <= limit and num_blocks(length, block) * block - length < max(length // 8, LANES):
            return block
    return LANES


class _QueryGrid:
    """Block specs of a grid (batch, head, query block, step over its key blocks)."""

    def __init__(self, block_q: int, block_k: int, E: int, group: int):
        def key(b, h, i, n, start, end, *_):
            return b, h // group, jnp.minimum(start[b, i] + n, end[b, i] - 1), 0

        self.block_q = block_q
        self.queries = pl.BlockSpec((None, None, block_q, E), lambda b, h, i, n, *_: (b, h, i, 0))
        self.keys = pl.BlockSpec((None, None, block_k, E), key)
        self.interval = pl.BlockSpec((None, 1, block_q), lambda b, h, i, n, *_: (b, 0, i))
        self.per_query = pl.BlockSpec((None, None, 1, block_q), lambda b, h, i, n, *_: (b, h, 0, i))


class _KeyGrid:
    """Block specs of a grid (batch, key/value head, key block, query head of the group, step over the key
    block's query blocks)."""

    def __init__(self, block_q: int, block_k: int, E: int, group: int):
        def query(b, j, n, start, end):
            return jnp.clip(start[b, j] + n, 0, jnp.maximum(end[b, j] - 1, 0))

        self.block_k, self.group = block_k, group
        self.keys = pl.BlockSpec((None, None, block_k, E), lambda b, h, j, g, n, *_: (b, h, j, 0))
        self.queries = pl.BlockSpec((None, None, block_q, E), lambda b, h, j, g, n, start, end, *_: (
            b, h * group + g, query(b, j, n, start, end), 0))
        self.interval = pl.BlockSpec((None, 1, block_q), lambda b, h, j, g, n, start, end, *_: (
            b, 0, query(b, j, n, start, end)))
        self.per_query = pl.BlockSpec((None, None, 1, block_q), lambda b, h, j, g, n, start, end, *_: (
            b, h * group + g, 0, query(b, j, n, start, end)))


def _forward_kernel(start, end, full_start, full_end, q_ref, k_ref, v_ref, k_start_ref, k_end_ref, out_ref,
                    lse_ref, max_ref, sum_ref, acc_ref, *, scale):
    b, i, n = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    j = start[b, i] + n

    @pl.when(n == 0)
    def _():
        max_ref[...] = jnp.full_like(max_ref, HIDDEN)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def step(masked):
        s_kq = _scores(q_ref[...], k_ref[...], scale)
        if masked:
            s_kq = jnp.where(_visible(s_kq.shape, j, k_start_ref, k_end_ref), s_kq, HIDDEN)
        new_max = jnp.maximum(max_ref[...], s_kq.max(0, keepdims=True))
        p_kq, rescale = jnp.exp(s_kq - new_max), jnp.exp(max_ref[...] - new_max)
        max_ref[...] = new_max
        sum_ref[...] = rescale * sum_ref[...] + p_kq.sum(0, keepdims=True)
        v = v_ref[...]
        acc_ref[...] = rescale * acc_ref[...] + _dot(v, p_kq.astype(v.dtype), 0, 0)

    _run(step, j, end[b, i], full_start[b, i], full_end[b, i])

    @pl.when(n == pl.num_programs(3) - 1)
    def _():
        out_ref[...] = (acc_ref[...] / sum_ref[...]).T.astype(out_ref.dtype)
        lse_ref[...] = max_ref[...] + jnp.log(sum_ref[...])


def _dq_kernel(start, end, full_start, full_end, q_ref, k_ref, v_ref, k_start_ref, k_end_ref, lse_ref,
               delta_ref, dout_ref, dq_ref, acc_ref, *, scale):
    b, i, n = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    j = start[b, i] + n

    @pl.when(n == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def step(masked):
        visible = partial(_visible, block=j, k_start_ref=k_start_ref, k_end_ref=k_end_ref) if masked else None
        k = k_ref[...]
        _, ds_kq = _probabilities(q_ref[...], k, v_ref[...], dout_ref[...], lse_ref[...], delta_ref[...],
                                  visible, scale)
        acc_ref[...] += _dot(k, ds_kq.astype(k.dtype), 0, 0)  # (E, q): transposing k is cheaper than ds

    _run(step, j, end[b, i], full_start[b, i], full_end[b, i])

    @pl.when(n == pl.num_programs(3) - 1)
    def _():
        dq_ref[...] = (acc_ref[...] * scale).T.astype(dq_ref.dtype)


def _dkv_kernel(start, end, full_start, full_end, q_ref, k_ref, v_ref, k_start_ref, k_end_ref, lse_ref,
                delta_ref, dout_ref, dk_ref, dv_ref, dk_acc_ref, dv_acc_ref, *, scale):
    b, j, g, n = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.program_id(4)
    i = start[b, j] + n

    @pl.when((g == 0) & (n == 0))
    def _():
        dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
        dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

    def step(masked):
        visible = partial(_visible, block=j, k_start_ref=k_start_ref, k_end_ref=k_end_ref) if masked else None
        q, dout = q_ref[...], dout_ref[...]
        p_kq, ds_kq = _probabilities(q, k_ref[...], v_ref[...], dout, lse_ref[...], delta_ref[...], visible,
                                     scale)
        dv_acc_ref[...] += _dot(p_kq.astype(dout.dtype), dout, 1, 0)
        dk_acc_ref[...] += _dot(ds_kq.astype(q.dtype), q, 1, 0)

    _run(step, i, end[b, j], full_start[b, j], full_end[b, j])

    @pl.when((g == pl.num_programs(3) - 1) & (n == pl.num_programs(4) - 1))
    def _():
        dk_ref[...] = (dk_acc_ref[...] * scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc_ref[...].astype(dv_ref.dtype)


def _run(step, block, end, full_start, full_end):
    """step(masked) on a block of the range: without mask arithmetic where it is fully visible."""
    full = (full_start <= block) & (block < full_end)
    pl.when((block < end) & full)(lambda: step(False))
    pl.when((block < end) & ~full)(lambda: step(True))


def _scores(q, k, scale):
    return _dot(k, q, 1, 1) * scale


def _visible(shape, block, k_start_ref, k_end_ref):
    key_kq = block * shape[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (k_start_ref[...] <= key_kq) & (key_kq < k_end_ref[...])


def _probabilities(q, k, v, dout, lse, delta, visible, scale):
    """The softmax of one block, and the gradient of its logits (but for the factor `scale`)."""
    s_kq = _scores(q, k, scale)
    p_kq = jnp.exp(s_kq - lse)
    if visible is not None:
        p_kq = jnp.where(visible(s_kq.shape), p_kq, 0.0)
    ds_kq = p_kq * (_dot(v, dout, 1, 1) - delta)
    return p_kq, ds_kq


def _dot(a, b, contract_a: int, contract_b: int):
    """Matrix product accumulated in float32; float32 factors are not rounded to bfloat16 first."""
    return jax.lax.dot_general(
        a, b, (((contract_a,), (contract_b,)), ((), ())), preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)


def _heads_first(x_BTHE, block: int):
    """(B, H, T padded with zeros to whole blocks, E)."""
    T = x_BTHE.shape[1]
    extra = num_blocks(T, block) * block - T
    return jnp.pad(x_BTHE.swapaxes(1, 2), ((0, 0), (0, 0), (0, extra), (0, 0)))


def _lanes(k_start_BT, k_end_BT, block_q: int):
    return (x[:, None] for x in pad_intervals(k_start_BT, k_end_BT, block_q))


def _steps(bounds: Bounds):
    """Length of the grid's last axis: the longest range of the batch, at least 1 (outputs are written)."""
    return jnp.maximum((bounds.end - bounds.start).max(), 1)


def _parallel(parallel: int, sequential: int):
    return pltpu.CompilerParams(dimension_semantics=("parallel",) * parallel + ("arbitrary",) * sequential)
