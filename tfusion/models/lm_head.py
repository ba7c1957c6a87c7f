"""The LM head and its loss, only where a token is scored and never as a B x T x V array.

Half the positions of a mixed row are patches, which predict no token. The plan of the rows bounds the
scored positions per row, so they are gathered into a static number S of them; where their logits are large,
the softmax then runs over chunks of the vocabulary, each recomputed in the backward pass.

B batch, T positions, D d_model, S scored positions per row, V vocabulary (padded), C chunks, W = V / C.
"""

import functools

import jax
import jax.numpy as jnp

from tfusion.models.transformer import linear
from tfusion.sharding import constrain, num_shards

KEPT_LOGITS = 2**24  # logits per device (64 MiB) up to which they are kept rather than made twice
CHUNK = 8192  # vocabulary entries per chunk, at most, where there are more


def logits(h, head_DV, vocab_size: int):
    """(..., D) -> float32 (..., V); ids of the vocabulary's padding get -1e9."""
    return _mask_padding(linear(h, head_DV).astype(jnp.float32), jnp.arange(head_DV.shape[1]), vocab_size)


def _mask_padding(z, ids, vocab_size: int):
    return jnp.where(ids < vocab_size, z, -1e9)


def scored_positions(loss_mask_BT, num_scored: int):
    """(positions_BS, used_BS): each row's scored positions in order; the rest are position 0, used False.

    A row with more than S scored positions would lose some: the plan and `check_batch` rule that out.
    """
    T = loss_mask_BT.shape[1]
    positions_BS = jnp.sort(jnp.where(loss_mask_BT, jnp.arange(T), T), axis=1)[:, :num_scored]
    used_BS = positions_BS < T
    return jnp.where(used_BS, positions_BS, 0), used_BS


def next_token_loss(h_BTD, head_DV, tokens_BT, loss_mask_BT, num_scored: int, vocab_size: int):
    """(sum, count) of -log p(tokens[p + 1]) over the scored positions p, float32.

    Where a row is spread over devices, so are its scored positions, rounded up to the same number on each.
    """
    parts = num_shards("length")
    positions_BS, used_BS = scored_positions(loss_mask_BT, -(-num_scored // parts) * parts)
    h_BSD = jnp.take_along_axis(h_BTD, positions_BS[..., None], axis=1)
    h_BSD = constrain(h_BSD, "batch", "length", "hidden")
    targets_BS = jnp.take_along_axis(jnp.roll(tokens_BT, -1, axis=1), positions_BS, axis=1)
    nll_BS = cross_entropy(h_BSD, head_DV, targets_BS, vocab_size, chunk_size(targets_BS, head_DV))
    return jnp.sum(jnp.where(used_BS, nll_BS, 0.0)), jnp.sum(loss_mask_BT)


def chunk_size(targets_BS, head_DV) -> int:
    """How many vocabulary entries to take at a time: all, where their logits are few."""
    V, parts = head_DV.shape[1], num_shards("batch") * num_shards("length") * num_shards("vocab")
    return V if targets_BS.size * V // parts <= KEPT_LOGITS else CHUNK


def cross_entropy(h, head_DV, targets, vocab_size: int, chunk: int):
    """-log softmax(h @ head)[target], float32, shaped as targets, over chunks of the vocabulary."""
    D, V = head_DV.shape
    C = next(c for c in range(1, V + 1) if V % c == 0 and V // c <= chunk)
    if C == 1:
        z = logits(h, head_DV, vocab_size)
        hit = jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(z, axis=-1) - hit
    # Strided: chunk c holds the ids c, c + C, c + 2C, ..., so that a sharded vocabulary stays sharded.
    head_CDW = jnp.moveaxis(head_DV.reshape(D, V // C, C), 2, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(carry, x):
        top, total, hit = carry
        c, head_DW = x
        z = linear(h, head_DW).astype(jnp.float32)
        z = _mask_padding(z, c + C * jnp.arange(V // C), vocab_size)
        new = jax.lax.stop_gradient(jnp.maximum(top, z.max(axis=-1)))
        total = total * jnp.exp(top - new) + jnp.exp(z - new[..., None]).sum(axis=-1)
        mine = jnp.take_along_axis(z, (targets // C)[..., None], axis=-1)[..., 0]
        return (new, total, jnp.where(targets % C == c, mine, hit)), None

    start = jnp.full(targets.shape, -1e30), jnp.zeros(targets.shape), jnp.zeros(targets.shape)
    (top, total, hit), _ = jax.lax.scan(one, start, (jnp.arange(C), head_CDW))
    return top + jnp.log(total) - hit
