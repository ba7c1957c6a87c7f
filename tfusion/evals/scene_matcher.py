"""Scores generated scenes and captions against the composed world of `tfusion.data.scenes`.

Sprites are found by template matching, so that the score needs no learned detector. To be found is not
enough: a faded, noisy, half erased or blended sprite is still nearest to its own template. So the picture
must also look like the scene drawn anew from what was found in it (`_looks_right`). What it reads from real
scenes is right almost always (tested); report the autoencoder's ceiling beside a model's score.

Shapes: H, W image; S sprite side; K sprites; D = S S 3; M places a sprite may have along one side.
"""

import functools
from typing import NamedTuple

import numpy as np

from tfusion.data import scenes

_THRESHOLD = 0.5  # similarity from which a sprite counts as present; 1 = identical
_MAX_DETECTIONS = 4
# What a picture must keep to, to look right. Set between spoilt pictures and undoubted ones: half erased,
# a sprite loses .22 of its energy or more (but for a few nouns with an empty half), faded to 30 %, .49.
# At 60/40 the other noun's share is .4. White on pink, the faintest case, differs by 12.5 dB.
_MAX_ERROR = 0.22  # squared error of a sprite, softly seen, over its own energy against the canvas
_MAX_SHARE = 1 / 3  # of any other noun in a sprite, by least squares
_WINDOW, _MIN_PSNR = 7, 13.5  # pixels, dB: beside the sprites, every window must be this near to the canvas
_BLUR = np.array([0.0545, 0.2442, 0.4026, 0.2442, 0.0545], np.float32)  # Gaussian, sigma 1 pixel
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


def _blur(images: np.ndarray) -> np.ndarray:
    """Each image (..., H, W, 3) softened by a Gaussian of one pixel; beyond its border lies 0."""
    pad = len(_BLUR) // 2
    for axis in (-3, -2):
        widths = [(0, 0)] * images.ndim
        widths[axis] = (pad, pad)
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(images, widths), len(_BLUR), axis)
        images = windows @ _BLUR
    return images


def _looks_right(
    world: scenes.World, image_HW3: np.ndarray, canvas: str, found: tuple[Detection, ...]
) -> bool:
    """Whether a picture looks like the scene that was found in it: the residual to that scene, drawn anew.

    Beside the sprites it is small in every window: nothing else stands on the canvas. In each sprite's box,
    with both softened by a pixel, it is small against the sprite, and no other noun explains it. Softened,
    as an autoencoder's pictures are soft and a model may place a sprite between two pixels: neither is
    wrong, and unsoftened they would cost as much as a wrong sprite does.
    """
    positions = tuple((d.y, d.x) for d in found)
    scene = scenes.Scene(canvas, tuple(d.noun for d in found), "", positions, "")
    residual_HW3, side = image_HW3 - np.float32(scenes.render(world, scene)), world.sprite_size
    error_HW = (residual_HW3**2).mean(-1)
    for y, x in positions:
        error_HW[y : y + side, x : x + side] = 0
    windows = np.lib.stride_tricks.sliding_window_view(error_HW, (_WINDOW, _WINDOW))
    if windows.mean((2, 3)).max() > 255**2 / 10 ** (_MIN_PSNR / 10):
        return False
    soft_HW3, templates_KD = _blur(residual_HW3), _soft_templates(world, canvas)
    boxes = [soft_HW3[y : y + side, x : x + side].reshape(-1) for y, x in positions]
    return all(
        _is_sprite(box_D, templates_KD, world.nouns.index(d.noun))
        for box_D, d in zip(boxes, found, strict=True)
    )


@functools.lru_cache(maxsize=64)
def _soft_templates(world: scenes.World, canvas: str) -> np.ndarray:
    """The sprites less their canvas, softened: (K, D)."""
    sprites_KSS4, rgb_3 = scenes.sprites(world), np.float32(scenes.CANVASES[canvas])
    soft_KSS3 = _blur(sprites_KSS4[..., :3] - rgb_3 * sprites_KSS4[..., 3:])
    return soft_KSS3.reshape(len(soft_KSS3), -1)


def _is_sprite(residual_D: np.ndarray, templates_KD: np.ndarray, k: int) -> bool:
    """Whether a box is template k: its residual is small, and holds no large share of another template.

    The share b of noun u solves min |residual - a t - b u|^2: a faded t is no other noun.
    """
    t_D, others = templates_KD[k], np.delete(templates_KD, k, axis=0)
    tt, tu, uu = t_D @ t_D, others @ t_D, np.einsum("kd,kd->k", others, others)
    shares = (tt * (others @ residual_D) - tu * (t_D @ residual_D)) / (tt * uu - tu**2)
    return bool(residual_D @ residual_D <= _MAX_ERROR * tt and shares.max() <= _MAX_SHARE)


class Seen(NamedTuple):
    """What a picture shows: its canvas, the sprites found, and whether it looks like them."""

    canvas: str
    found: tuple[Detection, ...]
    looks_right: bool


def see(world: scenes.World, image_HW3: np.ndarray) -> Seen:
    """Reads a picture, uint8 (H, W, 3). Raises ValueError where it is of another size or type."""
    canvas, found = match_scene(world, image_HW3)
    return Seen(canvas, found, _looks_right(world, image_HW3, canvas, found))


def judge_picture(scene: scenes.Scene, seen: Seen) -> dict[str, bool | None]:
    """Whether a picture shows what the scene's caption asks for.

    Returns:
      canvas: the canvas has the right colour.
      sprites: exactly the right nouns, each as often as asked, and the picture looks right.
      relation: they stand as asked ('two' means side by side); None if the scene has no relation
        or `sprites` is false, so that the mean over the others is an accuracy of its own.
      all: all of these.
    """
    canvas = seen.canvas == scene.canvas
    sprites = seen.looks_right and sorted(d.noun for d in seen.found) == sorted(scene.nouns)
    relation = _stands(scene, seen.found) if sprites and scene.relation else None
    return {"canvas": canvas, "sprites": sprites, "relation": relation,
            "all": canvas and sprites and relation is not False}


def _stands(scene: scenes.Scene, found: tuple[Detection, ...]) -> bool:
    first, second = sorted(found, key=lambda d: scene.nouns.index(d.noun))
    dy, dx = second.y - first.y, second.x - first.x
    if scene.relation == "two":
        return abs(dx) > abs(dy)
    return dx > abs(dy) if scene.relation == "left of" else dy > abs(dx)


def judge_caption(scene: scenes.Scene, label: scenes.Label | None) -> dict[str, bool | None]:
    """Whether a caption, as parsed, says what the scene shows.

    Each relation is said in one way only: this world has no 'right of' and no 'below' (foreign words,
    which count as wrong nouns), and 'a star left of a star' is not how two stars are called.

    Returns:
      canvas: the canvas's colour is named, and no other.
      sprites: exactly the right nouns, each as often as shown, in any order.
      relation: the right relation ('two' too), its nouns in the right order; None if the scene has no
        relation or `sprites` is false.
      all: all of these: what the reference says, in whatever grammar.
    """
    label = label or scenes.Label("", (), "")
    canvas = label.canvas == scene.canvas
    sprites = sorted(label.nouns) == sorted(scene.nouns)
    says = (label.relation, label.nouns) == (scene.relation, scene.nouns)
    return {"canvas": canvas, "sprites": sprites, "relation": says if sprites and scene.relation else None,
            "all": canvas and says}
