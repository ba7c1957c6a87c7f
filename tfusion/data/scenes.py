"""Composed scenes: a small, endless, captioned world with ground truth.

Real emoji sprites are pasted on plain canvases and captioned by construction:

    a panda on a teal canvas            two pandas on a teal canvas
    a panda left of an apple on a ...   a panda above an apple on a ...

Every scene is a pure function of (world, seed, index): nothing is stored, any record can be made
alone, and one combination in ten (of relation, nouns and canvas) is held out for evaluation.

Shapes: H, W image; S sprite side; K sprites; C canvases.
"""

import dataclasses
import functools
import hashlib
import re
from typing import NamedTuple

import numpy as np

from tfusion.data import packs

# noun -> emoji label. Chosen by eye and by numbers: each is recognisable at 14 px, stands out on
# every canvas below and differs from every other (both are tested). A World takes the first K.
NOUNS = {
    "panda": "panda",
    "apple": "red apple",
    "star": "star",
    "frog": "frog",
    "heart": "heart suit",
    "penguin": "penguin",
    "carrot": "carrot",
    "rocket": "rocket",
    "whale": "spouting whale",
    "pizza": "pizza",
    "mushroom": "mushroom",
    "ghost": "ghost",
    "cactus": "cactus",
    "ladybug": "lady beetle",
    "tree": "evergreen tree",
    "car": "automobile",
    "strawberry": "strawberry",
    "doughnut": "doughnut",
    "house": "house",
    "fox": "fox",
    "watermelon": "watermelon",
    "bus": "bus",
    "robot": "robot",
    "owl": "owl",
    "banana": "banana",
    "alien": "alien",
    "turtle": "turtle",
    "octopus": "octopus",
    "avocado": "avocado",
    "gift": "wrapped gift",
    "burger": "hamburger",
    "gem": "gem stone",
}
# canvas -> RGB. No white, red, yellow or brown: they swallow ghosts, hearts, stars and owls.
CANVASES = {
    "black": (24, 24, 28),
    "grey": (128, 130, 136),
    "teal": (32, 150, 150),
    "blue": (62, 104, 206),
    "green": (26, 92, 52),
    "pink": (244, 160, 196),
    "purple": (120, 70, 170),
    "mint": (170, 230, 200),
}
RELATIONS = ("", "two", "left of", "above")
UNKNOWN = "?"  # stands for a word outside the world in a parsed caption

_MIN_SPRITES = 8  # fewer, and some kind of scene might have no held-out combination
_PERCENT_SINGLE, _PERCENT_TWO = 30, 15  # the rest are pairs of different sprites
_GRAMMAR = frozenset(("a", "an", "on", "canvas", "two", "left", "of", "above"))


@dataclasses.dataclass(frozen=True)
class World:
    """What can appear in a scene, and where.

    num_sprites: how many of NOUNS take part, 8..32.
    jitter: every sprite moves by up to this many pixels in y and, independently, in x.
    image_size, sprite_size: sides in pixels; two sprites fit side by side.

    Raises:
      ValueError: a value out of range.
    """

    num_sprites: int = 24
    jitter: int = 1
    image_size: int = 32
    sprite_size: int = 14

    def __post_init__(self):
        if not _MIN_SPRITES <= self.num_sprites <= len(NOUNS):
            raise ValueError(
                f"World.num_sprites={self.num_sprites}: choose {_MIN_SPRITES} to {len(NOUNS)}"
            )
        if self.jitter < 0:
            raise ValueError(f"World.jitter={self.jitter}: choose 0 or more")
        if not 1 <= self.sprite_size <= self.image_size // 2:
            raise ValueError(
                f"World.sprite_size={self.sprite_size}: two sprites must fit side by side in "
                f"image_size={self.image_size}, choose 1 to {self.image_size // 2}"
            )

    @property
    def nouns(self) -> tuple[str, ...]:
        return tuple(NOUNS)[: self.num_sprites]


class Scene(NamedTuple):
    """One scene, without its pixels.

    nouns: one entry, or two; with relation 'two' both are the same. In 'left of' and 'above' the
      first is the left or upper one.
    positions: (y, x) of the top left pixel of each noun's sprite.
    """

    canvas: str
    nouns: tuple[str, ...]
    relation: str
    positions: tuple[tuple[int, int], ...]
    caption: str


class Label(NamedTuple):
    """What a caption claims; canvas '' if it names none or several, UNKNOWN for foreign words and for
    several relations."""

    canvas: str
    nouns: tuple[str, ...]
    relation: str


