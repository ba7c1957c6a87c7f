"""From rows to batches: any start, shared over processes, read together."""

import numpy as np
import pytest

from tests.conftest import tiny_autoencoder_config
from tests.data.test_rows import assert_same, batches, open_rows
from tfusion.data import pipeline


@pytest.mark.parametrize("first", [8, 13, 40])
def test_a_run_can_start_at_any_row(cfg, first):
    """Also across a window's end and in the middle of a batch: batch k holds rows first + 8 k onwards."""
    whole = batches(cfg, 0, 8)
    rows = {int(row): (batch, i) for batch in whole for i, row in enumerate(batch.row_ids_B)}
    for k, batch in enumerate(batches(cfg, first, 2)):
        np.testing.assert_array_equal(batch.row_ids_B, first + 8 * k + np.arange(8))
        for i, row in enumerate(batch.row_ids_B):
            source, j = rows[int(row)]
            for x, y in zip(batch, source):
                np.testing.assert_array_equal(x[i], y[j])


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_shares_of_the_processes_make_the_global_batch(cfg, num_processes):
    shares = [batches(cfg, 28, 2, process=p, num_processes=num_processes) for p in range(num_processes)]
    for whole, *parts in zip(batches(cfg, 28, 2), *shares):
        assert_same(type(whole)(*(np.concatenate(x) for x in zip(*parts))), whole)


def test_autoencoder_batches_are_shared_like_any_other():
    cfg = tiny_autoencoder_config()
    (whole,), *parts = (batches(cfg, 3, 1, process=p, num_processes=n) for p, n in ((0, 1), (0, 2), (1, 2)))
    assert whole.images_BHWC.shape == (8, 32, 32, 3) and whole.images_BHWC.dtype == np.uint8
    assert_same(type(whole)(*(np.concatenate(x) for x in zip(*(part[0] for part in parts)))), whole)


def test_the_rows_of_a_batch_are_read_together(cfg, monkeypatch):
    """One process's share with one call, which opens each shard once."""
    rows, asked = open_rows(cfg), []
    real = rows.read
    monkeypatch.setattr(rows, "read", lambda numbers: asked.append(list(numbers)) or real(numbers))
    assert len(list(pipeline.batches(rows, 3, 2, 8, 1, 2))) == 2
    assert sorted(asked) == [[7, 8, 9, 10], [15, 16, 17, 18]]
