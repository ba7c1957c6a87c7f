"""Interval attention in plain jax.numpy: what a CPU runs, and every platform without a kernel of its own.

Short rows take the dense form, all at once. Longer ones go one query block after another (FlashAttention-2,
arXiv 2307.08691), each over the key blocks of its range (block_map.py) only, so memory grows with T + S. The
range is taken in one piece where rows are of a few blocks: the program then holds one branch per length, and
its arrays stay in the cache. One pass of the backward makes dq, dk and dv together, because blocks run one
after another here.

B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, E head dimension; Q, M queries and
keys of a block. Blocks are computed with heads in front, (K, G * Q, ...), the batched matmul that XLA:CPU
runs fastest.
"""

import jax.numpy as jnp
from jax import lax

from tfusion.kernels.block_map import key_bounds, num_blocks, pad_intervals

DENSE_UP_TO = 256 * 256  # T * S; above, blocks
BLOCK_Q, BLOCK_K = 256, 256
ONE_PIECE = 4  # key blocks of a row up to which a query block's range is not cut
HIDDEN = -1e30  # not -inf: the difference of two must stay a number


def forward(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT, *, softcap, dense=None):
    """out_BTHE in q's dtype and lse_BHT in float32."""
    if _is_dense(q_BTHE, k_BSKE, dense):
        return _forward_dense(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT, softcap)
    return _forward_blocks(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT, softcap)


def backward(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT, out_BTHE, lse_BHT, dout_BTHE, *, softcap,
             dense=None):
    """dq_BTHE, dk_BSKE, dv_BSKE in the dtypes of q, k and v."""
    run = _backward_dense if _is_dense(q_BTHE, k_BSKE, dense) else _backward_blocks
    return run(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT, out_BTHE, lse_BHT, dout_BTHE, softcap)


def _is_dense(q, k, dense):
    return q.shape[1] * k.shape[1] <= DENSE_UP_TO if dense is None else dense


def _logits(spec, a, b, softcap):
    """Products of scaled queries and keys, float32."""
    logits = jnp.einsum(spec, a, b)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


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


def _forward_dense(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT, softcap):
    (B, T, H, E), (S, K) = q_BTHE.shape, k_BSKE.shape[1:3]
    logits = _logits("nqe,nke->nqk", _group(q_BTHE, K) * E**-0.5, _group(k_BSKE, K), softcap)
    bias = _bias(k_start_BT[..., None], k_end_BT[..., None], jnp.arange(S, dtype=jnp.int32).reshape(1, 1, S))
    logits = logits.reshape(B, H, T, S) + bias[:, None]
    top = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("nqk,nke->nqe", weights.reshape(B * K, -1, S), _group(v_BSKE, K))
    out = out / total.reshape(B * K, -1, 1)
    return _ungroup(out, B, T, q_BTHE.dtype), (top + jnp.log(total))[..., 0]


