"""Which (query block, key block) pairs an attention kernel runs, from the key intervals alone.

Query q sees the keys k_start[q] <= k < k_end[q]. A query block's intervals lie in [min k_start, max k_end),
so only the key blocks that this range touches are run; a key block inside [max k_start, min k_end) is seen
whole by every query of the block, and needs no mask.

The range has no holes, so no block is run in vain, wherever the queries of a block stand at consecutive
positions and each sees its own: neighbouring intervals then hold neighbouring integers, and a chain of
those has no gap. Packed rows are so, and so is any contiguous slice of one against all of its keys. For
other queries (two distant slices in one block) the result is still right; `block_map` shows what it costs.

B batch, T queries, S keys, i query block, j key block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tfusion.errors import UserError

SKIPPED, PARTIAL, FULL = 0, 1, 2


class Bounds(NamedTuple):
    """Of each block, the range of blocks on the other side: run [start, end), of which
    [full_start, full_end) fully visible, start <= full_start <= full_end <= end. int32, (B, i) or (B, j)."""

    start: jax.Array
    end: jax.Array
    full_start: jax.Array
    full_end: jax.Array

    def runs(self, num_blocks: int):
        """bool (B, this block, other block)."""
        return _within(self.start, self.end, num_blocks)

    def full(self, num_blocks: int):
        """bool (B, this block, other block)."""
        return _within(self.full_start, self.full_end, num_blocks)


class BlockMap(NamedTuple):
    kind_Bij: jax.Array  # int8: SKIPPED, PARTIAL or FULL
    ideal: int  # how many (query block, key block) pairs hold at least one visible (query, key) pair

    @property
    def run(self):
        """How many pairs of blocks the kernels run; equal to `ideal` on packed rows."""
        return (self.kind_Bij > SKIPPED).sum()


def num_blocks(length: int, block: int) -> int:
    return -(-length // block)


def pad_intervals(k_start_BT, k_end_BT, block_q: int):
    """Fills the last query block with copies of the last query's interval: never empty, widens no range."""
    T = k_start_BT.shape[1]
    extra = num_blocks(T, block_q) * block_q - T
    if not extra:
        return k_start_BT, k_end_BT
    xp = _numpy_of(k_start_BT)
    return tuple(xp.pad(x, ((0, 0), (0, extra)), mode="edge") for x in (k_start_BT, k_end_BT))


def key_bounds(k_start_BT, k_end_BT, block_q: int, block_k: int) -> Bounds:
    """Of every query block, the key blocks to run."""
    k_start_BT, k_end_BT = pad_intervals(k_start_BT, k_end_BT, block_q)
    B, T = k_start_BT.shape
    k_start, k_end = (x.reshape(B, T // block_q, block_q) for x in (k_start_BT, k_end_BT))
    xp = _numpy_of(k_start)
    full_start = -(-k_start.max(-1) // block_k)
    full_end = xp.maximum(k_end.min(-1) // block_k, full_start)
    bounds = k_start.min(-1) // block_k, -(-k_end.max(-1) // block_k), full_start, full_end
    return Bounds(*(x.astype(np.int32) for x in bounds))


def query_bounds(keys: Bounds, num_k_blocks: int) -> Bounds:
    """The same pairs seen from the keys: of every key block, the query blocks to run."""
    start, end, _ = _extent(keys.runs(num_k_blocks))
    full_start, full_end, gapless = _extent(keys.full(num_k_blocks))
    xp = _numpy_of(start)
    usable = gapless & (full_start < full_end)  # where not, every block of the range is masked
    return Bounds(start, end, xp.where(usable, full_start, start), xp.where(usable, full_end, start))


def block_map(k_start_BT, k_end_BT, block_q: int, block_k: int, num_keys: int | None = None) -> BlockMap:
    """The pairs of blocks that the kernels skip, run with a mask, and run without; numpy or jax arrays.

    num_keys: S where it is not T. Raises UserError on an empty interval: kernels do not support one.
    """
    xp = _numpy_of(k_start_BT)
    if xp is np and not (k_start_BT < k_end_BT).all():
        raise UserError("every query must see at least one key (padding sees itself): k_start < k_end")
    count = num_blocks(num_keys or k_start_BT.shape[1], block_k)
    keys = key_bounds(k_start_BT, k_end_BT, block_q, block_k)
    kind = keys.runs(count).astype(np.int8) + (keys.runs(count) & keys.full(count)).astype(np.int8)
    k_start, k_end = (x.reshape(len(x), -1, block_q, 1) for x in pad_intervals(k_start_BT, k_end_BT, block_q))
    first = (xp.arange(count) * block_k).reshape(1, 1, 1, count)
    ideal = ((k_start < first + block_k) & (k_end > first)).any(axis=2).sum()
    return BlockMap(kind, ideal)


def _extent(flags_Bij):
    """Over the axis i: first set, one past the last set, and whether all between are set; 0, 0 if none."""
    xp, n = _numpy_of(flags_Bij), flags_Bij.shape[1]
    i = xp.arange(n, dtype=np.int32).reshape(1, n, 1)
    end = xp.where(flags_Bij, i + 1, 0).max(1)
    start = xp.minimum(xp.where(flags_Bij, i, n).min(1), end)
    return start, end, flags_Bij.sum(1) == end - start


def _within(start, end, n: int):
    other = _numpy_of(start).arange(n, dtype=np.int32).reshape(1, 1, n)
    return (start[..., None] <= other) & (other < end[..., None])


def _numpy_of(x):
    return np if isinstance(x, np.ndarray) else jnp
