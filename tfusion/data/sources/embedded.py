"""The sources that come with the package, made from the data pack: composed scenes, stories of several, and
WordNet's glosses.
"""

import dataclasses
import hashlib

import numpy as np

from tfusion.config import number, register
from tfusion.data import packs
from tfusion.data.scenes import Scene, World, make_scene, render
from tfusion.data.sources.base import Source
from tfusion.errors import UserError

SCENES_SEED, STORIES_SEED = 0, 1
HELDOUT_SCENES, HELDOUT_STORIES = 1024, 256


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
