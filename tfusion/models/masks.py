"""Which positions a position may see (Transfusion, section 3 and figure 4).

Causal over the whole document, plus full attention among the patches of one image, never across
documents. Padding (segment 0) sees only itself. The dense mask is the definition; the key interval
[k_start, k_end) is the same thing in two integers per query, and all that attention needs.

B batch, T positions (queries Q and keys K where both occur).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sight(NamedTuple):
    """Where each query stands and what it sees, int32: all that the transformer knows of a row's layout."""

    positions_BT: jax.Array  # in its document, for RoPE
    k_start_BT: jax.Array  # sees the keys k_start <= k < k_end, positions of the row
    k_end_BT: jax.Array


def row_sight(positions_BT, segment_ids_BT, image_ids_BT, image_attention: str = "bidirectional") -> Sight:
    """The sight of whole rows (types.Batch)."""
    return Sight(positions_BT, *key_intervals(segment_ids_BT, image_ids_BT, image_attention))


def dense_mask(segment_ids_BT, image_ids_BT, image_attention: str = "bidirectional"):
    """bool (B, Q, K): True where query position q sees key position k."""
    T = segment_ids_BT.shape[1]
    q, k = jnp.arange(T)[:, None], jnp.arange(T)[None, :]
    same_document = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    same_image = image_ids_BT[:, :, None] == image_ids_BT[:, None, :]
    same_image &= image_ids_BT[:, :, None] > 0
    visible = k <= q
    if image_attention == "bidirectional":
        visible = visible[None] | same_image
    padding = segment_ids_BT[:, :, None] == 0
    return jnp.where(padding, q == k, visible & same_document)


def key_intervals(segment_ids_BT, image_ids_BT, image_attention: str = "bidirectional"):
    """(k_start_BT, k_end_BT), int32: query q sees exactly the keys k_start <= k < k_end.

    k_start is the start of the query's document; k_end is the end of its image where it is a patch,
    else its own position + 1. Documents and images are contiguous runs (the data contract).
    """
    own = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32), segment_ids_BT.shape)
    k_start, k_end = _run_start(segment_ids_BT), own + 1
    if image_attention == "bidirectional":
        k_end = jnp.where(image_ids_BT > 0, _run_end(image_ids_BT), k_end)
    padding = segment_ids_BT == 0
    return jnp.where(padding, own, k_start), jnp.where(padding, own + 1, k_end)


def _run_start(ids_BT):
    """Position at which each position's run of equal ids starts."""
    T = ids_BT.shape[1]
    changed = ids_BT[:, 1:] != ids_BT[:, :-1]
    starts = jnp.where(jnp.pad(changed, ((0, 0), (1, 0)), constant_values=True), jnp.arange(T), 0)
    return jax.lax.cummax(starts.astype(jnp.int32), axis=1)


def _run_end(ids_BT):
    """One past the position at which each position's run of equal ids ends."""
    T = ids_BT.shape[1]
    return T - _run_start(ids_BT[:, ::-1])[:, ::-1]
