"""Interval attention in plain jax.numpy: what a CPU runs, and every platform without a kernel of its own.

Short rows take the dense form, all at once. Longer ones go one query block after another (FlashAttention-2,
arXiv 2307.08691), each over the key blocks of its range (block_map.py) only, so memory grows with T + S. The
range is taken in one piece where rows are of two blocks: the program then holds one branch per length, and its
arrays stay in the cache. One pass of the backward makes dq, dk and dv together, because blocks run one
after another here.

B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, E head dimension; Q, M queries and
keys of a block. Blocks are computed with heads in front, (K, G * Q, ...), the batched matmul that XLA:CPU
runs fastest.
"""

import jax.numpy as jnp
from jax import lax

from tfusion.kernels.block_map import key_bounds, num_blocks, pad_intervals

DENSE_UP_TO = 448 * 448  # T * S; above, blocks
BLOCK_Q, BLOCK_K = 256, 256
ONE_PIECE = 2  # key blocks of a row up to which a query block's range is not cut
HIDDEN = -1e30  # not -inf: the difference of two must stay a number


def forward(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT, *, dense=None):
    """out_BTHE in q's dtype and lse_BHT in float32."""
    if _is_dense(q_BTHE, k_BSKE, dense):
        return _forward_dense(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT)
    return _forward_blocks(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT)


def backward(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT, out_BTHE, lse_BHT, dout_BTHE, *, dense=None):
    """dq_BTHE, dk_BSKE, dv_BSKE in the dtypes of q, k and v."""
    run = _backward_dense if _is_dense(q_BTHE, k_BSKE, dense) else _backward_blocks
    return run(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT, out_BTHE, lse_BHT, dout_BTHE)


def _is_dense(q, k, dense):
    return q.shape[1] * k.shape[1] <= DENSE_UP_TO if dense is None else dense


def _logits(spec, a, b):
    """Products of scaled queries and keys, float32."""
    return jnp.einsum(spec, a, b)