def plural(noun: str) -> str:
    """The plural of a noun of the world, by the regular rules of English."""
    if noun.endswith("y"):
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def with_article(noun: str) -> str:
    """'a panda', 'an apple'; going by the first letter is right for every noun of the world."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def make_caption(canvas: str, nouns: tuple[str, ...], relation: str) -> str:
    """The one caption of a combination, such as 'a panda above an apple on a teal canvas'."""
    if relation == "two":
        what = f"two {plural(nouns[0])}"
    else:
        what = f" {relation} ".join(with_article(noun) for noun in nouns)
    return f"{what} on {with_article(canvas)} canvas"


def is_held_out(scene: Scene | Label) -> bool:
    """Whether the combination (relation, nouns, canvas) is kept for evaluation: one in ten."""
    return _held_out(scene.relation, scene.nouns, scene.canvas)


@functools.lru_cache(maxsize=1 << 16)
def _held_out(relation: str, nouns: tuple[str, ...], canvas: str) -> bool:
    key = "|".join((relation, *nouns, canvas))
    return int(hashlib.md5(key.encode(), usedforsecurity=False).hexdigest(), 16) % 10 == 0


def make_scene(world: World, seed: int, index: int, held_out: bool) -> Scene:
    """Scene `index` of the endless stream `seed`: training scenes, or held-out ones.

    30 % show one sprite, 15 % two of a kind side by side, 55 % two different ones. Within its
    kind, a scene is redrawn until its combination lies on the wanted side of the split.

    Raises:
      ValueError: seed or index is negative.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"make_scene: seed={seed} and index={index} must be 0 or more")
    bits = np.random.Philox(key=np.array([seed, index], np.uint64))
    names = world.nouns
    percent = bits.random_raw() % 100
    while True:
        a, b, c, r, *jitters = bits.random_raw(8).tolist()
        canvas, noun = list(CANVASES)[c % len(CANVASES)], names[a % len(names)]
        if percent < _PERCENT_SINGLE:
            relation, nouns = "", (noun,)
        elif percent < _PERCENT_SINGLE + _PERCENT_TWO:
            relation, nouns = "two", (noun, noun)
        else:
            other = names[(a + 1 + b % (len(names) - 1)) % len(names)]
            relation, nouns = RELATIONS[2 + r % 2], (noun, other)
        if _held_out(relation, nouns, canvas) == held_out:
            positions = _positions(world, relation, jitters)
            caption = make_caption(canvas, nouns, relation)
            return Scene(canvas, nouns, relation, positions, caption)


def moved(world: World, scene: Scene, seed: int, index: int) -> Scene:
    """The same scene with its sprites moved by another jitter: as the same caption may be drawn once more."""
    bits = np.random.Philox(key=np.array([seed, index], np.uint64))
    return scene._replace(positions=_positions(world, scene.relation, bits.random_raw(4).tolist()))


def _positions(world: World, relation: str, jitters: list[int]) -> tuple[tuple[int, int], ...]:
    """Places of the sprites: nominal +- jitter, each kept inside its own half of the image."""
    size, half, side = world.image_size, world.image_size // 2, world.sprite_size
    moves = [bits % (2 * world.jitter + 1) - world.jitter for bits in jitters]

    def place(start: int, stop: int, move: int) -> int:
        centred = start + (stop - start - side) // 2
        return min(max(centred + move, start), stop - side)

    if not relation:
        return ((place(0, size, moves[0]), place(0, size, moves[1])),)
    first = [place(0, size, moves[0]), place(0, half, moves[1])]
    second = [place(0, size, moves[2]), place(half, size, moves[3])]
    if relation == "above":
        first, second = first[::-1], second[::-1]
    return tuple(first), tuple(second)


@functools.lru_cache(maxsize=8)
def sprites(world: World) -> np.ndarray:
    """The world's sprites, float32 (K, S, S, 4): RGB premultiplied 0..255, alpha 0..1."""
    sheet = packs.load_sprites([NOUNS[noun] for noun in world.nouns], world.sprite_size)
    sheet.setflags(write=False)
    return sheet


@functools.lru_cache(maxsize=8)
def _tiles(world: World) -> dict[tuple[str, str], np.ndarray]:
    """Each sprite blended on each canvas: {(canvas, noun): uint8 (S, S, 3)}."""
    tiles = {}
    for canvas, rgb in CANVASES.items():
        for noun, sprite in zip(world.nouns, sprites(world), strict=True):
            blended = np.float32(rgb) * (1 - sprite[..., 3:]) + sprite[..., :3]
            tiles[canvas, noun] = np.clip(np.rint(blended), 0, 255).astype(np.uint8)
    return tiles


def render(world: World, scene: Scene) -> np.ndarray:
    """Draws a scene: uint8 (H, W, 3). Sprites must not overlap (those of make_scene never do)."""
    tiles, side = _tiles(world), world.sprite_size
    image_HW3 = np.empty((world.image_size, world.image_size, 3), np.uint8)
    image_HW3[:] = CANVASES[scene.canvas]
    for noun, (y, x) in zip(scene.nouns, scene.positions, strict=True):
        image_HW3[y : y + side, x : x + side] = tiles[scene.canvas, noun]
    return image_HW3


@functools.lru_cache(maxsize=8)
def _lexicon(world: World) -> dict[str, str]:
    """Every accepted word for a noun, singular and plural, to the noun."""
    return {word: noun for noun in world.nouns for word in (noun, plural(noun))}


def parse_caption(world: World, text: str) -> Label | None:
    """Reads what a generated caption claims, forgiving its grammar but not its content.

    Case, punctuation, articles, word order around the canvas and singular after 'two' do not
    matter. A word that is neither grammar nor of this world counts as an UNKNOWN noun, and so
    does a missing second noun after 'left of' or 'above'.

    Returns:
      The label, or None if the text names no canvas and no noun of this world.
    """
    words = re.findall(r"[^\W_]+", text.lower().replace("gray", "grey"))
    colours = {word for word in words if word in CANVASES}
    lexicon = _lexicon(world)
    rest = [word for word in words if word not in CANVASES and word not in _GRAMMAR]
    nouns = tuple(lexicon.get(word, UNKNOWN) for word in rest)
    if not colours and not set(nouns) - {UNKNOWN}:
        return None
    phrase = " ".join(words)
    found = [r for r in RELATIONS[1:] if re.search(rf"\b{r}\b", phrase)]
    relation = found[0] if len(found) == 1 else UNKNOWN if found else ""
    if relation and len(nouns) == 1:
        nouns += nouns if relation == "two" else (UNKNOWN,)
    return Label(colours.pop() if len(colours) == 1 else "", nouns, relation)
