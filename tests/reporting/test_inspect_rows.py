"""The picture of a packed row: its mask and its blocks are those of the dense mask, counted by hand."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from tfusion.models.masks import dense_mask
from tfusion.objectives import kind_of
from tfusion.reporting.inspect_rows import block_size, draw_row


def blocks_of(mask_TT, block: int):
    """(any pair visible, all pairs visible) of every block, from the dense mask."""
    parts = mask_TT.reshape(len(mask_TT) // block, block, -1, block)
    return parts.any((1, 3)), parts.all((1, 3))


@pytest.mark.parametrize("image_attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("block", [8, 16, 64])
def test_picture_and_counts_are_the_masks(cfg, block, image_attention):
    for row in kind_of(cfg).open_rows(cfg).read(range(3)):
        mask = np.asarray(dense_mask(row.segment_ids_BT[None], row.image_ids_BT[None], image_attention))[0]
        visible, full = blocks_of(mask, block)
        drawing = draw_row(row, image_attention, block)
        assert drawing.line == (
            f"{visible.sum()} of {visible.size} blocks of {block} x {block} run, {visible.sum()} hold "
            f"a visible pair; {mask.sum()} of {mask.size} pairs are visible")
        left, right = drawing.figure.axes
        drawn = left.images[0].get_array()
        np.testing.assert_array_equal(drawn > 0, mask)
        later = np.argwhere(drawn == 2)
        assert (later[:, 0] < later[:, 1]).all() and bool(len(later)) == (image_attention == "bidirectional")
        np.testing.assert_array_equal(right.images[0].get_array(), visible.astype(int) + full)
        partial, whole, skipped = map(int, re.findall(r"(\d+) (?:partial|fully|skipped)", right.get_title()))
        assert [partial, whole, skipped] == [(visible & ~full).sum(), full.sum(), (~visible).sum()]


def test_a_picture_is_a_png(cfg):
    row = kind_of(cfg).open_rows(cfg)[0]
    with Image.open(io.BytesIO(draw_row(row, "bidirectional", 16).png)) as image:
        assert image.format == "PNG" and image.size == (1200, 600)
        assert len(set(np.asarray(image.convert("RGB")).reshape(-1, 3)[::7].sum(1))) > 3


@pytest.mark.parametrize("T, block", [(8, 16), (256, 16), (512, 16), (1024, 32), (4096, 128), (6144, 128)])
def test_a_row_has_few_blocks(T, block):
    assert block_size(T) == block
