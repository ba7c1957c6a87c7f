"""A picture of what attention does with a packed row: the mask, and the blocks that the kernels run.

T positions; i query block, j key block.
"""

import io
from typing import NamedTuple

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from tfusion.kernels.block_map import FULL, PARTIAL, SKIPPED, block_map
from tfusion.models.masks import dense_mask, key_intervals
from tfusion.types import Batch

MASK_COLOURS = ListedColormap(["#f7f6f1", "#b4c5da", "#c4703c"])  # hidden, earlier, later in the same image
BLOCK_COLOURS = ListedColormap(["#f7f6f1", "#e3b45c", "#4f8a5b"])  # skipped, partial, fully visible


class Drawing(NamedTuple):
    figure: Figure
    line: str  # what was counted

    @property
    def png(self) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def block_size(T: int) -> int:
    """A power of two, 16 or more, of which 32 to 63 make up a row of 512 positions or more."""
    return max(16, 1 << (T // 32).bit_length() >> 1)


def draw_row(row: Batch, image_attention: str, block: int) -> Drawing:
    """Two pictures of a row (without the batch axis) side by side."""
    arrays = row.segment_ids_BT[None], row.image_ids_BT[None], image_attention
    mask = np.asarray(dense_mask(*arrays))[0]
    blocks = block_map(*(np.asarray(x) for x in key_intervals(*arrays)), block, block)
    kinds, T = np.asarray(blocks.kind_Bij)[0], len(mask)
    side, later = len(kinds) * block, np.triu(np.ones((T, T), bool), 1)
    figure = Figure(figsize=(12, 6), layout="tight")
    left, right = figure.subplots(1, 2)
    left.imshow(mask.astype(np.uint8) + (mask & later), cmap=MASK_COLOURS, vmin=0, vmax=2,
                interpolation="nearest")
    left.set_title("mask (query down, key across); orange: later patches", fontsize=10)
    right.imshow(kinds, cmap=BLOCK_COLOURS, vmin=0, vmax=2, extent=(0, side, side, 0), interpolation="nearest")
    skipped, partial, full = (int((kinds == kind).sum()) for kind in (SKIPPED, PARTIAL, FULL))
    right.set_title(f"blocks of {block}: {partial} partial (amber), {full} fully visible (green), "
                    f"{skipped} skipped", fontsize=10)
    line = (f"{int(blocks.run)} of {kinds.size} blocks of {block} x {block} run, {int(blocks.ideal)} hold a "
            f"visible pair; {int(mask.sum())} of {mask.size} pairs are visible")
    return Drawing(figure, line)
