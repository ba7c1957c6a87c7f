"""The picture of packed rows: its mask and its blocks are those of the dense mask, counted by hand."""

import re

import numpy as np
import pytest
from PIL import Image

from tfusion.data import pipeline
from tfusion.models.masks import dense_mask
from tfusion.objectives import kind_of
from tfusion.reporting import inspect_rows


def blocks_of(mask_BTT, block: int):
    """(any pair visible, all pairs visible) of every block of whole rows, from the dense mask."""
    B, T, _ = mask_BTT.shape
    parts = mask_BTT.reshape(B, T // block, block, T // block, block)
    return parts.any((2, 4)), parts.all((2, 4))


@pytest.mark.parametrize("image_attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("block", [8, 16, 64])
def test_picture_and_counts_are_the_masks(cfg, tmp_path, monkeypatch, block, image_attention):
    rows = kind_of(cfg).open_rows(cfg)
    batch = next(pipeline.batches(rows, 0, 1, 3))
    mask = np.asarray(dense_mask(batch.segment_ids_BT, batch.image_ids_BT, image_attention))
    visible, full = blocks_of(mask, block)
    figures, path = [], tmp_path / "rows.png"
    monkeypatch.setattr(inspect_rows.plt, "close", figures.append)
    line = inspect_rows.draw_rows(batch, image_attention, block, path)
    assert line == (f"{visible.sum()} of {visible.size} blocks of {block} x {block} run, {visible.sum()} hold "
                    f"a visible pair; {mask.sum()} of {mask.size} pairs are visible")
    with Image.open(path) as image:
        assert image.format == "PNG" and image.size == (1200, 1800)  # 6 inches a row, 100 dots an inch
        assert len(set(np.asarray(image.convert("RGB")).reshape(-1, 3)[::7].sum(1))) > 3
    axes = np.reshape(figures[0].axes, (3, 2))
    for row, (left, right) in enumerate(axes):
        drawn = left.images[0].get_array()
        np.testing.assert_array_equal(drawn > 0, mask[row])
        later = np.argwhere(drawn == 2)
        assert (later[:, 0] < later[:, 1]).all() and bool(len(later)) == (image_attention == "bidirectional")
        np.testing.assert_array_equal(right.images[0].get_array(), visible[row].astype(int) + full[row])
        partial, whole, skipped = map(int, re.findall(r"(\d+) (?:partial|fully|skipped)", right.get_title()))
        assert [partial, whole, skipped] == [
            (visible[row] & ~full[row]).sum(), full[row].sum(), (~visible[row]).sum()]
        assert f"row {row}:" in left.get_title()
