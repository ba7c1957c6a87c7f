"""All that is measured of a trained Transfusion, and the pictures and texts that the report shows."""

import json
from pathlib import Path

import numpy as np

from tfusion.config import replace_text
from tfusion.data.config import shares
from tfusion.evals import losses, scenes, statistics
from tfusion.inference import trained, transfusion
from tfusion.inference.trained import Trained
from tfusion.models.masks import dense_mask
from tfusion.objectives import kind_of
from tfusion.objectives.transfusion import TransfusionConfig

SHOWN = 48  # pictures kept for the report
DOCUMENTS = 16  # written from nothing; those with the most pictures are shown


def write_pictures(folder: Path, name: str, records: list, **arrays) -> None:
    np.savez_compressed(folder / f"{name}.npz", **arrays)
    replace_text(folder / f"{name}.jsonl", "".join(json.dumps(r) + "\n" for r in records))


def both_ways(run: Trained, cfg: TransfusionConfig, folder: Path, num_scenes: int,
              seed: int) -> tuple[dict, dict]:
    """Draws the held-out captions, describes the held-out pictures: (figures, figures by class of scene)."""
    _, params, codec, tokenizer, *_ = run
    world, held, real = scenes.held_out(cfg, num_scenes)
    level = scenes.chance(held)
    drawn = scenes.draw(cfg, params, codec, tokenizer, held, seed)
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


def write_documents(run: Trained, cfg: TransfusionConfig, folder: Path, seed: int) -> None:
    """Whole documents from nothing at temperature 1: text, pictures, text."""
    _, params, codec, tokenizer, *_ = run
    rows = transfusion.generate(cfg, params, [[]] * DOCUMENTS, seed=seed, temperature=1.0)
    rows = sorted(rows, key=lambda parts: -sum(p.kind == "image" for p in parts))[:4]
    latents = [part.values for parts in rows for part in parts if part.kind == "image"]
    number, documents = iter(range(len(latents))), []
    for parts in rows:
        documents.append([{"image": next(number)} if p.kind == "image" else
                          {"text": tokenizer.decode(p.values.tolist())} for p in parts])
    if latents:
        np.savez_compressed(folder / "interleaved.npz", images=codec.decode(np.stack(latents)))
        replace_text(folder / "interleaved.json", json.dumps(documents, indent=1))


def write_mask(cfg: TransfusionConfig, tokenizer, folder: Path) -> None:
    """The attention mask of one packed row of the training data."""
    row = kind_of(cfg).open_rows(cfg)[0]
    mask = dense_mask(row.segment_ids_BT[None], row.image_ids_BT[None], cfg.model.image_attention)[0]
    names = {cfg.vocabulary.boi: "<boi>", cfg.vocabulary.eoi: "<eoi>"}
    pieces = [f"patch {n}" if n else names.get(t) or tokenizer.piece(t)
              for t, n in zip(row.tokens_BT.tolist(), row.image_ids_BT.tolist())]
    np.savez_compressed(folder / "mask.npz", mask=np.asarray(mask), segment_ids=row.segment_ids_BT,
                        image_ids=row.image_ids_BT)
    replace_text(folder / "mask.json", json.dumps({"pieces": pieces}))


def leave_out(what: str, why: str) -> None:
    print(f"left out: {what} ({why})")


def measure(run: Trained, cfg: TransfusionConfig, folder: Path, num_scenes: int, seed: int,
            needs_data: bool) -> dict:
    """{'metrics': figures, ...} of all that can be measured of a run, pictures and texts written to `folder`;
    what cannot be is named in a line.

    cfg: the run's, with data.prepared where the data are now. needs_data: they must be there (UserError).
    """
    result, gone = {"metrics": {}}, not needs_data and not Path(cfg.data.prepared).exists()
    if not gone:
        trained.check_data(run, cfg.data.prepared)
    if run.codec is None:
        leave_out("drawing and describing", "the run has no codec of pictures")
    elif "scenes" not in shares(cfg.data.sources):
        leave_out("drawing and describing", "data.sources has no 'scenes', whose captions can be scored")
    else:
        result["metrics"], result["classes"] = both_ways(run, cfg, folder, num_scenes, seed)
    if gone:
        leave_out("held-out losses", f"{cfg.data.prepared} is gone: --config.data.prepared=DIR names the data")
    else:
        figures, tables = losses.report(cfg, run)
        result["metrics"] |= figures
        result |= tables
        write_mask(cfg, run.tokenizer, folder)
    if run.codec is None:
        leave_out("whole documents", "no codec to show their pictures with")
    else:
        write_documents(run, cfg, folder, seed)
    return result
