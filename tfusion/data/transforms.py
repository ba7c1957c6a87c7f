"""Per-document choices: which comes first, caption or picture, and whether the caption is dropped.

Every choice is a coin keyed by (seed, source, epoch, record), so it can be made for a whole window when
its rows are planned, and again for one document when it is read, on any process.
"""

import numpy as np

from tfusion.data.config import DataConfig
from tfusion.types import Document, Part

DROP_COIN, ORDER_COIN = 1, 2


def keyed_bits(*keys):
    """uint64, a hash (splitmix64, chained) of integer keys; arrays broadcast."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for key in keys:
            z = (state ^ np.asarray(key).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = z ^ (z >> np.uint64(31))
    return state


def keyed_uniform(*keys):
    """float64 in [0, 1) of integer keys; arrays broadcast."""
    return (keyed_bits(*keys) >> np.uint64(11)).astype(np.float64) / 2**53


def picture_names(source: int, record: int, images: int):
    """uint32 (images, 2): what a record's pictures are called in evaluation, whatever row they stand in."""
    names = keyed_bits(source, record, np.arange(images))
    return np.stack([names >> np.uint64(32), names & np.uint64(0xFFFFFFFF)], axis=-1).astype(np.uint32)


def drops_caption(cfg: DataConfig, seed: int, source: int, epoch, record):
    """bool: the document loses its captions, so that guidance has an unconditional model."""
    return keyed_uniform(seed, source, epoch, record, DROP_COIN) < cfg.caption_dropout


def puts_image_first(cfg: DataConfig, seed: int, source: int, epoch, record):
    return keyed_uniform(seed, source, epoch, record, ORDER_COIN) < cfg.image_first_fraction


def arrange(parts: list[Part], drop_caption: bool, image_first: bool, image_first_max_t: float) -> Document:
    """Orders a record's parts. Text-only records are left as they are.

    A dropped caption leaves the pictures alone, unscored as text. Picture-first swaps each caption with
    the picture it precedes and limits the picture's noise to image_first_max_t.
    """
    if all(part.kind == "text" for part in parts):
        return Document(tuple(parts))
    if drop_caption:
        return Document(tuple(part for part in parts if part.kind == "image"), score_text=False)
    if not image_first:
        return Document(tuple(parts))
    parts = [part._replace(max_t=image_first_max_t) if part.kind == "image" else part for part in parts]
    place = 0
    while place < len(parts) - 1:
        pair = parts[place : place + 2]
        swaps = [part.kind for part in pair] == ["text", "image"]
        if swaps:
            parts[place : place + 2] = reversed(pair)
        place += 1 + swaps  # a caption goes before no second picture
    return Document(tuple(parts))
