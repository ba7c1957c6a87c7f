"""A picture of what attention does with packed rows: the mask, and the blocks that the kernels run.

T positions; i query block, j key block.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

from tfusion.kernels.block_map import FULL, PARTIAL, SKIPPED, block_map
from tfusion.models.masks import dense_mask, key_intervals
from tfusion.types import Batch

MASK_COLOURS = ListedColormap(["#f7f6f1", "#b4c5da", "#c4703c"])  # hidden, earlier, later in the same image
BLOCK_COLOURS = ListedColormap(["#f7f6f1", "#e3b45c", "#4f8a5b"])  # skipped, partial, fully visible


def draw_rows(batch: Batch, image_attention: str, block: int, path: Path) -> str:
    """Writes one line of two pictures per row of the batch to a PNG; returns the counts as one line."""
    arrays = batch.segment_ids_BT, batch.image_ids_BT, image_attention
    mask, bounds = np.asarray(dense_mask(*arrays)), [np.asarray(x) for x in key_intervals(*arrays)]
    blocks = block_map(*bounds, block, block)
    kinds, T = np.asarray(blocks.kind_Bij), mask.shape[1]
    side = kinds.shape[1] * block
    fig, axes = plt.subplots(len(mask), 2, figsize=(12, 6 * len(mask)), squeeze=False)
    later = np.triu(np.ones((T, T), bool), 1)
    for row, (left, right) in enumerate(axes):
        left.imshow(mask[row].astype(int) + (mask[row] & later), cmap=MASK_COLOURS, vmin=0, vmax=2,
                    interpolation="nearest")
        left.set_title(f"row {int(batch.row_ids_B[row])}: mask (query down, key across); orange: later patches")
        right.imshow(kinds[row], cmap=BLOCK_COLOURS, vmin=0, vmax=2, extent=(0, side, side, 0),
                     interpolation="nearest")
        count = [int((kinds[row] == kind).sum()) for kind in (SKIPPED, PARTIAL, FULL)]
        right.set_title(f"blocks of {block}: {count[1]} partial (amber), {count[2]} fully visible (green), "
                        f"{count[0]} skipped")
    fig.tight_layout()
    fig.savefig(path, dpi=100)
    plt.close(fig)
    run, ideal = int(blocks.run), int(blocks.ideal)
    return (f"{run} of {kinds.size} blocks of {block} x {block} run, {ideal} hold a visible pair; "
            f"{int(mask.sum())} of {mask.size} pairs are visible")
