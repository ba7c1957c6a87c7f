"""Composed scenes, both ways: pictures drawn for held-out captions, captions written for held-out pictures.

The scenes' labels are known, so no learned detector is needed (evals/scene_matcher.py). Chance is counted:
how many of the other held-out scenes would pass for each, what a model would get that draws or describes
valid scenes and ignores what it is given. No two scenes share a caption, so that of a whole one is 0.
"""

import json
from pathlib import Path

import numpy as np

from tfusion import inference
from tfusion.config import RunConfig
from tfusion.data.scenes import parse_caption, render
from tfusion.evals import figure
from tfusion.evals.base import Evaluator, Options, register, scenes_source, section, write_card
from tfusion.evals.scene_matcher import judge_caption, judge_picture, see
from tfusion.inference.trained import Trained
from tfusion.paths import replace_by, replace_text

SHOWN = 48  # pictures in the report
PICTURES, TOLD_LINES = "drawn.npz", "told.jsonl"  # all that were drawn, and described, for other evaluators
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


def held_out(cfg: RunConfig, n: int):
    """(world, n held-out scenes of different captions, their pictures uint8 (n, H, W, 3)); fewer than n
    where the source has no more.
    """
    source = scenes_source(cfg).open("heldout")
    distinct = {}
    for i in range(len(source)):
        scene = source.scenes(i)[0]
        distinct.setdefault(scene.caption, scene)
    scenes = list(distinct.values())[:n]
    return source.world, scenes, np.stack([render(source.world, scene) for scene in scenes])


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
        return figure.share(title, [verdicts[i][name] for i in scored], by_chance, want)

    every = range(len(scenes))
    whole = {f"{prefix}_{name}": share(title, name, every, want) for name, title, want in figures}
    classes = {
        word: {f"{prefix}_{name}": share(f"{title}, {word}", name,
                                         [i for i in every if scenes[i].relation == relation],
                                         BY_CLASS[f"{prefix}_{name}"])
               for name, title, _ in figures if f"{prefix}_{name}" in BY_CLASS}
        for relation, word in CLASSES.items()}
    return whole, classes


def drawn_section(held: list, verdicts: list[dict]) -> dict:
    names = {"canvas": "background", "sprites": "objects", "relation": "places"}
    items = []
    for scene, verdict in zip(held[:SHOWN], verdicts):
        faults = [name for key, name in names.items() if verdict[key] is False]
        items.append({"caption": scene.caption, "wrong": bool(faults),
                      "remark": f"wrong {' and '.join(faults)}" if faults else ""})
    gallery = {"kind": "gallery", "images": "drawn", "items": items, "of": len(held),
               "made": "Painted by the model, the first of its answers to held-out prompts."}
    return section("pictures", "Held-out prompts, painted", gallery)


def told_section(held: list, told: list[str], verdicts: list[dict]) -> dict:
    items = [{"caption": text, "wrong": not verdict["all"],
              "remark": "" if text.strip() == scene.caption else f"reference: {scene.caption}"}
             for scene, text, verdict in zip(held[:SHOWN], told, verdicts)]
    gallery = {"kind": "gallery", "images": "real", "items": items, "of": len(held),
               "reading": "A reference in grey says the same in other words."}
    return section("captions", "Held-out images, described", gallery)


def classes_section() -> dict:
    columns = {"generation_all": "drawn: all of it", "caption_all": "told: colour, sprites, relation",
               "caption_exact": "told: word for word"}
    return section("classes", "By class of scene", {
        "kind": "parts", "head": "class of scene", "columns": columns, "parts": list(CLASSES.values())})


def write_verdicts(path: Path, scenes: list, verdicts: list[dict], **more) -> None:
    """A line of JSON for each scene: its caption, what was made of it, the verdict."""
    replace_text(path, "".join(
        json.dumps({"scene": scene.caption, **{name: x[i] for name, x in more.items()}, **verdict}) + "\n"
        for i, (scene, verdict) in enumerate(zip(scenes, verdicts))))


def read_drawn(folder: Path) -> np.ndarray:
    """All the pictures that this evaluator had drawn, as it left them in its folder: uint8 (n, H, W, 3)."""
    with np.load(folder / PICTURES) as arrays:
        return arrays["drawn"]


def run(run: Trained, folder: Path, options: Options) -> dict:
    """Draws the held-out captions and describes the held-out pictures."""
    decoder, (world, held, real) = inference.decoder(run), held_out(run.cfg, options.number)
    level = chance(held)
    drawn = decoder.draw(run, [scene.caption for scene in held], options.seed)
    told = decoder.describe(run, real)
    right = judge_pictures(world, held, drawn)
    figures, classes = metrics("generation", DRAWN, held, right, level["generation"])
    truths = judge_captions(world, held, told)
    more, by_class = metrics("caption", TOLD, held, truths, level["caption"])
    figures |= more
    write_verdicts(folder / "drawn.jsonl", held, right)
    write_verdicts(folder / TOLD_LINES, held, truths, told=told)
    replace_by(folder / PICTURES, lambda file: np.savez_compressed(file, drawn=drawn))
    write_card(folder, classes_section(), drawn_section(held, right), told_section(held, told, truths),
               drawn=drawn[:SHOWN], real=real[:SHOWN])
    return figures | {f"{name}/{word}": one for word in classes
                      for name, one in (classes[word] | by_class[word]).items()}


register(Evaluator("scenes", ("world", "draw", "describe"), run, order=10))
