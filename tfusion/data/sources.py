"""Raw sources: records of text and pictures, as they are before tokenising and encoding.

A source is a function (cfg.data, split) -> list-like of records; a record is a list of parts, each a str
or a uint8 (H, W, 3) picture, a caption directly before its picture. Splits: 'train' and 'heldout'.
To add one, write the function and name it in SOURCES.
"""

import hashlib
import itertools

import numpy as np

from tfusion.config import DataConfig
from tfusion.data import packs
from tfusion.data.scenes import Scene, World, make_scene, render
from tfusion.errors import UserError

SCENES_SEED, STORIES_SEED = 0, 1
HELDOUT_SCENES = 1024
STORIES_PER_SCENE = 0.25  # a quarter as many stories as scenes: each has two or three pictures


def world_of(cfg: DataConfig) -> World:
    try:
        return World(num_sprites=cfg.num_sprites, jitter=cfg.jitter)
    except ValueError as e:
        raise UserError(f"data.num_sprites = {cfg.num_sprites}, data.jitter = {cfg.jitter}: {e}") from e


class Scenes:
    """Composed scenes: `pictures` of them per record, drawn uniformly from the given choices."""

    def __init__(self, cfg: DataConfig, split: str, seed: int, records: int, pictures: tuple[int, ...]):
        self.world, self.split, self.seed = world_of(cfg), split, seed
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


def scenes(cfg: DataConfig, split: str) -> Scenes:
    """One captioned scene per record."""
    records = cfg.num_scenes if split == "train" else HELDOUT_SCENES
    return Scenes(cfg, split, SCENES_SEED, records, (1,))


def stories(cfg: DataConfig, split: str) -> Scenes:
    """Two or three captioned scenes per record."""
    records = cfg.num_scenes if split == "train" else HELDOUT_SCENES
    return Scenes(cfg, split, STORIES_SEED, max(1, int(records * STORIES_PER_SCENE)), (2, 3))


def glosses(cfg: DataConfig, split: str) -> list:
    """WordNet glosses, text only; one in fifty definitions is held out, with all the words it defines."""
    del cfg

    def is_held_out(text: str) -> bool:
        definition = text.split(": ", 1)[-1]
        return int(hashlib.md5(definition.encode()).hexdigest(), 16) % 50 == 0

    return [[text] for text in packs.read_glosses() if is_held_out(text) == (split == "heldout")]


SOURCES = {"scenes": scenes, "stories": stories, "glosses": glosses}


def make_source(name: str, cfg: DataConfig, split: str):
    if name not in SOURCES:
        raise UserError(f"data.mixture names '{name}'; known sources: {', '.join(SOURCES)}")
    return SOURCES[name](cfg, split)


def pictures(cfg: DataConfig, split: str, limit: int | None = None):
    """uint8 (n, H, W, 3): the pictures of every source of data.mixture that has a share, and pictures.

    All, as they are stored; with a limit at most so many, equally many of each source as far as it has them,
    drawn from all of it. Raises UserError where there are none, or of several sizes.
    """
    found = {}
    for name, share in cfg.mixture.items():
        if share > 0:
            source = make_source(name, cfg, split)
            order = range(len(source)) if limit is None else np.random.default_rng(0).permutation(len(source))
            parts = (part for i in order for part in source[int(i)] if not isinstance(part, str))
            found[name] = list(itertools.islice(parts, limit))
    found = {name: some for name, some in found.items() if some}
    if not found:
        raise UserError(f"data.mixture = {', '.join(cfg.mixture)}: none of these has pictures in its {split} "
                        "split; give a share to one that does")
    each = None if limit is None else max(1, limit // len(found))
    chosen = [picture for some in found.values() for picture in some[:each]]
    sizes = sorted({picture.shape for picture in chosen})
    if len(sizes) > 1:
        raise UserError(f"the pictures of {', '.join(found)} have several sizes, {sizes[0]} and {sizes[-1]}: "
                        "bring them to one")
    return np.stack(chosen)
