"""The embedded data pack: emoji images with alpha, WordNet glosses and a small tokenizer.

Everything here is read through `importlib.resources`, so it is found in an installed package as
well as in a checkout. What is shipped, from where and under which licence: `README.md` beside
this file.

Shapes: N images, K sprites, S side in pixels.
"""

import dataclasses
import functools
import importlib.resources
import io
import json
import lzma
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

EMOJI = "emoji.npz"
GLOSSES = "wordnet_glosses.txt.xz"
TOKENIZER = "tokenizer_1022.model"


def pack_path(name: str) -> Path:
    """The path of a shipped file, such as 'emoji.npz'.

    Raises:
      FileNotFoundError: the file is not where the package was installed.
    """
    path = Path(str(importlib.resources.files(__name__) / name))
    if not path.is_file():
        raise FileNotFoundError(
            f"data pack file {path} is missing; reinstall it with `pip install --force-reinstall .`"
        )
    return path


@dataclasses.dataclass(frozen=True)
class EmojiPack:
    """Emoji images and what they show.

    meta: N dicts with 'style' (noto | fluent-emoji | fluent-emoji-flat), 'label' (str),
      'tags' (list of str) and 'group' (int, emojibase's group number).
    data: uint8 (bytes,), all WebP files one after the other; offsets: int64 (N + 1,).
    """

    meta: list[dict]
    data: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.meta)

    def image(self, index: int) -> np.ndarray:
        """Image `index` as uint8 (S, S, 4): RGB and straight (not premultiplied) alpha."""
        start, stop = self.offsets[index], self.offsets[index + 1]
        with Image.open(io.BytesIO(self.data[start:stop].tobytes())) as image:
            return np.asarray(image.convert("RGBA"))

    def index(self, style: str, label: str) -> int:
        """The number of the image with this style and label.

        Raises:
          ValueError: no such image in the pack.
        """
        for i, entry in enumerate(self.meta):
            if entry["label"] == label and entry["style"] == style:
                return i
        styles = sorted({entry["style"] for entry in self.meta})
        raise ValueError(
            f"no emoji labelled {label!r} in style {style!r}; styles are {', '.join(styles)}, "
            "labels are listed in open_emoji().meta"
        )


@functools.cache
def open_emoji() -> EmojiPack:
    """Opens the shipped emoji pack (read once per process).

    Raises:
      FileNotFoundError: the pack is not installed.
    """
    with np.load(pack_path(EMOJI)) as arrays:
        meta = json.loads(arrays["meta"].tobytes())
        return EmojiPack(meta, arrays["data"], arrays["offsets"])


def load_sprites(labels: Sequence[str], size: int, style: str = "fluent-emoji-flat") -> np.ndarray:
    """Cuts emoji out as small sprites ready to be pasted: canvas * (1 - alpha) + rgb.

    Each image is cropped to its alpha box, padded to a square and area-resampled in
    premultiplied space, so that no background colour leaks into the edges.

    Returns:
      float32 (K, size, size, 4): RGB premultiplied by alpha in 0..255, alpha in 0..1.

    Raises:
      ValueError: a label is not in the pack.
      FileNotFoundError: the pack is not installed.
    """
    pack = open_emoji()
    return np.stack([_sprite(pack.image(pack.index(style, label)), size) for label in labels])


def _sprite(image_SS4: np.ndarray, size: int) -> np.ndarray:
    alpha_SS1 = image_SS4[..., 3:].astype(np.float32) / 255
    premultiplied_SS4 = np.concatenate([image_SS4[..., :3] * alpha_SS1, alpha_SS1], axis=-1)
    ys, xs = np.nonzero(image_SS4[..., 3])
    box_HW4 = premultiplied_SS4[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    height, width, _ = box_HW4.shape
    side = max(height, width)
    square = np.zeros((side, side, 4), np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = box_HW4
    weights = _area_weights(side, size)
    return np.einsum("yh,xw,hwc->yxc", weights, weights, square, optimize=True)


def _area_weights(source: int, target: int) -> np.ndarray:
    """Row o: the share of each source pixel in target pixel o. float32 (target, source)."""
    edges = np.arange(target + 1)[:, None] * (source / target)
    covered = np.clip(edges - np.arange(source), 0, 1)  # of each pixel, left of each edge
    return (np.diff(covered, axis=0) * (target / source)).astype(np.float32)


@functools.cache
def _glosses() -> tuple[str, ...]:
    with lzma.open(pack_path(GLOSSES), "rt", encoding="utf-8") as lines:
        return tuple(line.rstrip("\n") for line in lines)


def read_glosses() -> list[str]:
    """The WordNet glosses, one string each: 'lemma (pos): definition; "example"'.

    Raises:
      FileNotFoundError: the pack is not installed.
    """
    return list(_glosses())
