"""The LM head and its loss, whose cost follows how many positions are scored, not how many there are.

Half the positions of a mixed row are patches, which predict no token. Each device takes those of its own
positions that are scored, C at a time, as many chunks as they fill. The loss is one sum, so its gradients are
made in the same pass, chunk by chunk (three matrix products; a logit is never made twice), and the backward
pass only scales them; what else is summed there is reported, and has none. No array is as large as
positions x vocabulary.

B batch, T positions, D d_model, V vocabulary (padded); N = B * T positions, C positions of a chunk.
"""

from functools import partial
from typing import NamedTuple

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


class Scoring(NamedTuple):
    """What is summed over the scored positions."""

    vocab_size: int
    z_loss_weight: float = 0.0
    first_code: int | None = None  # ids from here on are codes of images; None: all are text

    def parts(self, nll_C, log_z_C, target_C):
        """Of every position: the loss, which alone has a gradient; where ids may be codes, also -log p of text,
        of codes, and log Z squared."""
        if self.first_code is None:
            return (nll_C,)
        code_C = target_C >= self.first_code
        return (nll_C + self.z_loss_weight * log_z_C**2, jnp.where(code_C, 0.0, nll_C),
                jnp.where(code_C, nll_C, 0.0), log_z_C**2)

    @property
    def sums(self) -> tuple:
        return (SUMS,) * (1 if self.first_code is None else 4)


def next_token_loss(h_BTD, head_DV, tokens_BT, loss_mask_BT, vocab_size: int):
    """(sum, count) of -log p(tokens[p + 1]) over the scored positions p, float32."""
    (total,) = scored_sums(Scoring(vocab_size), h_BTD, head_DV, tokens_BT, loss_mask_BT)
    return total, jnp.sum(loss_mask_BT)


def token_losses(h_BTD, head_DV, tokens_BT, loss_mask_BT, scoring: Scoring):
    """{name: (sum, count)}, float32, over the scored positions p, of text and codes in one softmax. token_loss:
    of -log p(tokens[p + 1]) + z_loss_weight * log Z^2. Of it, without gradient: lm_loss and code_loss, -log p
    where the next token is text, and where it is a code; z_loss, log Z^2.
    """
    sums, scored = scored_sums(scoring, h_BTD, head_DV, tokens_BT, loss_mask_BT), jnp.sum(loss_mask_BT)
    codes = jnp.sum(jnp.roll(loss_mask_BT, 1, axis=1) & (tokens_BT >= scoring.first_code))
    return dict(zip(("token_loss", "lm_loss", "code_loss", "z_loss"),
                    zip(sums, (scored, scored - codes, codes, scored))))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def scored_sums(scoring: Scoring, h_BTD, head_DV, tokens_BT, mask_BT):
    """The sums of scoring.parts where mask is True, float32; the next token is the target."""
    sums = _on_devices(_sums, scoring.sums, scoring, h_BTD, head_DV, tokens_BT, mask_BT)
    return tuple(map(jnp.sum, sums))


def _scored_sums_and_gradients(scoring: Scoring, h_BTD, head_DV, tokens_BT, mask_BT):
    axes = *scoring.sums, HIDDEN, (*SUMS, None, "vocab")
    *sums, dh_BTD, dheads = _on_devices(_sums_and_gradients, axes, scoring, h_BTD, head_DV, tokens_BT, mask_BT)
    dhead_DV = constrain(jnp.sum(dheads, (0, 1)), "embed", "vocab").astype(head_DV.dtype)
    return tuple(map(jnp.sum, sums)), (dh_BTD, dhead_DV)


def _scale_gradients(scoring: Scoring, gradients, cotangents):
    """Those of the first sum."""
    del scoring
    return *((cotangents[0] * g).astype(g.dtype) for g in gradients), None, None


scored_sums.defvjp(_scored_sums_and_gradients, _scale_gradients)