def _group(x_BTHE, K: int):
    """(B, T, K * G, E) -> (B * K, G * T, E) in float32."""
    B, T, H, E = x_BTHE.shape
    x = x_BTHE.astype(jnp.float32).reshape(B, T, K, H // K, E)
    return x.transpose(0, 2, 3, 1, 4).reshape(B * K, H // K * T, E)


def _ungroup(x, B: int, T: int, dtype):
    """(B * K, G * T, E) -> (B, T, K * G, E)."""
    E = x.shape[-1]
    return x.reshape(B, -1, T, E).transpose(0, 2, 1, 3).astype(dtype)


def _bias(k_start, k_end, key):
    """0 where start <= key < end, else HIDDEN: added to logits, XLA:CPU fuses it with the product before."""
    return jnp.where((k_start <= key) & (key < k_end), 0.0, HIDDEN)


def _delta(out_BTHE, dout_BTHE):
    """(B, T, H): what the softmax's gradient subtracts from each query's row."""
    return (out_BTHE.astype(jnp.float32) * dout_BTHE.astype(jnp.float32)).sum(-1)


def _forward_dense(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT):
    (B, T, H, E), (S, K) = q_BTHE.shape, k_BSKE.shape[1:3]
    logits = _logits("nqe,nke->nqk", _group(q_BTHE, K) * E**-0.5, _group(k_BSKE, K))
    bias = _bias(k_start_BT[..., None], k_end_BT[..., None], jnp.arange(S, dtype=jnp.int32).reshape(1, 1, S))
    logits = logits.reshape(B, H, T, S) + bias[:, None]
    top = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("nqk,nke->nqe", weights.reshape(B * K, -1, S), _group(v_BSKE, K))
    out = out / total.reshape(B * K, -1, 1)
    return _ungroup(out, B, T, q_BTHE.dtype), (top + jnp.log(total))[..., 0]


def _backward_dense(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT, out_BTHE, lse_BHT, dout_BTHE):
    """Keys and values are repeated for each head: the mask would otherwise cost a division per element."""
    (B, T, H, E), (S, K) = q_BTHE.shape, k_BSKE.shape[1:3]
    k, v = (_group(jnp.repeat(x, H // K, axis=2), H) for x in (k_BSKE, v_BSKE))
    key = jnp.arange(S, dtype=jnp.int32).reshape(1, S, 1)
    bias = _bias(k_start_BT[:, None], k_end_BT[:, None], key)[:, None] - lse_BHT[:, :, None]
    delta = _delta(out_BTHE, dout_BTHE).swapaxes(1, 2).reshape(B * H, T)
    dq, dk, dv = _gradients(_group(q_BTHE, H) * E**-0.5, k, v, delta, _group(dout_BTHE, H),
                            bias.reshape(B * H, S, T))
    dk, dv = (x.reshape(B * K, H // K, S, E).sum(1) for x in (dk, dv))
    return (_ungroup(dq * E**-0.5, B, T, q_BTHE.dtype), _ungroup(dk, B, S, k_BSKE.dtype),
            _ungroup(dv, B, S, v_BSKE.dtype))


def _gradients(q, k, v, delta, dout, bias):
    """dq (but for the factor E^-0.5), dk, dv of some queries and keys; q comes scaled, bias holds -logsumexp.

    Scores are held as (n, keys, queries): dk and dv are then plain products. The third product would sum
    over the leading axis of a large array, which XLA:CPU does at half the speed, so the small factor is
    transposed; the barriers keep the compiler from undoing that.
    """
    logits = _logits("nke,nqe->nkq", k, q)
    p = jnp.exp(logits + bias)
    ds = p * (jnp.einsum("nke,nqe->nkq", v, dout) - delta[:, None])
    k_T = lax.optimization_barrier(k.swapaxes(1, 2))
    dq_T = lax.optimization_barrier(jnp.einsum("nek,nkq->neq", k_T, ds))
    return dq_T.swapaxes(1, 2), jnp.einsum("nkq,nqe->nke", ds, q), jnp.einsum("nkq,nqe->nke", p, dout)


def _heads_in_front(x_BTHE, K: int, block: int):
    """(B, K, G, T padded to whole blocks, E) in float32: for short rows, whose blocks then need no turning."""
    B, _, H, E = x_BTHE.shape
    x = _pad(x_BTHE, 1, block).astype(jnp.float32)
    return x.reshape(B, -1, K, H // K, E).transpose(0, 2, 3, 1, 4)


def _layout(K: int, num_k_blocks: int):
    """How the block form holds (B, T, H, E): turned where rows are short; as it is where they are long, for a
    turned copy of everything would be most of the memory."""
    if num_k_blocks <= ONE_PIECE:
        return lambda x_BTHE, block: _heads_in_front(x_BTHE, K, block)
    return lambda x_BTHE, block: _pad(x_BTHE, 1, block)


def _pad(x, axis: int, block: int):
    extra = num_blocks(x.shape[axis], block) * block - x.shape[axis]
    return jnp.pad(x, [(0, extra if a == axis else 0) for a in range(x.ndim)]) if extra else x


def _part(x, b, start, size: int, K: int):
    """Positions of row b from start on, of either layout: (K, G * size, E) in float32."""
    if x.ndim == 4:
        return _group(lax.dynamic_slice(x, (b, start, 0, 0), (1, size, *x.shape[2:])), K)
    x = lax.dynamic_slice(x, (b, 0, 0, start, 0), (1, *x.shape[1:3], size, x.shape[4]))
    return x.reshape(K, -1, x.shape[4])


def _per_query(x_BHT, b, i, K: int):
    """Block i of row b: (K, G * Q)."""
    x = lax.dynamic_slice_in_dim(lax.dynamic_index_in_dim(x_BHT, b, keepdims=False), i * BLOCK_Q, BLOCK_Q, 1)
    return x.reshape(K, -1)


def _intervals(k_start_BT, k_end_BT, b, i, G: int):
    """Of block i of row b, for each of the G heads' copies: (G * Q,)."""
    rows = (lax.dynamic_index_in_dim(x, b, keepdims=False) for x in (k_start_BT, k_end_BT))
    return (jnp.tile(lax.dynamic_slice_in_dim(x, i * BLOCK_Q, BLOCK_Q), G) for x in rows)


def _over_keys(tile, bounds, b, i, num_k_blocks: int, carry):
    """tile(j, count, carry) over the key blocks of a query block's range: in one piece, or one by one."""
    start, end = bounds.start[b, i], bounds.end[b, i]
    if num_k_blocks > ONE_PIECE:
        return lax.fori_loop(start, end, lambda j, carry: tile(j, 1, carry), carry)
    pieces = [lambda carry, count=count: tile(start, count, carry) for count in range(1, num_k_blocks + 1)]
    return lax.switch(end - start - 1, pieces, carry)


def _forward_blocks(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT):
    (B, T, H, E), (S, K) = q_BTHE.shape, k_BSKE.shape[1:3]
    G, count, num_k_blocks = H // K, num_blocks(T, BLOCK_Q), num_blocks(S, BLOCK_K)
    laid = _layout(K, num_k_blocks)
    q, k, v = laid(q_BTHE, BLOCK_Q), laid(k_BSKE, BLOCK_K), laid(v_BSKE, BLOCK_K)
    bounds = key_bounds(k_start_BT, k_end_BT, BLOCK_Q, BLOCK_K)
    intervals = pad_intervals(k_start_BT, k_end_BT, BLOCK_Q)

    def query_block(n):
        b, i = n // count, n % count
        q_n = _part(q, b, i * BLOCK_Q, BLOCK_Q, K) * E**-0.5
        k_start, k_end = (x[:, None] for x in _intervals(*intervals, b, i, G))

        def tile(j, blocks, carry):
            top, total, acc = carry
            key = j * BLOCK_K + jnp.arange(blocks * BLOCK_K, dtype=jnp.int32).reshape(1, -1)
            k_n, v_n = (_part(x, b, j * BLOCK_K, blocks * BLOCK_K, K) for x in (k, v))
            logits = _logits("nqe,nke->nqk", q_n, k_n)
            logits += _bias(k_start, k_end, key)[None]
            new_top = jnp.maximum(top, logits.max(-1))
            weights, rescale = jnp.exp(logits - new_top[..., None]), jnp.exp(top - new_top)
            more = jnp.einsum("nqk,nke->nqe", weights, v_n)
            return new_top, rescale * total + weights.sum(-1), rescale[..., None] * acc + more

        empty = jnp.full((K, G * BLOCK_Q), HIDDEN), jnp.zeros((K, G * BLOCK_Q)), jnp.zeros_like(q_n)
        top, total, acc = _over_keys(tile, bounds, b, i, num_k_blocks, empty)
        out = _ungroup(acc / total[..., None], 1, BLOCK_Q, q_BTHE.dtype)[0]
        return out, (top + jnp.log(total)).reshape(H, -1)

    out, lse = lax.map(query_block, jnp.arange(B * count))
    lse_BHT = lse.reshape(B, count, H, BLOCK_Q).swapaxes(1, 2).reshape(B, H, -1)
    return out.reshape(B, -1, H, E)[:, :T], lse_BHT[:, :, :T]


def _backward_blocks(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT, out_BTHE, lse_BHT, dout_BTHE):
    (B, T, H, E), (S, K) = q_BTHE.shape, k_BSKE.shape[1:3]
    G, count, num_k_blocks = H // K, num_blocks(T, BLOCK_Q), num_blocks(S, BLOCK_K)
    laid = _layout(K, num_k_blocks)
    q, dout = (laid(x, BLOCK_Q) for x in (q_BTHE, dout_BTHE))
    k, v = (laid(x, BLOCK_K) for x in (k_BSKE, v_BSKE))
    lse, delta = (_pad(x, 2, BLOCK_Q) for x in (lse_BHT, _delta(out_BTHE, dout_BTHE).swapaxes(1, 2)))
    bounds = key_bounds(k_start_BT, k_end_BT, BLOCK_Q, BLOCK_K)
    intervals = pad_intervals(k_start_BT, k_end_BT, BLOCK_Q)

    def query_block(dk_dv, n):
        b, i = n // count, n % count
        q_n, dout_n = (_part(x, b, i * BLOCK_Q, BLOCK_Q, K) for x in (q, dout))
        q_n *= E**-0.5
        lse_n, delta_n = (_per_query(x, b, i, K) for x in (lse, delta))
        k_start, k_end = (x[None] for x in _intervals(*intervals, b, i, G))

        def tile(j, blocks, carry):
            dq, dk, dv = carry
            key = j * BLOCK_K + jnp.arange(blocks * BLOCK_K, dtype=jnp.int32).reshape(-1, 1)
            bias = _bias(k_start, k_end, key)[None] - lse_n[:, None]
            k_n, v_n = (_part(x, b, j * BLOCK_K, blocks * BLOCK_K, K) for x in (k, v))
            more = _gradients(q_n, k_n, v_n, delta_n, dout_n, bias)
            return dq + more[0], _add_keys(dk, b, j, more[1]), _add_keys(dv, b, j, more[2])

        dq, *dk_dv = _over_keys(tile, bounds, b, i, num_k_blocks, (jnp.zeros_like(q_n), *dk_dv))
        return tuple(dk_dv), _ungroup(dq * E**-0.5, 1, BLOCK_Q, q_BTHE.dtype)[0]

    zeros = jnp.zeros((B, num_k_blocks * BLOCK_K, K, E), jnp.float32)
    (dk, dv), dq = lax.scan(query_block, (zeros, zeros), jnp.arange(B * count))
    return (dq.reshape(B, -1, H, E)[:, :T], dk[:, :S].astype(k_BSKE.dtype), dv[:, :S].astype(v_BSKE.dtype))


def _add_keys(x_BSKE, b, j, more_KME):
    """Adds to the keys of row b from block j on, in place."""
    at, more = (b, j * BLOCK_K, 0, 0), more_KME.swapaxes(0, 1)[None]
    return lax.dynamic_update_slice(x_BSKE, lax.dynamic_slice(x_BSKE, at, more.shape) + more, at)
