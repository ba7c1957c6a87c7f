"""The order in which a run meets a source's records: each once an epoch, in another order every epoch, decided
by (seed, source, epoch) alone.

Shuffled on two levels, so that ten thousand shards need few open files: an epoch takes the shards in an order
of its own, in blocks of BLOCK of them, and shuffles the records within a block. The price of any place is its
block. Shuffling is sorting by keyed hashes (transforms.keyed_bits), the same in every version of NumPy.

S shards with records, E epochs.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tfusion.data.transforms import keyed_bits

BLOCK = 64  # shards that are read from at a time
BLOCKS_KEPT = 4
SHARD_COIN, RECORD_COIN = 3, 4  # beside those of data/transforms.py


class Places(NamedTuple):
    """What stands at some places (parallel int64 arrays)."""

    epochs: np.ndarray
    shards: np.ndarray
    records: np.ndarray  # within the shard


class Order:
    """Of one source. records: of each shard, as its ledger has them; at least one in all."""

    def __init__(self, records: Sequence[int], seed: int, key: int):
        records = np.asarray(records, np.int64)
        self.keys, self.total = (seed, key), int(records.sum())
        self._shards = np.flatnonzero(records)
        self._records = records[self._shards]
        self.blocks = -(-len(self._shards) // BLOCK)  # of an epoch
        self._shuffled = functools.lru_cache(BLOCKS_KEPT)(self._shuffle)

    def between(self, start: int, stop: int) -> Places:
        """Places start to stop, 0 <= start < stop."""
        first, last = (self._block(place) for place in (start, stop - 1))
        begin, shuffled = self._shuffled(first, last)
        return Places(*(x[start - begin : stop - begin] for x in shuffled))

    def _epochs(self, first: int, last: int):
        """(shards, number of records, first place), each (E, S), as the epochs take their shards."""
        epochs = np.arange(first, last + 1)[:, None]
        order = np.argsort(keyed_bits(*self.keys, epochs, self._shards, SHARD_COIN), axis=1, kind="stable")
        records = self._records[order]
        begins = first * self.total + np.cumsum(records).reshape(records.shape) - records
        return self._shards[order], records, begins

    def _block(self, place: int) -> int:
        """Its number, counted through the epochs."""
        epoch = place // self.total
        if self.blocks == 1:
            return epoch
        begins = self._epochs(epoch, epoch)[2][0, ::BLOCK]
        return epoch * self.blocks + int(np.searchsorted(begins, place, side="right")) - 1

    def _shuffle(self, first: int, last: int) -> tuple[int, Places]:
        """(the first place, all places) of the blocks first to last."""
        epochs = np.arange(first // self.blocks, last // self.blocks + 1)
        shards, records, begins = self._epochs(epochs[0], epochs[-1])
        blocks = epochs[:, None] * self.blocks + np.arange(len(self._shards)) // BLOCK
        chosen = (first <= blocks) & (blocks <= last)
        number, begin = records[chosen], begins[chosen]
        epoch, shard, block = (np.repeat(np.broadcast_to(x, blocks.shape)[chosen], number)
                               for x in (epochs[:, None], shards, blocks))
        record = begin[0] + np.arange(len(epoch)) - np.repeat(begin, number)
        order = np.lexsort((keyed_bits(*self.keys, epoch, shard, record, RECORD_COIN), block))
        return int(begin[0]), Places(epoch[order], shard[order], record[order])
