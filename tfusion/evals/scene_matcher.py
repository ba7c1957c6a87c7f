"""Scores generated scenes and captions against the composed world of `tfusion.data.scenes`.

Sprites are found by template matching, so that the score needs no learned detector. What it
reads from real scenes is right almost always (tested); report that ceiling beside a model's score.

Shapes: H, W image; S sprite side; K sprites; M places a sprite may have along one side.
"""

from typing import NamedTuple

import numpy as np

from tfusion.data import scenes

_THRESHOLD = 0.5  # similarity from which a sprite counts as present; 1 = identical
_MAX_DETECTIONS = 4
_CANVAS_NAMES = tuple(scenes.CANVASES)
_CANVAS_RGB = np.array(list(scenes.CANVASES.values()), np.float32)


class Detection(NamedTuple):
    """One sprite found: its noun, its top left pixel, and how well it matches (at most 1)."""

    noun: str
    y: int
    x: int
    score: float


def match_scene(world: scenes.World, image_HW3: np.ndarray) -> tuple[str, tuple[Detection, ...]]:
    """Finds the canvas and the sprites of an image.

    Args:
      world: whose sprites to look for.
      image_HW3: uint8 (H, W, 3), of the world's size.

    Returns:
      The canvas's name (the nearest to the median of the border) and the detections, best first.

    Raises:
      ValueError: the image is not uint8 (H, W, 3) of the world's size.
    """
    size = world.image_size
    if image_HW3.shape != (size, size, 3) or image_HW3.dtype != np.uint8:
        raise ValueError(
            f"match_scene: image is {image_HW3.dtype} {image_HW3.shape}, "
            f"expected uint8 ({size}, {size}, 3)"
        )
    border = [image_HW3[0], image_HW3[-1], image_HW3[:, 0], image_HW3[:, -1]]
    canvas_3 = np.median(np.concatenate(border), axis=0).astype(np.float32)
    canvas = _CANVAS_NAMES[int(((_CANVAS_RGB - canvas_3) ** 2).sum(-1).argmin())]
    return canvas, _detect(world, image_HW3 - canvas_3, canvas_3)


def _detect(
    world: scenes.World, image_HW3: np.ndarray, canvas_3: np.ndarray
) -> tuple[Detection, ...]:
    """Takes the best match of an image less its canvas, blanks it, and looks again."""
    side, found = world.sprite_size, []
    while len(found) < _MAX_DETECTIONS:
        scores_MMK = _similarity(world, image_HW3, canvas_3)
        y, x, k = map(int, np.unravel_index(scores_MMK.argmax(), scores_MMK.shape))
        if scores_MMK[y, x, k] < _THRESHOLD:
            break
        found.append(Detection(world.nouns[k], y, x, float(scores_MMK[y, x, k])))
        image_HW3[y : y + side, x : x + side] = 0
    return tuple(found)


def _similarity(world: scenes.World, image_HW3: np.ndarray, canvas_3: np.ndarray) -> np.ndarray:
    """2 <window, template> / (|window|^2 + |template|^2), both without canvas: (M, M, K)."""
    sprites_KSS4, side = scenes.sprites(world), world.sprite_size
    templates_KD = (sprites_KSS4[..., :3] - canvas_3 * sprites_KSS4[..., 3:]).reshape(
        len(sprites_KSS4), -1
    )
    windows = np.lib.stride_tricks.sliding_window_view(image_HW3, (side, side), axis=(0, 1))
    places = windows.shape[0]
    windows_ND = windows.transpose(0, 1, 3, 4, 2).reshape(places * places, -1)
    energy_N = np.einsum("nd,nd->n", windows_ND, windows_ND)
    energy_K = np.einsum("kd,kd->k", templates_KD, templates_KD)
    dots_NK = windows_ND @ templates_KD.T
    scores_NK = 2 * dots_NK / (energy_N[:, None] + energy_K + 1e-6)
    return scores_NK.reshape(places, places, -1)


def score_generation(
    world: scenes.World, scene: scenes.Scene, image_HW3: np.ndarray
) -> dict[str, bool | None]:
    """Whether an image shows what the scene's caption asks for.

    Returns:
      canvas: the canvas has the right colour.
      sprites: exactly the right nouns, each as often as asked.
      relation: they stand as asked ('two' means side by side); None if the scene has no relation
        or `sprites` is false, so that the mean over the others is an accuracy of its own.

    Raises:
      ValueError: the image is not uint8 (H, W, 3) of the world's size.
    """
    canvas, found = match_scene(world, image_HW3)
    sprites = sorted(d.noun for d in found) == sorted(scene.nouns)
    relation = _stands(scene, found) if sprites and scene.relation else None
    return {"canvas": canvas == scene.canvas, "sprites": sprites, "relation": relation}


def _stands(scene: scenes.Scene, found: tuple[Detection, ...]) -> bool:
    first, second = sorted(found, key=lambda d: scene.nouns.index(d.noun))
    dy, dx = second.y - first.y, second.x - first.x
    if scene.relation == "two":
        return abs(dx) > abs(dy)
    return dx > abs(dy) if scene.relation == "left of" else dy > abs(dx)


def score_caption(world: scenes.World, scene: scenes.Scene, text: str) -> dict[str, bool | None]:
    """Whether a generated caption says what the scene shows.

    Returns:
      canvas: the canvas's colour is named, and no other.
      sprites: exactly the right nouns, each as often as shown, in any order.
      relation: the right relation with its nouns in the right order; None if the scene has no
        relation or `sprites` is false.
      all: `canvas` and `sprites`.
    """
    label = scenes.parse_caption(world, text) or scenes.Label("", (), "")
    canvas = label.canvas == scene.canvas
    sprites = sorted(label.nouns) == sorted(scene.nouns)
    relation = None
    if sprites and scene.relation:
        relation = (label.relation, label.nouns) == (scene.relation, scene.nouns)
    return {"canvas": canvas, "sprites": sprites, "relation": relation, "all": canvas and sprites}
