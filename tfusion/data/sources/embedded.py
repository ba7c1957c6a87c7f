"""Raw sources: records of text and pictures, as they are before tokenising and encoding.

A source's spec stands in data.sources under a name of the user's; `open(split, image_size)` gives a list-like
of records, each a list of parts: str, or uint8 (H, W, 3) pictures, a caption directly before its picture.
Splits: 'train' and 'heldout'. To add one, write a spec and register it.
"""

import dataclasses
import hashlib
import itertools

import numpy as np

from tfusion.config import number, register
from tfusion.data import packs
from tfusion.data.scenes import Scene, World, make_scene, render
from tfusion.errors import UserError

SCENES_SEED, STORIES_SEED = 0, 1
HELDOUT_SCENES, HELDOUT_STORIES = 1024, 256


@dataclasses.dataclass(frozen=True)
class Source:
    """What every source's spec has."""

    kind: str
    share: float = number(zero=True)  # of the tokens


class Scenes:
    """Composed scenes: `pictures` of them per record, drawn uniformly from the given choices."""

    def __init__(self, world: World, split: str, seed: int, records: int, pictures: tuple[int, ...]):
        self.world, self.split, self.seed = world, split, seed
        per_record = np.random.default_rng([seed, split == "heldout"]).choice(pictures, records)
        self._ends = np.cumsum(per_record)

    def __len__(self) -> int:
        return len(self._ends)

    def scenes(self, record: int) -> list[Scene]:
        """The record's scenes with their labels. Held-out combinations are never in 'train'."""
        first = self._ends[record - 1] if record else 0
        return [make_scene(self.world, self.seed, int(i), self.split == "heldout")
                for i in range(first, self._ends[record])]

    def __getitem__(self, record: int) -> list:
        if record >= len(self):
            raise IndexError(record)
        return [part for s in self.scenes(record) for part in (s.caption, render(self.world, s))]


@dataclasses.dataclass(frozen=True)
class WorldSource(Source):
    num_records: int  # for training
    num_sprites: int
    jitter: int = number(zero=True)  # sprites are moved by up to this many pixels

    def check(self, name: str) -> None:
        self.world(name)

    def world(self, name: str = "") -> World:
        try:
            return World(num_sprites=self.num_sprites, jitter=self.jitter)
        except ValueError as e:
            raise UserError(f"{name}.num_sprites = {self.num_sprites}, {name}.jitter = {self.jitter}: "
                            f"{e}") from e


@register("source", "scenes")
@dataclasses.dataclass(frozen=True)
class ScenesSource(WorldSource):
    """One captioned scene per record."""

    def open(self, split: str, image_size: int | None = None) -> Scenes:
        records = self.num_records if split == "train" else HELDOUT_SCENES
        return Scenes(self.world(), split, SCENES_SEED, records, (1,))


@register("source", "stories")
@dataclasses.dataclass(frozen=True)
class StoriesSource(WorldSource):
    """Two or three captioned scenes per record."""

    def open(self, split: str, image_size: int | None = None) -> Scenes:
        records = self.num_records if split == "train" else HELDOUT_STORIES
        return Scenes(self.world(), split, STORIES_SEED, records, (2, 3))


@register("source", "glosses")
@dataclasses.dataclass(frozen=True)
class GlossesSource(Source):
    """WordNet glosses, text only; one in fifty definitions is held out, with all the words it defines."""

    def open(self, split: str, image_size: int | None = None) -> list:
        def is_held_out(text: str) -> bool:
            definition = text.split(": ", 1)[-1]
            return int(hashlib.md5(definition.encode()).hexdigest(), 16) % 50 == 0

        return [[text] for text in packs.read_glosses() if is_held_out(text) == (split == "heldout")]


def pictures(sources: dict[str, Source], split: str, image_size: int, limit: int | None = None):
    """uint8 (n, H, W, 3): the pictures of every source that has a share, and pictures.

    All, as they are stored; with a limit at most so many, equally many of each source as far as it has them,
    drawn from all of it. Raises UserError where there are none, or of another size.
    """
    found = {}
    for name, spec in sources.items():
        if spec.share > 0:
            source = spec.open(split, image_size)
            order = range(len(source)) if limit is None else np.random.default_rng(0).permutation(len(source))
            parts = (part for i in order for part in source[int(i)] if not isinstance(part, str))
            found[name] = list(itertools.islice(parts, limit))
    found = {name: some for name, some in found.items() if some}
    if not found:
        raise UserError(f"data.sources = {', '.join(sources)}: none of these has pictures in its {split} "
                        "split; give a share to one that does")
    each = None if limit is None else max(1, limit // len(found))
    chosen = [picture for some in found.values() for picture in some[:each]]
    sizes = sorted({picture.shape for picture in chosen})
    if sizes != [(image_size, image_size, 3)]:
        raise UserError(f"the pictures of {', '.join(found)} are {sizes[0][0]} to {sizes[-1][0]} pixels high, "
                        f"{image_size} are wanted: bring them to that size")
    return np.stack(chosen)
