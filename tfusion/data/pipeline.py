"""From rows to batches, through Grain's step-indexed MapDataset.

Batch k of the run = rows [first + k B, first + (k + 1) B); process p reads the p-th share of them.
"""

import grain

from tfusion.data import packing

READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)


def batches(rows, first_row: int, num_batches: int, batch_size: int, process: int = 0,
            num_processes: int = 1):
    """Iterator over this process's share of `num_batches` global batches from row `first_row` on."""
    local = batch_size // num_processes

    def batch(k: int):
        start = first_row + k * batch_size + process * local
        out = packing.stack_rows(rows.read(range(start, start + local)))
        rows.check(out)
        return out

    return iter(grain.MapDataset.range(num_batches).map(batch).to_iter_dataset(READ))