def _backward_dense(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT, out_BTHE, lse_BHT, dout_BTHE, softcap):
    """Keys and values are repeated for each head: the mask would otherwise cost a division per element."""
    (B, T, H, E), (S, K) = q_BTHE.shape, k_BSKE.shape[1:3]
    k, v = (_group(jnp.repeat(x, H // K, axis=2), H) for x in (k_BSKE, v_BSKE))
    key = jnp.arange(S, dtype=jnp.int32).reshape(1, S, 1)
    bias = _bias(k_start_BT[:, None], k_end_BT[:, None], key)[:, None] - lse_BHT[:, :, None]
    delta = _delta(out_BTHE, dout_BTHE).swapaxes(1, 2).reshape(B * H, T)
    dq, dk, dv = _gradients(_group(q_BTHE, H) * E**-0.5, k, v, delta, _group(dout_BTHE, H),
                            bias.reshape(B * H, S, T), softcap)
    dk, dv = (x.reshape(B * K, H // K, S, E).sum(1) for x in (dk, dv))
    return (_ungroup(dq * E**-0.5, B, T, q_BTHE.dtype), _ungroup(dk, B, S, k_BSKE.dtype),
            _ungroup(dv, B, S, v_BSKE.dtype))


def _gradients(q, k, v, delta, dout, bias, softcap):
    """dq (but for the factor E^-0.5), dk, dv of some queries and keys; q comes scaled, bias holds -logsumexp.

    Scores are held as (n, keys, queries): dk and dv are then plain products. The third product would sum
    over the leading axis of a large array, which XLA:CPU does at half the speed, so the small factor is
    transposed; the barriers keep the compiler from undoing that.
    """
    logits = _logits("nke,nqe->nkq", k, q, softcap)
    p = jnp.exp(logits + bias)
    ds = p * (jnp.einsum("nke,nqe->nkq", v, dout) - delta[:, None])
    if softcap is not None:
        ds *= 1 - jnp.square(logits / softcap)
    k_T = lax.optimization_barrier(k.swapaxes(1, 2))
    dq_T = lax.optimization_barrier(jnp.einsum("nek,nkq->neq", k_T, ds))
    return dq_T.swapaxes(1, 2), jnp.einsum("nkq,nqe->nke", ds, q), jnp.einsum("nkq,nqe->nke", p, dout)


def _heads_first(x_BTHE, K: int, block: int):
    """(B, T, K * G, E) -> (B, K, G, T padded to whole blocks, E) in float32."""
    B, _, H, E = x_BTHE.shape
    x = _pad(x_BTHE, 1, block).astype(jnp.float32)
    return x.reshape(B, -1, K, H // K, E).transpose(0, 2, 3, 1, 4)


def _pad(x, axis: int, block: int):
    extra = num_blocks(x.shape[axis], block) * block - x.shape[axis]
    return jnp.pad(x, [(0, extra if a == axis else 0) for a in range(x.ndim)]) if extra else x


def _queries(x, b, i):
    """Block i of row b: (B, K, G, T, ...) -> (K, G * Q, ...)."""
    x = lax.dynamic_slice_in_dim(lax.dynamic_index_in_dim(x, b, keepdims=False), i * BLOCK_Q, BLOCK_Q, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _keys(x_BKSE, b, j, count: int):
    """`count` blocks of row b from block j on: (K, M, E)."""
    x_KSE = lax.dynamic_index_in_dim(x_BKSE, b, keepdims=False)
    return lax.dynamic_slice_in_dim(x_KSE, j * BLOCK_K, count * BLOCK_K, 1)


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


def _forward_blocks(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT, softcap):
    (B, T, H, E), K = q_BTHE.shape, k_BSKE.shape[2]
    G, count = H // K, num_blocks(T, BLOCK_Q)
    q = _heads_first(q_BTHE, K, BLOCK_Q) * E**-0.5
    k, v = (_heads_first(x, K, BLOCK_K)[:, :, 0] for x in (k_BSKE, v_BSKE))
    bounds = key_bounds(k_start_BT, k_end_BT, BLOCK_Q, BLOCK_K)
    intervals = pad_intervals(k_start_BT, k_end_BT, BLOCK_Q)

    def query_block(n):
        b, i = n // count, n % count
        q_n = _queries(q, b, i)
        k_start, k_end = (x[:, None] for x in _intervals(*intervals, b, i, G))

        def tile(j, blocks, carry):
            top, total, acc = carry
            key = j * BLOCK_K + jnp.arange(blocks * BLOCK_K, dtype=jnp.int32).reshape(1, -1)
            logits = _logits("nqe,nke->nqk", q_n, _keys(k, b, j, blocks), softcap)
            logits += _bias(k_start, k_end, key)[None]
            new_top = jnp.maximum(top, logits.max(-1))
            weights, rescale = jnp.exp(logits - new_top[..., None]), jnp.exp(top - new_top)
            acc = rescale[..., None] * acc + jnp.einsum("nqk,nke->nqe", weights, _keys(v, b, j, blocks))
            return new_top, rescale * total + weights.sum(-1), acc

        empty = jnp.full((K, G * BLOCK_Q), HIDDEN), jnp.zeros((K, G * BLOCK_Q)), jnp.zeros_like(q_n)
        top, total, acc = _over_keys(tile, bounds, b, i, k.shape[2] // BLOCK_K, empty)
        out = _ungroup(acc / total[..., None], 1, BLOCK_Q, q_BTHE.dtype)[0]
        return out, (top + jnp.log(total)).reshape(H, -1)

    out, lse = lax.map(query_block, jnp.arange(B * count))
    lse_BHT = lse.reshape(B, count, H, BLOCK_Q).swapaxes(1, 2).reshape(B, H, -1)
    return out.reshape(B, -1, H, E)[:, :T], lse_BHT[:, :, :T]


def _backward_blocks(q_BTHE, k_BSKE, v_BSKE, k_start_BT, k_end_BT, out_BTHE, lse_BHT, dout_BTHE, softcap):
    (B, T, H, E), (S, K) = q_BTHE.shape, k_BSKE.shape[1:3]
    G, count = H // K, num_blocks(T, BLOCK_Q)
    q, dout = _heads_first(q_BTHE, K, BLOCK_Q) * E**-0.5, _heads_first(dout_BTHE, K, BLOCK_Q)
    k, v = (_heads_first(x, K, BLOCK_K)[:, :, 0] for x in (k_BSKE, v_BSKE))
    lse, delta = (_pad(x, 2, BLOCK_Q).reshape(B, K, G, -1)
                  for x in (lse_BHT, _delta(out_BTHE, dout_BTHE).swapaxes(1, 2)))
    bounds = key_bounds(k_start_BT, k_end_BT, BLOCK_Q, BLOCK_K)
    intervals = pad_intervals(k_start_BT, k_end_BT, BLOCK_Q)

    def query_block(dk_dv, n):
        b, i = n // count, n % count
        q_n, dout_n, lse_n, delta_n = (_queries(x, b, i) for x in (q, dout, lse, delta))
        k_start, k_end = (x[None] for x in _intervals(*intervals, b, i, G))

        def tile(j, blocks, carry):
            dq, dk, dv = carry
            key = j * BLOCK_K + jnp.arange(blocks * BLOCK_K, dtype=jnp.int32).reshape(-1, 1)
            bias = _bias(k_start, k_end, key)[None] - lse_n[:, None]
            more = _gradients(q_n, _keys(k, b, j, blocks), _keys(v, b, j, blocks), delta_n, dout_n, bias,
                              softcap)
            return dq + more[0], _add_keys(dk, b, j, more[1]), _add_keys(dv, b, j, more[2])

        dq, *dk_dv = _over_keys(tile, bounds, b, i, k.shape[2] // BLOCK_K, (jnp.zeros_like(q_n), *dk_dv))
        return tuple(dk_dv), _ungroup(dq * E**-0.5, 1, BLOCK_Q, q_BTHE.dtype)[0]

    zeros = jnp.zeros_like(k)
    (dk, dv), dq = lax.scan(query_block, (zeros, zeros), jnp.arange(B * count))
    dk, dv = (x.swapaxes(1, 2)[:, :S].astype(k_BSKE.dtype) for x in (dk, dv))
    return dq.reshape(B, -1, H, E)[:, :T], dk, dv


def _add_keys(x_BKSE, b, j, more_KME):
    """Adds to the keys of row b from block j on, in place."""
    at = (b, 0, j * BLOCK_K, 0)
    return lax.dynamic_update_slice(x_BKSE, lax.dynamic_slice(x_BKSE, at, (1, *more_KME.shape)) + more_KME, at)
