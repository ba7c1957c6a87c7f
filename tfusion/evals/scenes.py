"""Composed scenes, both ways: pictures drawn for held-out captions, captions written for held-out pictures.

The scenes' labels are known, so no learned detector is needed (evals/scene_matcher.py). Chance is counted:
how many of the other held-out scenes would pass for each, what a model would get that draws or describes
valid scenes and ignores what it is given. No two scenes share a caption, so that of a whole one is 0.
"""

import numpy as np
from tqdm import tqdm

from tfusion.data import layout
from tfusion.data.scenes import parse_caption, render
from tfusion.evals import statistics
from tfusion.evals.scene_matcher import judge_caption, judge_picture, see
from tfusion.inference import transfusion
from tfusion.objectives.transfusion import TransfusionConfig

CHUNK = 64  # prompts decoded at once
MAX_CAPTION_TOKENS = 24
CLASSES = {"": "one", "two": "two", "left of": "left of", "above": "above"}  # by a scene's relation
# What is scored: a verdict's name, its title, the value wanted.
DRAWN = (("canvas", "Drawn: the canvas has the colour asked for", 0.98),
         ("sprites", "Drawn: exactly the sprites asked for, and looking right", 0.95),
         ("relation", "Drawn: they stand as asked, where both are there", 0.95),
         ("all", "Drawn: all of it", None))
TOLD = (("canvas", "Told: the canvas's colour", 0.98),
        ("relation", "Told: how they stand, where both are named", None),
        ("all", "Told: the colour, the sprites and how they stand", 0.90),
        ("exact", "Told: the caption word for word", 0.95))
BY_CLASS = {"generation_all": None, "caption_all": None, "caption_exact": 0.90}  # wanted of every class
# The level of a relation, by symmetry, once the nouns are right: for a pair, which of two and which first;
# for 'two', side by side or not, and one of three ways to say it.
RELATION_CHANCE = {"generation": {"two": 1 / 2, "left of": 1 / 4, "above": 1 / 4},
                   "caption": {"two": 1 / 3, "left of": 1 / 4, "above": 1 / 4}}


def in_chunks(cfg: TransfusionConfig, params, prompts: list, title: str, **options) -> list:
    """`transfusion.generate` over CHUNK prompts at a time, with a progress bar; noise is keyed by the number
    among all prompts.
    """
    out = []
    for start in tqdm(range(0, len(prompts), CHUNK), desc=title, unit="chunk"):
        chunk = prompts[start : start + CHUNK]
        filled = chunk + [chunk[-1]] * (CHUNK - len(chunk))  # one compiled shape
        out += transfusion.generate(cfg, params, filled, first_row=start, **options)[: len(chunk)]
    return out


def held_out(cfg: TransfusionConfig, n: int):
    """(world, n held-out scenes of different captions, their pictures uint8 (n, H, W, 3)); fewer than n
    where the source has no more.
    """
    source = cfg.data.sources["scenes"].open("heldout")
    distinct = {}
    for i in range(len(source)):
        scene = source.scenes(i)[0]
        distinct.setdefault(scene.caption, scene)
    scenes = list(distinct.values())[:n]
    return source.world, scenes, np.stack([render(source.world, scene) for scene in scenes])


def draw(cfg: TransfusionConfig, params, codec, tokenizer, scenes: list, seed: int):
    """Pictures for the scenes' captions, uint8 (n, H, W, 3): diffusion mode straight after the caption."""
    prompts = [[layout.text([*tokenizer.encode(scene.caption), cfg.vocabulary.boi])] for scene in scenes]
    room = max(len(p[0].values) for p in prompts) + cfg.model.num_patches + 2
    parts = in_chunks(cfg, params, prompts, "draw", seed=seed, max_new_tokens=0, max_images=1, max_len=room)
    return codec.decode(np.stack([p[0].values for p in parts]))


def describe(cfg: TransfusionConfig, params, codec, tokenizer, images) -> list[str]:
    """Greedy captions of pictures."""
    prompts = [[layout.image(latent)] for latent in codec.encode(images)]
    room = cfg.model.num_patches + 3 + MAX_CAPTION_TOKENS
    parts = in_chunks(cfg, params, prompts, "describe", max_new_tokens=MAX_CAPTION_TOKENS, max_images=0,
                      max_len=room)
    return [tokenizer.decode(p[0].values.tolist()) if p else "" for p in parts]


def judge_captions(world, scenes: list, captions: list) -> list[dict]:
    """A verdict per caption: evals/scene_matcher.judge_caption, and `exact`: word for word."""
    return [judge_caption(scene, parse_caption(world, text)) | {"exact": text == scene.caption}
            for scene, text in zip(scenes, captions)]


def judge_pictures(world, scenes: list, images) -> list[dict]:
    """A verdict per picture: evals/scene_matcher.judge_picture."""
    return [judge_picture(scene, see(world, image)) for scene, image in zip(scenes, images)]


def chance(scenes: list) -> dict:
    """{'generation' | 'caption': {verdict: level of each scene, float (n,)}}, NaN where there is none."""
    n = len(scenes)

    def right(key):
        """Of each scene, the share of the others that would pass for it."""
        keys = [key(scene) for scene in scenes]
        return np.array([(keys.count(k) - 1) / (n - 1) if n > 1 else np.nan for k in keys])

    def relation(prefix):
        return np.array([RELATION_CHANCE[prefix].get(scene.relation, np.nan) for scene in scenes])

    canvas, whole = right(lambda s: s.canvas), right(lambda s: s.caption)
    return {"generation": {"canvas": canvas, "sprites": right(lambda s: sorted(s.nouns)),
                           "relation": relation("generation"), "all": whole},
            "caption": {"canvas": canvas, "relation": relation("caption"), "all": whole, "exact": whole}}


def metrics(prefix: str, figures: tuple, scenes: list, verdicts: list, level: dict) -> tuple[dict, dict]:
    """(figures over all scenes, {class: figures}): shares of right verdicts, each with its chance.

    figures: DRAWN or TOLD. level: that of `chance`.
    """
    def share(title, name, chosen, want):
        scored = [i for i in chosen if verdicts[i][name] is not None]
        by_chance = float(np.mean(level[name][scored])) if scored else None
        return statistics.share(title, [verdicts[i][name] for i in scored], by_chance, want)

    every = range(len(scenes))
    whole = {f"{prefix}_{name}": share(title, name, every, want) for name, title, want in figures}
    classes = {
        word: {f"{prefix}_{name}": share(f"{title}, {word}", name,
                                         [i for i in every if scenes[i].relation == relation],
                                         BY_CLASS[f"{prefix}_{name}"])
               for name, title, _ in figures if f"{prefix}_{name}" in BY_CLASS}
        for relation, word in CLASSES.items()}
    return whole, classes