def _on_devices(fn, out_axes, scoring: Scoring, h_BTD, head_DV, tokens_BT, mask_BT):
    """fn on every device's part.

    Rows are split over devices, positions of a row too, and the vocabulary: each device sums over its own
    positions, with as many chunks as it needs. Those that split the vocabulary between them hold the same
    positions, so they agree on the number of chunks; only they meet inside the loop. The head is gathered
    before it in the compute dtype, once, and its gradient summed after it in float32, once.
    """
    one = sharded(partial(fn, scoring), (HIDDEN, (None, "vocab"), ("vocab",), SUMS, SUMS), out_axes)
    head_DV = constrain(head_DV.astype(h_BTD.dtype), "embed", "vocab")  # else it is gathered, then cast
    targets_BT = jnp.roll(tokens_BT, -1, axis=1)  # a device's last one is its neighbour's first token
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


def _sums(scoring: Scoring, h_BTD, head_DV, ids_V, targets_BT, mask_BT):
    """Each (1, 1): the sums over one device's positions. ids: of head's columns."""
    h_ND, targets_N = h_BTD.reshape(-1, h_BTD.shape[-1]), targets_BT.reshape(-1)

    def add(p_C, used_C, totals):
        return _added(totals, _chunk(h_ND[p_C], head_DV, ids_V, targets_N[p_C], scoring)[0], used_C)

    return tuple(total.reshape(1, 1) for total in _over_chunks(
        add, mask_BT.reshape(-1), head_DV, tuple(jnp.zeros(()) for _ in scoring.sums)))


def _added(totals, parts, used_C):
    return tuple(total + jnp.sum(jnp.where(used_C, part_C, 0.0)) for total, part_C in zip(totals, parts))


def _sums_and_gradients(scoring: Scoring, h_BTD, head_DV, ids_V, targets_BT, mask_BT):
    """The sums, the first one's gradient by one device's h, and, float32 (1, 1, D, V), that by the head."""
    h_ND, targets_N = h_BTD.reshape(-1, h_BTD.shape[-1]), targets_BT.reshape(-1)

    def add(p_C, used_C, carry):
        totals, dh_ND, dhead_DV = carry
        h_CD, target_C = h_ND[p_C], targets_N[p_C]
        parts, dz_CV = _chunk(h_CD, head_DV, ids_V, target_C, scoring)
        dz_CV = jnp.where(used_C[:, None], dz_CV, 0.0).astype(h_CD.dtype)
        dh_ND = dh_ND.at[p_C].set(dz_CV @ head_DV.T, mode="drop", unique_indices=True, indices_are_sorted=True)
        dhead_DV += jnp.matmul(h_CD.T, dz_CV, preferred_element_type=jnp.float32)
        return _added(totals, parts, used_C), dh_ND, dhead_DV

    zeros = tuple(jnp.zeros(()) for _ in scoring.sums)
    start = zeros, jnp.zeros_like(h_ND), jnp.zeros(head_DV.shape, jnp.float32)
    totals, dh_ND, dhead_DV = _over_chunks(add, mask_BT.reshape(-1), head_DV, start)
    sums = (total.reshape(1, 1) for total in totals)
    return *sums, sum_over(dh_ND, "vocab").reshape(h_BTD.shape), dhead_DV[None, None]


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


def _chunk(h_CD, head_DV, ids_V, target_C, scoring: Scoring):
    """(scoring.parts, the first one's gradient by the logits z), float32, z = h @ head."""
    z_CV = mask_padding(linear_f32(h_CD, head_DV), ids_V, scoring.vocab_size)
    top_C1 = max_over(z_CV.max(axis=-1, keepdims=True), "vocab")
    e_CV = jnp.exp(z_CV - top_C1)
    total_C1 = sum_over(e_CV.sum(axis=-1, keepdims=True), "vocab")
    hit_CV = ids_V == target_C[:, None]
    hit_C = sum_over(jnp.sum(jnp.where(hit_CV, z_CV, 0.0), axis=-1), "vocab")
    log_z_C1, p_CV = top_C1 + jnp.log(total_C1), e_CV / total_C1
    if scoring.z_loss_weight:
        p_CV *= 1 + 2 * scoring.z_loss_weight * log_z_C1
    return scoring.parts(log_z_C1[:, 0] - hit_C, log_z_C1[:, 0], target_C), p_CV - hit_CV
