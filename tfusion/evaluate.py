"""Measures a trained Transfusion and writes `<workdir>/evaluation/`: metrics.json, samples, pictures' data.

  python -m tfusion.evaluate --workdir=runs/quickstart/transfusion
  python -m tfusion.evaluate --workdir=/mnt/copied --config.data.prepared=/mnt/data     where the data are now
"""

import json
import time
import typing
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from tfusion import config, distributed, sharding
from tfusion.config import replace_text
from tfusion.data import pipeline
from tfusion.errors import UserError, run
from tfusion.evals import losses, scenes, statistics
from tfusion.inference import decode, trained
from tfusion.models.masks import dense_mask
from tfusion.objectives import make_objective
from tfusion.training.metrics import write_timing

WORKDIR = flags.DEFINE_string("workdir", None, "workdir of a trained Transfusion")
NUM_SCENES = flags.DEFINE_integer("num_scenes", 256, "held-out scenes to draw and to describe",
                                  lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of the sampling")
STEP = flags.DEFINE_integer("step", None, "which checkpoint; default: the latest")
MESH = flags.DEFINE_string("mesh", None, "devices to spread the model over, such as fsdp=4; default: one")
DATA = config_flags.DEFINE_config_dict("config", ConfigDict({"data": {
    name: config_dict.placeholder(kind) for name, kind in typing.get_type_hints(config.DataConfig).items()
    if kind in (str, int, float)}}), help_string="--config.data.KEY=VALUE: other than in the run's config.json")
SHOWN = 48  # pictures kept for the report
DOCUMENTS = 16  # written from nothing; those with the most pictures are shown


def write_pictures(folder: Path, name: str, records: list, **arrays) -> None:
    np.savez_compressed(folder / f"{name}.npz", **arrays)
    replace_text(folder / f"{name}.jsonl", "".join(json.dumps(r) + "\n" for r in records))


def both_ways(cfg, params, codec, tokenizer, folder: Path) -> tuple[dict, dict]:
    """Draws the held-out captions, describes the held-out pictures: (figures, figures by class of scene)."""
    world, held, real = scenes.held_out(cfg, NUM_SCENES.value)
    level = scenes.chance(held)
    drawn = scenes.draw(cfg, params, codec, tokenizer, held, SEED.value)
    told = scenes.describe(cfg, params, codec, tokenizer, real)
    again = codec.decode(codec.encode(real))
    right = scenes.judge_pictures(world, held, drawn)
    metrics, classes = scenes.metrics("generation", scenes.DRAWN, held, right, level["generation"])
    records = [{"prompt": s.caption, **v} for s, v in zip(held, right)]
    write_pictures(folder, "generations", records[:SHOWN], images=drawn[:SHOWN])
    right = scenes.judge_captions(world, held, told)
    more, by_class = scenes.metrics("caption", scenes.TOLD, held, right, level["caption"])
    records = [{"reference": s.caption, "caption": t, **v} for s, t, v in zip(held, told, right)]
    write_pictures(folder, "captions", records[:SHOWN], images=real[:SHOWN])
    np.savez_compressed(folder / "reconstructions.npz", images=real[:16], reconstructions=again[:16])
    ceiling, _ = scenes.metrics("generation", scenes.DRAWN, held, scenes.judge_pictures(world, held, again),
                                level["generation"])
    return metrics | more | {
        "autoencoder_sprites": ceiling["generation_sprites"] | {
            "title": "Ceiling: the same of the autoencoder's reconstructions", "want": None},
        "autoencoder_psnr": statistics.number(
            "Autoencoder: PSNR of held-out pictures (dB)", losses.psnr(real, again), "higher", n=len(real))
    }, {name: classes[name] | by_class[name] for name in classes}


def write_documents(cfg, params, codec, tokenizer, folder: Path) -> None:
    """Whole documents from nothing at temperature 1: text, pictures, text."""
    rows = decode.generate(cfg, params, [[]] * DOCUMENTS, seed=SEED.value, temperature=1.0)
    rows = sorted(rows, key=lambda parts: -sum(p.ndim == 3 for p in parts))[:4]
    latents = [part for parts in rows for part in parts if part.ndim == 3]
    number, documents = iter(range(len(latents))), []
    for parts in rows:
        documents.append([{"image": next(number)} if p.ndim == 3 else {"text": tokenizer.decode(p.tolist())}
                          for p in parts])
    if latents:
        np.savez_compressed(folder / "interleaved.npz", images=codec.decode(np.stack(latents)))
        replace_text(folder / "interleaved.json", json.dumps(documents, indent=1))


def write_mask(cfg, tokenizer, folder: Path) -> None:
    """The attention mask of one packed row of the training data."""
    row = pipeline.open_rows(cfg, make_objective(cfg), "train")[0]
    mask = dense_mask(row.segment_ids_BT[None], row.image_ids_BT[None], cfg.model.image_attention)[0]
    names = {cfg.model.boi: "<boi>", cfg.model.eoi: "<eoi>"}
    pieces = [f"patch {n}" if n else names.get(t) or tokenizer.piece(t)
              for t, n in zip(row.tokens_BT.tolist(), row.image_ids_BT.tolist())]
    np.savez_compressed(folder / "mask.npz", mask=np.asarray(mask), segment_ids=row.segment_ids_BT,
                        image_ids=row.image_ids_BT)
    replace_text(folder / "mask.json", json.dumps({"pieces": pieces}))


def leave_out(what: str, why: str) -> None:
    print(f"left out: {what} ({why})")


def measure(run_: trained.Trained, cfg, folder: Path) -> dict:
    """All that can be measured of the run; of what cannot, a line is printed."""
    _, params, codec, tokenizer = run_
    result = {"metrics": {}}
    if codec is None:
        leave_out("drawing and describing", "the run has no codec of pictures")
    elif not cfg.data.mixture.get("scenes"):
        leave_out("drawing and describing", "data.mixture has no 'scenes', whose captions can be scored")
    else:
        result["metrics"], result["classes"] = both_ways(cfg, params, codec, tokenizer, folder)
    if not DATA.value.data.prepared and not Path(cfg.data.prepared).exists():
        leave_out("held-out losses", f"{cfg.data.prepared} is gone: --config.data.prepared=DIR names the data")
    else:
        trained.check_data(run_, cfg.data.prepared)
        figures, tables = losses.report(cfg, params, tokenizer)
        result["metrics"] |= figures
        result |= tables
        write_mask(cfg, tokenizer, folder)
    if codec is None:
        leave_out("whole documents", "no codec to show their pictures with")
    else:
        write_documents(cfg, params, codec, tokenizer, folder)
    return result


def main() -> None:
    if WORKDIR.value is None:
        raise UserError("--workdir=DIR is needed: the workdir of a trained Transfusion")
    distributed.start_process()
    began, workdir = time.perf_counter(), Path(WORKDIR.value)
    mesh = sharding.parse_mesh(MESH.value)
    jax.set_mesh(mesh)
    run_ = trained.load(workdir, STEP.value, mesh)
    cfg = config.load_with(workdir, DATA.value.data.to_dict())
    if cfg.objective != "transfusion":
        raise UserError(f"{workdir} holds a run with objective = '{cfg.objective}', not 'transfusion'")
    folder = workdir / "evaluation"
    folder.mkdir(exist_ok=True)
    result = measure(run_, cfg, folder)
    result |= {"seed": SEED.value, "sampling": cfg.to_dict()["sampling"], "jax": jax.__version__}
    write_timing(folder, "evaluate", time.perf_counter() - began)
    replace_text(folder / "metrics.json", json.dumps(result, indent=1) + "\n")  # last: all is there
    by_class = result.get("classes", {}).values()
    for m in (*result["metrics"].values(), *(m for figures in by_class for m in figures.values())):
        interval = f"  [{m['low']:.3f}, {m['high']:.3f}]" if m["low"] is not None else ""
        chance = f"  chance {m['chance']:.3f}" if m["chance"] is not None else ""
        count = f"  n {m['n']}" if m["n"] is not None else ""
        value = "    none" if m["value"] is None else f"{m['value']:8.3f}"
        print(f"{value}  {m['title']}{count}{interval}{chance}")


if __name__ == "__main__":
    run(main)
