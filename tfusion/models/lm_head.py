"""The LM head and its loss, whose cost follows how many positions are scored, not how many there are.

Half the positions of a mixed row are patches, which predict no token. Each device takes those of its own
positions that are scored, C at a time, as many chunks as they fill. The loss is one sum, so its gradients are
made in the same pass, chunk by chunk (three matrix products; a logit is never made twice), and the backward
pass only scales them. No array is as large as positions x vocabulary.

B batch, T positions, D d_model, V vocabulary (padded); N = B * T positions, C positions of a chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tfusion.models.transformer import linear_f32
from tfusion.sharding import constrain, max_over, sharded, sum_over

CHUNK_LOGITS = 2**25  # float32 logits of a chunk, at most (128 MiB)
CHUNK_TILE = 64  # a chunk's positions are a multiple of this
SUMS = ("batch", "length")  # one for each device that has positions of its own
HIDDEN = ("batch", "length", "hidden")


def logits(h, head_DV, vocab_size: int):
    """(..., D) -> float32 (..., V); ids of the vocabulary's padding get -1e9."""
    return mask_padding(linear_f32(h, head_DV), jnp.arange(head_DV.shape[1]), vocab_size)


def mask_padding(z, ids, vocab_size: int):
    return jnp.where(ids < vocab_size, z, -1e9)


