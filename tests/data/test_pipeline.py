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


@pytest.mark.parametrize("local_rows", [[0, 1, 2, 3], [4, 5], [1, 6], [7]], ids=str)
def test_rows_that_a_process_is_told_to_read(cfg, local_rows):
    parts = batches(cfg, 28, 2, local_rows=np.array(local_rows))
    for whole, part in zip(batches(cfg, 28, 2), parts, strict=True):
        assert_same(part, type(whole)(*(x[local_rows] for x in whole)))


def test_autoencoder_batches_are_shared_like_any_other():
    cfg = tiny_autoencoder_config()
    (whole,), (part,) = (batches(cfg, 3, 1, local_rows=rows) for rows in (None, [2, 5]))
    assert whole.images_BHWC.shape == (8, 32, 32, 3) and whole.images_BHWC.dtype == np.uint8
    assert_same(part, type(whole)(*(x[[2, 5]] for x in whole)))


def test_the_rows_of_a_batch_are_read_together(cfg, monkeypatch):
    """One process's share with one call, which opens each shard once."""
    rows, asked = open_rows(cfg), []
    real = rows.read
    monkeypatch.setattr(rows, "read", lambda numbers: asked.append(list(numbers)) or real(numbers))
    assert len(list(pipeline.batches(rows, 3, 2, 8, [4, 5, 7]))) == 2
    assert sorted(asked) == [[7, 8, 10], [15, 16, 18]]
