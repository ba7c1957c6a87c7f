"""A made-up sweep whose runs obey known power laws: every file that the study reads, and no weights."""

import json
import math
import shutil
from pathlib import Path

import numpy as np

from tests.reporting.fake_run import metric, write_json, write_lines

SIZES = {"s1": 0.2e6, "s2": 0.5e6, "s3": 1.2e6, "s4": 3e6}  # N
TOKENS_PER_PARAM = 20
# metric: (value of transfusion at 1e13 FLOPs, exponent); chameleon is what transfusion is at RATIO of them
LAWS = {
    "scenes_lm_loss": (2.2, -0.10), "glosses_lm_loss": (30.0, -0.15), "diffusion_loss": (0.2, -0.05),
    "cider": (400.0, 0.2), "fd_pack": (3.0, -0.3), "generation_all": (0.5, 0.15), "caption_all": (0.6, 0.1),
    "caption_exact": (0.5, 0.12)}
RATIO = {"scenes_lm_loss": 0.5, "glosses_lm_loss": 0.6, "cider": 0.3, "fd_pack": 0.1, "generation_all": 0.2,
         "caption_all": 0.5, "caption_exact": 0.4}

DROPPED = {"transfusion": 0.02, "chameleon": 0.024}


def value(name: str, recipe: str, flops: float, noise: float) -> float:
    start, slope = LAWS[name]
    early = RATIO.get(name, 1.0) if recipe == "chameleon" else 1.0
    found = start * (early * flops / 1e13) ** slope * math.exp(noise * slope)
    return math.log(found) if name.endswith("_lm_loss") else found


def figures(recipe: str, flops: float, rng, worse: float = 1.0) -> dict:
    made = {}
    for name in LAWS:
        if name == "diffusion_loss" and recipe == "chameleon":
            continue
        better = "higher" if LAWS[name][1] > 0 else "lower"
        reached = value(name, recipe, flops / worse, rng.normal(0, 0.15))
        made[name] = metric(name, reached, 256, None, None, {"cider": 20.0}.get(name), None, better)
    made["fd_pack_floor"] = metric("floor", 0.05, 256, None, None, None, None, "lower")
    made["fd_pack_codec"] = metric("codec", 0.3 if recipe == "chameleon" else 0.2, 256, None, None, None, None,
                                   "lower")
    return made


def write_point(root: Path, name: str, recipe: str, size: str, seed: int, part: str = "ladder",
                rate: float = 1e-3, prediction: str = "v", worse: float = 1.0, **tags) -> dict:
    """Its workdir, trained and evaluated, and its line of points.jsonl."""
    folder, params = root / name, SIZES[size]
    tokens = TOKENS_PER_PARAM * params
    rng = np.random.default_rng([*name.encode()])
    config = {"objective": recipe, "seed": seed, "optimizer": {"learning_rate": rate},
              "model": {"num_layers": 4, "d_model": 128}, "train": {"num_steps": 100},
              **({"process": {"kind": "ddpm", "prediction": prediction}} if recipe == "transfusion" else {})}
    flops = 6 * params * tokens
    write_json(folder / "config.json", config)
    write_lines(folder / "metrics.jsonl", [
        {"step": step, "train/lm_loss": 3.0, "data/dropped_documents/scenes": DROPPED[recipe],
         **({"eval/lm_loss": 2.0} if step == 50 else {})} for step in range(1, 101)])
    write_json(folder / "summary.json", {"num_params": params, "steps": 100, "tokens": tokens,
                                         "flops": 1.3 * flops, "images": 1000})
    write_json(folder / "evaluation/metrics.json", {
        "metrics": figures(recipe, flops, rng, worse), "step": 100, "sampling": {"of": recipe}})
    return {"name": name, "config": f"experiments/scaling.py:pack,{recipe},{size}", "overrides": {"seed": seed},
            "workdir": f"sweeps/x/{name}", "verbs": ["train", "evaluate"], "config_hash": f"hash-{name}",
            "resolved": {"objective": recipe, "train": {"num_steps": 100}}, "flops": 1.3 * flops,
            "tokens": tokens, "params": params, "tags": {"part": part, "size": size} | tags}


def write_sweep(root: Path, seeds: int = 2) -> list[dict]:
    """16 runs of the ladder, and some at other learning rates and predictions. Returns the points."""
    points = [write_point(root, f"{recipe}-{size}-seed{seed}", recipe, size, seed)
              for recipe in ("transfusion", "chameleon") for size in SIZES for seed in range(seeds)]
    points += [write_point(root, f"{recipe}-{size}-rate{rate:g}", recipe, size, 0, "lr", rate, worse=2)
               for recipe in ("transfusion", "chameleon") for size in ("s1", "s2") for rate in (5e-4, 2e-3)]
    points += [write_point(root, f"transfusion-s2-{prediction}", "transfusion", "s2", 0, "process",
                           prediction=prediction, worse=worse)
               for prediction, worse in (("eps", 9), ("flow", 1.5))]
    (root / "points.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    return points


def lose_runs(root) -> None:
    """What is left are the frozen points, and what was kept elsewhere."""
    for workdir in [path.parent for path in root.glob("*/metrics.jsonl")]:
        shutil.rmtree(workdir)
