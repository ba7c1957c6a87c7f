"""From rows to batches, through Grain's step-indexed MapDataset.

Batch k of the run = rows [first + k B, first + (k + 1) B); a process reads those of them that it is told to.
"""

from collections.abc import Sequence

import grain

from tfusion.data import packing

READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)


def batches(rows, first_row: int, num_batches: int, batch_size: int, local_rows: Sequence[int] | None = None):
    """Iterator over `num_batches` global batches from row `first_row` on.

    local_rows: numbers, from 0 to batch_size - 1, of each batch's rows that are read; all unless given.
    """
    local = [int(row) for row in (range(batch_size) if local_rows is None else local_rows)]

    def batch(k: int):
        start = first_row + k * batch_size
        out = packing.stack_rows(rows.read([start + row for row in local]))
        rows.check(out)
        return out

    return iter(grain.MapDataset.range(num_batches).map(batch).to_iter_dataset(READ))
