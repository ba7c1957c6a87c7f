"""The blocks that kernels run, against the dense mask cut into blocks."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.conftest import PACKINGS
from tfusion.errors import UserError
from tfusion.kernels import block_map as bm
from tfusion.models.masks import dense_mask, key_intervals

NAMES = (*PACKINGS, "padding", "random")


def intervals(segments, images):
    return tuple(np.asarray(x) for x in key_intervals(segments, images))


def blocks_of(mask_BQK, block_q: int, block_k: int):
    """(any, all) visible pair of each block; the last query fills its block, absent keys are hidden."""
    B, T, S = mask_BQK.shape
    extra_q, extra_k = -T % block_q, -S % block_k
    mask = np.pad(mask_BQK, ((0, 0), (0, extra_q), (0, 0)), mode="edge")
    mask = np.pad(mask, ((0, 0), (0, 0), (0, extra_k)))
    mask = mask.reshape(B, -1, block_q, mask.shape[2] // block_k, block_k)
    return mask.any((2, 4)), mask.all((2, 4))


@pytest.mark.parametrize("block_q, block_k", [(16, 16), (32, 16), (16, 48), (256, 256)])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_run_are_exactly_those_with_a_visible_pair(packed, name, block_q, block_k):
    for seed, T in enumerate((200, 192, 64)):
        rows = packed(name, 3, T, seed)
        seen, whole = blocks_of(np.asarray(dense_mask(*rows)), block_q, block_k)
        blocks = bm.block_map(*intervals(*rows), block_q, block_k)
        np.testing.assert_array_equal(blocks.kind_Bij > bm.SKIPPED, seen)
        np.testing.assert_array_equal(blocks.kind_Bij == bm.FULL, whole)
        assert blocks.run == blocks.ideal == seen.sum()


@pytest.mark.parametrize("name", NAMES)
def test_a_slice_of_queries_against_all_keys_has_no_holes(packed, name):
    rows = packed(name, 2, 200, 3)
    k_start, k_end = intervals(*rows)
    for part in (slice(0, 50), slice(50, 150), slice(137, 200)):
        seen, _ = blocks_of(np.asarray(dense_mask(*rows))[:, part], 32, 16)
        blocks = bm.block_map(k_start[:, part], k_end[:, part], 32, 16, num_keys=200)
        np.testing.assert_array_equal(blocks.kind_Bij > bm.SKIPPED, seen)
        assert blocks.run == blocks.ideal


@pytest.mark.parametrize("name", NAMES)
def test_keys_see_the_same_blocks_as_queries(packed, name):
    """dk and dv run over the same pairs as the forward and dq, and leave out the same masks."""
    keys = bm.key_bounds(*intervals(*packed(name, 3, 200, 1)), 32, 16)
    count_q, count_k = keys.start.shape[1], bm.num_blocks(200, 16)
    queries = bm.query_bounds(keys, count_k)
    np.testing.assert_array_equal(queries.runs(count_q).swapaxes(1, 2), keys.runs(count_k))
    np.testing.assert_array_equal(queries.full(count_q).swapaxes(1, 2), keys.full(count_k))
    for bounds in (keys, queries):
        assert (bounds.start <= bounds.full_start).all() and (bounds.full_start <= bounds.full_end).all()
        assert (bounds.full_end <= bounds.end).all()


def test_holes_are_counted_where_queries_are_not_neighbours():
    """Two distant slices in one query block: nothing visible is skipped, and the waste shows."""
    position = np.r_[0:8, 120:128][None]
    blocks = bm.block_map(position - position % 8, position + 1, 16, 16, num_keys=128)
    assert blocks.ideal == 2 and blocks.run == 8


def test_gaps_between_full_blocks_are_masked_instead():
    """Any intervals: what query_bounds calls full is full."""
    rng = np.random.default_rng(0)
    k_start = np.repeat(rng.integers(0, 40, (4, 8)), 16, axis=1)
    keys = bm.key_bounds(k_start, k_start + np.repeat(rng.integers(1, 88, (4, 8)), 16, axis=1), 16, 16)
    queries = bm.query_bounds(keys, 8)
    assert not (queries.full(8).swapaxes(1, 2) & ~keys.full(8)).any()
    assert not (keys.runs(8) & ~queries.runs(8).swapaxes(1, 2)).any()


def test_numpy_and_jax_agree(packed):
    k_start, k_end = intervals(*packed("random", 2, 100))
    ours = bm.block_map(k_start, k_end, 32, 16)
    theirs = bm.block_map(jnp.asarray(k_start), jnp.asarray(k_end), 32, 16)
    np.testing.assert_array_equal(ours.kind_Bij, theirs.kind_Bij)
    assert ours.ideal == theirs.ideal and ours.kind_Bij.dtype == theirs.kind_Bij.dtype == np.int8


def test_empty_interval_is_refused():
    with pytest.raises(UserError, match="at least one key"):
        bm.block_map(np.zeros((1, 4), np.int32), np.zeros((1, 4), np.int32), 2, 2)
