"""Composed scenes, both ways: pictures drawn for held-out captions, captions written for held-out pictures.

The scenes' labels are known, so no learned detector is needed (evals/scene_matcher.py). Chance is measured:
real held-out scenes scored against the captions of other scenes, what a model would get that draws or
describes valid scenes and ignores what it is given.
"""

import numpy as np
from tqdm import tqdm

from tfusion.config import Config
from tfusion.data.scenes import render
from tfusion.data.sources import scenes as scenes_source
from tfusion.evals import statistics
from tfusion.evals.scene_matcher import score_caption, score_generation
from tfusion.inference import decode

CHUNK = 64  # prompts decoded at once
CHANCE_ROTATIONS = 4
MAX_CAPTION_TOKENS = 24
PAIRS = ("left of", "above")


def in_chunks(cfg: Config, params, prompts: list, title: str, **options) -> list:
    """`decode.generate` over CHUNK prompts at a time, with a progress bar; noise is keyed by the number among
    all prompts.
    """
    out = []
    for start in tqdm(range(0, len(prompts), CHUNK), desc=title, unit="chunk"):
        chunk = prompts[start : start + CHUNK]
        filled = chunk + [chunk[-1]] * (CHUNK - len(chunk))  # one compiled shape
        out += decode.generate(cfg, params, filled, first_row=start, **options)[: len(chunk)]
    return out


def held_out(cfg: Config, n: int):
    """(world, n held-out scenes of different captions, their pictures uint8 (n, H, W, 3)); fewer than n
    where the source has no more.
    """
    source = scenes_source(cfg.data, "heldout")
    distinct = {}
    for i in range(len(source)):
        scene = source.scenes(i)[0]
        distinct.setdefault(scene.caption, scene)
    scenes = list(distinct.values())[:n]
    return source.world, scenes, np.stack([render(source.world, scene) for scene in scenes])


def draw(cfg: Config, params, codec, tokenizer, scenes: list, seed: int):
    """Pictures for the scenes' captions, uint8 (n, H, W, 3): diffusion mode straight after the caption."""
    prompts = [[np.array([*tokenizer.encode(scene.caption), cfg.model.boi])] for scene in scenes]
    room = max(len(p[0]) for p in prompts) + cfg.model.num_patches + 2
    parts = in_chunks(cfg, params, prompts, "draw", seed=seed, max_new_tokens=0, max_images=1, max_len=room)
    return codec.decode(np.stack([p[0] for p in parts]))


def describe(cfg: Config, params, codec, tokenizer, images) -> list[str]:
    """Greedy captions of pictures."""
    prompts = [[latent] for latent in codec.encode(images)]
    room = cfg.model.num_patches + 3 + MAX_CAPTION_TOKENS
    parts = in_chunks(cfg, params, prompts, "describe", max_new_tokens=MAX_CAPTION_TOKENS, max_images=0,
                      max_len=room)
    return [tokenizer.decode(p[0].tolist()) if p else "" for p in parts]


def switches(cfg: Config, params, tokenizer, scenes: list) -> list[bool]:
    """Whether LM mode, given a whole caption, goes straight into diffusion mode by itself."""
    prompts = [[np.array(tokenizer.encode(scene.caption))] for scene in scenes]
    room = max(len(p[0]) for p in prompts) + cfg.model.num_patches + 4
    rows = in_chunks(cfg, params, prompts, "switch", max_new_tokens=1, max_images=1, max_len=room)
    return [bool(parts) and parts[0].ndim == 3 for parts in rows]


def chance(world, scenes: list, images) -> dict:
    """Measured chance levels of both directions."""
    drawn, told, n = [], [], len(scenes)
    for shift in range(1, CHANCE_ROTATIONS + 1):
        others = np.roll(np.arange(n), shift * n // (CHANCE_ROTATIONS + 1))
        drawn += [score_generation(world, s, images[j]) for s, j in zip(scenes, others)]
        told += [score_caption(world, s, scenes[j].caption) for s, j in zip(scenes, others)]
    mean = {name: float(np.mean([s[name] for s in drawn])) for name in ("canvas", "sprites")}
    return mean | {"caption_canvas": float(np.mean([s["canvas"] for s in told])),
                   "caption_all": float(np.mean([s["all"] for s in told])),
                   "relation": 1 / 4}  # by symmetry: which of two relations, and which of them first


def generation_metrics(world, scenes: list, images, level: dict) -> tuple[list, dict]:
    """(verdict per picture, metrics). Relations: pairs of different sprites, where both are there."""
    verdicts = [score_generation(world, scene, image) for scene, image in zip(scenes, images)]
    relation = [v["relation"] for s, v in zip(scenes, verdicts) if s.relation in PAIRS and v["sprites"]]
    return verdicts, {
        "generation_canvas": statistics.share(
            "Drawn: the canvas has the colour asked for", [v["canvas"] for v in verdicts],
            level["canvas"], 0.98),
        "generation_sprites": statistics.share(
            "Drawn: exactly the sprites asked for", [v["sprites"] for v in verdicts], level["sprites"], 0.95),
        "generation_relation": statistics.share(
            "Drawn: they stand as asked, where both are there", relation, level["relation"], 0.95)}


def caption_metrics(world, scenes: list, captions: list, level: dict) -> tuple[list, dict]:
    """(verdict per caption, metrics)."""
    verdicts = [score_caption(world, scene, text) for scene, text in zip(scenes, captions)]
    relation = [v["relation"] for s, v in zip(scenes, verdicts) if s.relation in PAIRS and v["sprites"]]
    return verdicts, {
        "caption_canvas": statistics.share(
            "Told: the canvas's colour", [v["canvas"] for v in verdicts], level["caption_canvas"], 0.98),
        "caption_all": statistics.share(
            "Told: all sprites and the colour", [v["all"] for v in verdicts], level["caption_all"], 0.90),
        "caption_relation": statistics.share(
            "Told: how they stand, where both are named", relation, level["relation"]),
        "caption_exact": statistics.share(
            "Told: the caption word for word", [t == s.caption for s, t in zip(scenes, captions)], None)}
