"""The order of records: each once an epoch, few shards at a time, any place at the price of its block."""

import itertools

import numpy as np
import pytest

from tfusion.data import order
from tfusion.data.order import BLOCK, Order

SHARDS = {  # records of each shard
    "one": [8], "one record": [1], "some": [3, 0, 5, 1, 7], "a block": [4] * BLOCK,
    "a block and one": [3] * (BLOCK + 1), "many": np.random.default_rng(0).integers(0, 9, 300).tolist()}


def everything(order: Order, start: int, stop: int) -> list[tuple]:
    return list(zip(*(x.tolist() for x in order.between(start, stop))))


def epochs(order: Order, number: int) -> list[list]:
    return [[(shard, record) for _, shard, record in everything(order, e * order.total, (e + 1) * order.total)]
            for e in range(number)]


@pytest.fixture(params=SHARDS.values(), ids=SHARDS.keys())
def records(request):
    return request.param


def test_each_record_once_an_epoch_in_another_order(records):
    stored = [(shard, record) for shard, number in enumerate(records) for record in range(number)]
    found = epochs(Order(records, 0, 1), 4)
    assert all(sorted(epoch) == stored for epoch in found)
    if len(stored) > 1:
        assert len({tuple(epoch) for epoch in [stored, *found]}) == 5


def test_any_range_is_a_part_of_the_whole(records):
    """In one reading over three epochs or place by place, forwards or not; the epoch told is the place's."""
    one, total = Order(records, 5, 1), sum(records)
    whole = everything(one, 0, 3 * total)
    assert [epoch for epoch, *_ in whole] == [place // total for place in range(3 * total)]
    rng = np.random.default_rng(0)
    for start, length in zip(rng.integers(0, 2 * total, 30).tolist(), rng.integers(1, total + 1, 30).tolist()):
        assert everything(Order(records, 5, 1), start, start + length) == whole[start : start + length]
        assert everything(one, start, start + length) == whole[start : start + length]


def test_few_shards_at_a_time():
    """Of 300 shards, BLOCK until all their records have been met; others the next epoch."""
    records = [4] * 300
    blocks = [[{shard for shard, _ in epoch[i : i + 4 * BLOCK]} for i in range(0, 1200, 4 * BLOCK)]
              for epoch in epochs(Order(records, 0, 1), 2)]
    for epoch in blocks:
        assert [len(block) for block in epoch] == [BLOCK] * 4 + [300 - 4 * BLOCK]
        assert all(not a & b for a, b in itertools.combinations(epoch, 2))
    assert blocks[0][0] != blocks[1][0] and blocks[0][0] != set(range(BLOCK))


def test_records_of_a_block_are_mixed():
    """Neighbours come from one shard about as often as chance has it, and records in any order."""
    (found,) = epochs(Order([100] * BLOCK, 0, 1), 1)
    shards, numbers = (np.array(x) for x in zip(*found))
    assert (shards[1:] == shards[:-1]).mean() < 3 / BLOCK
    assert abs(np.corrcoef(numbers, np.arange(len(numbers)))[0, 1]) < 0.05


def test_sources_and_seeds_have_their_own_orders():
    found = [tuple(epochs(Order([20] * 5, seed, key), 1)[0]) for seed, key in ((0, 1), (0, 2), (1, 1))]
    assert len(set(found)) == 3 and tuple(epochs(Order([20] * 5, 0, 1), 1)[0]) == found[0]


def test_the_order_is_written_down():
    """Runs are resumed by it, with whatever version of NumPy."""
    assert everything(Order([2, 3, 1], 0, 7), 4, 9) == [(0, 1, 0), (0, 0, 0), (1, 2, 0), (1, 1, 0), (1, 1, 2)]


@pytest.mark.parametrize("records", [[4096] * 10_000, [8], [262_144]], ids=["many", "small", "one"])
def test_far_places_are_cheap(records):
    """Place 10^9, counted in records shuffled, not in time."""
    one, shuffled = Order(records, 0, 1), []
    one._shuffled = lambda *blocks: shuffled.append(one._shuffle(*blocks)) or shuffled[-1]
    found = one.between(10**9, 10**9 + 100)
    assert found.epochs[0] == 10**9 // one.total
    assert len(shuffled) == 1 and len(shuffled[0][1].records) <= max(BLOCK * 4096, 100 + 2 * 8)


def test_a_block_is_shuffled_once(monkeypatch):
    calls, real = [], order.keyed_bits
    monkeypatch.setattr(order, "keyed_bits", lambda *keys: calls.append(keys[-1]) or real(*keys))
    one = Order([100] * 200, 0, 1)
    for start in range(0, 6000, 100):
        one.between(start, start + 100)
    assert calls.count(order.RECORD_COIN) == 1