def next_token_loss(h_BTD, head_DV, tokens_BT, loss_mask_BT, vocab_size: int):
    """(sum, count) of -log p(tokens[p + 1]) over the scored positions p, float32."""
    targets_BT = jnp.roll(tokens_BT, -1, axis=1)  # a device's last one is its neighbour's first token
    return scored_sum(vocab_size, h_BTD, head_DV, targets_BT, loss_mask_BT), jnp.sum(loss_mask_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def scored_sum(vocab_size: int, h_BTD, head_DV, targets_BT, mask_BT):
    """The sum of -log softmax(h @ head)[target] where mask is True, float32."""
    return jnp.sum(_on_devices(_sum, SUMS, vocab_size, h_BTD, head_DV, targets_BT, mask_BT))


def _scored_sum_and_gradients(vocab_size: int, h_BTD, head_DV, targets_BT, mask_BT):
    sums, dh_BTD, dheads = _on_devices(_sum_and_gradients, (SUMS, HIDDEN, (*SUMS, None, "vocab")), vocab_size,
                                       h_BTD, head_DV, targets_BT, mask_BT)
    return jnp.sum(sums), (dh_BTD, constrain(jnp.sum(dheads, (0, 1)), "embed", "vocab").astype(head_DV.dtype))


def _scale_gradients(vocab_size: int, gradients, cotangent):
    del vocab_size
    return *((cotangent * g).astype(g.dtype) for g in gradients), None, None


scored_sum.defvjp(_scored_sum_and_gradients, _scale_gradients)


def _on_devices(fn, out_axes, vocab_size: int, h_BTD, head_DV, targets_BT, mask_BT):
    """fn on every device's part.

    Rows are split over devices, positions of a row too, and the vocabulary: each device sums over its own
    positions, with as many chunks as it needs. Those that split the vocabulary between them hold the same
    positions, so they agree on the number of chunks; only they meet inside the loop. The head is gathered
    before it in the compute dtype, once, and its gradient summed after it in float32, once.
    """
    one = sharded(partial(fn, vocab_size), (HIDDEN, (None, "vocab"), ("vocab",), SUMS, SUMS), out_axes)
    head_DV = constrain(head_DV.astype(h_BTD.dtype), "embed", "vocab")  # else it is gathered, then cast
    return one(h_BTD, head_DV, jnp.arange(head_DV.shape[1]), targets_BT, mask_BT)


def chunk_size(num_positions: int, vocab: int) -> int:
    """C for a device with so many positions and vocabulary entries.

    Every chunk reads the head and adds to its gradient, and it takes about a thousand positions for an
    accelerator's products to outweigh that. But the last chunk is half empty on average, so that there should
    be several.
    """
    tiles = min(num_positions // 8, CHUNK_LOGITS // vocab) // CHUNK_TILE
    return min(max(tiles, 1) * CHUNK_TILE, num_positions)


def num_chunks(count, chunk: int):
    """How many chunks hold `count` positions."""
    return (count + chunk - 1) // chunk


def _sum(vocab_size: int, h_BTD, head_DV, ids_V, targets_BT, mask_BT):
    """(1, 1): the sum over one device's positions. ids: of head's columns."""
    h_ND, targets_N = h_BTD.reshape(-1, h_BTD.shape[-1]), targets_BT.reshape(-1)

    def add(p_C, used_C, total):
        h_CD, target_C = h_ND[p_C], targets_N[p_C]
        return total + jnp.sum(jnp.where(used_C, _chunk(h_CD, head_DV, ids_V, target_C, vocab_size)[0], 0.0))

    return _over_chunks(add, mask_BT.reshape(-1), head_DV, jnp.zeros(())).reshape(1, 1)


def _sum_and_gradients(vocab_size: int, h_BTD, head_DV, ids_V, targets_BT, mask_BT):
    """The sum, its gradient by one device's h, and, float32 (1, 1, D, V), that by the head."""
    h_ND, targets_N = h_BTD.reshape(-1, h_BTD.shape[-1]), targets_BT.reshape(-1)

    def add(p_C, used_C, carry):
        total, dh_ND, dhead_DV = carry
        h_CD, target_C = h_ND[p_C], targets_N[p_C]
        nll_C, dz_CV = _chunk(h_CD, head_DV, ids_V, target_C, vocab_size)
        dz_CV = jnp.where(used_C[:, None], dz_CV, 0.0).astype(h_CD.dtype)
        dh_ND = dh_ND.at[p_C].set(dz_CV @ head_DV.T, mode="drop", unique_indices=True, indices_are_sorted=True)
        dhead_DV += jnp.matmul(h_CD.T, dz_CV, preferred_element_type=jnp.float32)
        return total + jnp.sum(jnp.where(used_C, nll_C, 0.0)), dh_ND, dhead_DV

    start = jnp.zeros(()), jnp.zeros_like(h_ND), jnp.zeros(head_DV.shape, jnp.float32)
    total, dh_ND, dhead_DV = _over_chunks(add, mask_BT.reshape(-1), head_DV, start)
    return total.reshape(1, 1), sum_over(dh_ND, "vocab").reshape(h_BTD.shape), dhead_DV[None, None]


def _over_chunks(add, mask_N, head_DV, carry):
    """carry = add(p_C, used_C, carry) over chunks of the scored positions, in order. Where the last chunk is
    not full, used is False and the positions are different ones past the end."""
    N = mask_N.shape[0]
    C = chunk_size(N, head_DV.shape[1])
    p = jnp.arange(num_chunks(N, C) * C)
    order = jnp.sort(jnp.where(jnp.pad(mask_N, (0, len(p) - N)), p, N + p))

    def body(i, carry):
        p_C = jax.lax.dynamic_slice(order, (i * C,), (C,))
        return add(p_C, p_C < N, carry)

    return jax.lax.fori_loop(0, num_chunks(jnp.sum(mask_N), C), body, carry)


def _chunk(h_CD, head_DV, ids_V, target_C, vocab_size: int):
    """(-log softmax(z)[target], its gradient by the logits z), float32, z = h @ head."""
    z_CV = mask_padding(linear_f32(h_CD, head_DV), ids_V, vocab_size)
    top_C1 = max_over(z_CV.max(axis=-1, keepdims=True), "vocab")
    e_CV = jnp.exp(z_CV - top_C1)
    total_C1 = sum_over(e_CV.sum(axis=-1, keepdims=True), "vocab")
    hit_CV = ids_V == target_C[:, None]
    hit_C = sum_over(jnp.sum(jnp.where(hit_CV, z_CV, 0.0), axis=-1), "vocab")
    return (top_C1 + jnp.log(total_C1))[:, 0] - hit_C, e_CV / total_C1 - hit_CV
