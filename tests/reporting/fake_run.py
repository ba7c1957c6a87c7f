"""Made-up runs with every file that a report reads: a Transfusion, its codec's run, data and evaluation."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"teal": "#2a9d8f", "pink": "#f4a6b8", "grey": "#b8bcc0", "blue": "#5b8bd6"}
SHAPES = {"star": "#f2c230", "apple": "#d33b3b", "leaf": "#4e9f3d", "moon": "#f6f1d1"}


def scene(colour: str, shapes: list[str]) -> np.ndarray:
    """A 32x32 canvas with one or two shapes side by side."""
    image = Image.new("RGB", (32, 32), COLOURS[colour])
    draw = ImageDraw.Draw(image)
    for shape, x in zip(shapes, (2, 17) if len(shapes) == 2 else (9,), strict=True):
        if shape == "star":
            draw.polygon([(x + 6, 9), (x + 12, 22), (x, 13), (x + 12, 13), (x, 22)], SHAPES[shape])
        else:
            draw.ellipse([x, 9, x + 12, 22], SHAPES[shape])
            draw.rectangle([x + 5, 5, x + 7, 9], "#5a3a1e" if shape == "apple" else SHAPES[shape])
    return np.asarray(image)


def scenes(n: int) -> list[tuple[str, np.ndarray]]:
    """n captions with their images."""
    found = []
    for i in range(n):
        colour = list(COLOURS)[i % 4]
        shapes = [list(SHAPES)[(i // 2 + j) % 4] for j in range(1 + i % 2)]
        objects = " left of ".join(f"a {shape}" for shape in shapes)
        found.append((f"{objects} on {colour}", scene(colour, shapes)))
    return found


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def training_rows(steps: int, every: int, rng: np.random.Generator, factor: float = 1.0) -> list[dict]:
    """Curves that fall as a real run's do, with nulls and partial lines."""
    rows = []
    for step in range(every, steps + 1, every):
        lm = factor * (1.3 + 5.0 * np.exp(-step / (0.05 * steps)) + 0.9 * np.exp(-step / (0.4 * steps)))
        bins = [factor * b * (0.35 + 0.65 * np.exp(-step / (0.2 * steps))) for b in (0.6, 0.4, 0.3, 0.2, 0.1)]
        noisy = rng.lognormal(0, 0.12, 8)
        row = {
            "step": step, "time": 1.7e9 + step, "train/lm_loss": lm * noisy[0],
            "train/diffusion_loss": float(np.mean(bins)) * noisy[1],
            "train/grad_norm": (0.4 + 4 * np.exp(-step / (0.03 * steps))) * noisy[2],
            "train/learning_rate": 3e-3 * min(1, step / (0.03 * steps)), "train/clip_rate": 0.5,
            "train/param_norm": 40 + 25 * step / steps, "total/tokens": 512 * step, "total/images": 14 * step,
            "total/flops": factor * 3e9 * step, "perf/tokens_per_sec": 15900 * rng.normal(1, 0.02),
            "perf/patches_per_sec": 7100 * rng.normal(1, 0.02), "perf/step_ms": 29.3 * factor,
            "perf/model_flops_per_sec": 9.4e10, "data/fill": 0.97, "data/wait_fraction": 0.004}
        row |= {f"train/diffusion_loss_bin{k}": bins[k] * noisy[3 + k] for k in range(5)}
        if step == every:
            row["train/diffusion_loss_bin4"] = None
        if step % (steps // 12) < every:
            row |= {"eval/lm_loss": lm * 1.03, "eval/diffusion_loss": float(np.mean(bins)) * 1.02,
                    "eval/scenes/lm_loss": lm * 0.9, "eval/glosses/lm_loss": lm * 1.2,
                    "grad_norm/lm_loss": row["train/grad_norm"] * 0.8,
                    "grad_norm/diffusion_loss": row["train/grad_norm"] * 0.5}
            row |= {f"eval/diffusion_loss_bin{k}": b * 1.02 for k, b in enumerate(bins)}
        rows.append(row)
    return rows


def write_goodput(folder: Path) -> None:
    """As training leaves it after a kill and a restart."""
    seconds = {"init": 20.0, "compile": 12.0, "data": 1.0, "step": 240.0, "save": 4.0, "eval": 3.0,
               "lost": 20.0}
    write_json(folder / "goodput.json", {"seconds": seconds, "attempts": [
        {"began": 1.7e9, "seconds": {**seconds, "lost": 0.0, "step": 110.0}},
        {"began": 1.7e9 + 200, "seconds": {**seconds, "lost": 0.0, "step": 150.0}}]})


def write_timing(folder: Path, *stages) -> None:
    write_json(folder / "timing.json", {
        "machine": "2 x Intel Xeon @ 2.8 GHz, 7.8 GB", "versions": {"jax": "0.7", "python": "3.11"},
        "stages": [dict(zip(("name", "seconds", "peak_memory_mb"), stage, strict=True)) for stage in stages]})


def write_autoencoder(root: Path, steps: int = 240, every: int = 4) -> Path:
    rng, rows = np.random.default_rng(2), []
    for step in range(every, steps + 1, every):
        error = 0.018 + 0.2 * np.exp(-step / (0.1 * steps))
        rows.append({"step": step, "train/reconstruction_l1": error * rng.lognormal(0, 0.1),
                     "train/reconstruction_mse": error**1.7, "train/kl": 300.0, "train/grad_norm": 1.0,
                     "train/param_norm": 9.0, "train/learning_rate": 1e-3, "perf/step_ms": 15.0,
                     "perf/images_per_sec": 2000.0, "total/images": 32 * step})
        if step % (steps // 8) < every:
            rows[-1]["eval/reconstruction_mse"] = 0.008 + 0.1 * np.exp(-step / (0.2 * steps))
    write_lines(root / "metrics.jsonl", rows)
    write_json(root / "config.json", {"objective": "autoencoder", "autoencoder": {"width": 64}, "seed": 0})
    write_json(root / "summary.json", {"num_params": 94144, "steps": steps, "images": 32 * steps})
    write_timing(root, ("compile", 3.1, 700), ("train", 60.3, 820))
    return root


def write_training(root: Path, steps: int, every: int, data: Path | None, factor: float = 1.0) -> None:
    """A Transfusion's run, as training leaves it."""
    write_lines(root / "metrics.jsonl", training_rows(steps, every, np.random.default_rng(0), factor))
    write_json(root / "config.json", {
        "objective": "transfusion", "model": {"num_layers": 4, "d_model": round(128 * factor)}, "seed": 0,
        "data": {"prepared": str(data or "/nowhere/data")}})
    write_json(root / "summary.json", {"num_params": 953216, "steps": steps, "tokens": steps * 512,
                                       "images": steps * 14, "flops": 6 * 953216 * steps * 512.0})
    write_timing(root, ("compile", 6.4, 1010), ("train", 240.9, 1150))
    write_goodput(root)


def metric(title, value, n, low, high, chance, want, better="higher") -> dict:
    return {"title": title, "value": value, "n": n, "low": low, "high": high, "chance": chance, "want": want,
            "better": better}


METRICS = {
    "canvas": metric("painted: background colour", 1.0, 128, 0.971, 1.0, 0.25, 0.95),
    "sprites": metric("painted: exactly the right objects", 0.984, 128, 0.945, 0.996, 0.02, 0.8),
    "relation": metric("painted: objects in the right places", 0.78, 70, 0.67, 0.86, 0.5, 0.9),
    "captions": metric("described: objects and colour", 0.941, 256, 0.905, 0.964, 0.01, 0.8),
    "lm": metric("LM loss on captions", 0.832, None, None, None, 2.4, 1.0, "lower"),
    "psnr": metric("autoencoder, PSNR in dB", 27.1, 256, 26.8, 27.4, None, 25.0),
    "fid": metric("repeated pictures", 0.0, 128, 0.0, 0.029, None, None, "lower"),
    **{f"{key}/{name}": metric(f"{key}, {name}", value, n, 0.5, 1.0, 0.0, want)
       for name, n in (("one", 15), ("two", 26))
       for key, value, want in (("all", 0.96, None), ("exact", 0.91, 0.9))},
}


def write_card(folder: Path, *sections, **arrays) -> None:
    """As evals/base.py writes it; sections: (name, title, block, ...)."""
    made = [{"name": name, "title": title, "blocks": blocks} for name, title, *blocks in sections]
    write_json(folder / "card.json", {"sections": made})
    np.savez(folder / "card.npz", **arrays)


def write_samples(folder: Path, made: list) -> None:
    """Pictures, captions, reconstructions and documents, some of them wrong."""
    images = np.stack([image for _, image in made])
    rng = np.random.default_rng(1)
    blurred = np.clip(images + rng.normal(0, 9, images.shape), 0, 255).astype(np.uint8)
    drawn = [{"caption": text, "wrong": i % 11 == 5, "remark": "wrong objects" if i % 11 == 5 else ""}
             for i, (text, _) in enumerate(made)]
    told = [{"caption": "" if i == 1 else f"{text} & more", "wrong": i % 9 == 4, "remark": f"reference: {text}"}
            for i, (text, _) in enumerate(made)]
    write_card(
        folder / "scenes",
        ("classes", "By class", {"kind": "parts", "head": "class of scene", "parts": ["one", "two"],
                                 "columns": {"all": "all of it", "exact": "word for word"}}),
        ("pictures", "Held-out prompts, painted", {"kind": "gallery", "images": "drawn", "items": drawn,
                                                   "of": len(made), "made": "Painted by the model."}),
        ("captions", "Held-out images, described", {"kind": "gallery", "images": "real", "items": told,
                                                    "of": 1000}), drawn=blurred, real=images)
    documents = [[{"text": "a star left of an <apple> on teal\n"}, {"image": 1},
                  {"text": "moon: seen at night."}, {"image": 2}], [{"image": 0}, {"text": "a star"}], []]
    write_card(folder / "documents", ("interleaved", "Documents written by the model", {
        "kind": "documents", "images": "images", "documents": documents}), images=images[:3])
    write_card(folder / "reconstructions", ("reconstructions", "What the autoencoder keeps", {
        "kind": "pairs", "above": "images", "below": "again"}), images=images[:9], again=blurred[:9])


def write_mask(folder: Path, repeat: int) -> None:
    """A row of documents, each text, an image of 16 patches, text; then padding."""
    segments, image_ids, pieces = [], [], []
    for document in range(1, repeat + 1):
        before = ["<bos>", "▁a", "▁star", "▁left", "▁of", "▁a", "▁moon", "<boi>"][: 4 + document % 5]
        parts = [(before, 0), ([""] * 16, document), (["<eoi>", "▁it", "▁glows", "<eos>"], 0)]
        for words, image in parts:
            pieces += words
            image_ids += [image] * len(words)
            segments += [document] * len(words)
    pieces, image_ids, segments = pieces + ["<pad>"] * 5, image_ids + [0] * 5, segments + [0] * 5
    segments, image_ids = np.array(segments), np.array(image_ids)
    place = np.arange(len(segments))
    image = (image_ids[:, None] == image_ids) & (image_ids[:, None] > 0)
    mask = (image | (place[:, None] >= place)) & (segments[:, None] == segments)
    mask &= (segments[:, None] > 0) | np.eye(len(place), dtype=bool)
    write_card(folder / "mask", ("mask", "Who sees whom", {
        "kind": "mask", "mask": "mask", "segments": "segments", "images": "images", "pieces": pieces}),
        mask=mask, segments=segments, images=image_ids)


def write_baselines(folder: Path) -> None:
    groups = [("captions", [3.71, 1.42, 0.83]), ("glosses", [5.6, 3.9, 2.95])]
    bins = [("0.0–0.5", [0.71, 0.42]), ("0.5–1.0", [0.14, 0.08])]

    def block(title, names, groups, **more):
        return {"kind": "bars", "title": title, "names": names, **more,
                "groups": [{"name": name, "values": values} for name, values in groups]}

    table = {"kind": "table", "title": "By source", "head": ["held out", "LM loss", "diffusion loss"],
             "rows": [["<scenes>", 0.91734, 0.2139], ["glosses", 3.86165, None]]}
    lying = block("Against n-grams", ["unigram", "bigram", "model"], groups, across=True)
    standing = block("Against a linear predictor", ["linear", "model"], bins, tone="image")
    write_card(folder / "baselines", ("baselines", "What simpler models reach", lying, standing, table))


def write_evaluation(folder: Path, n: int = 12, documents: int = 2) -> None:
    write_samples(folder, scenes(n))
    write_mask(folder, documents)
    write_baselines(folder)
    (folder / "silent").mkdir()  # an evaluator that shows nothing leaves a folder without a card, or none
    write_json(folder / "silent/card.json", {"sections": []})
    evaluators = ["scenes", "documents", "reconstructions", "mask", "baselines", "silent", "figures_only"]
    write_json(folder / "metrics.json", {"metrics": METRICS, "evaluators": evaluators, "left_out": {}})
    write_timing(folder, ("evaluate", 22.3, 1210))


def write_fake_run(root: Path, steps: int = 240, every: int = 4, n: int = 12) -> Path:
    """root/transfusion, evaluated, and beside it its data and its codec's run. Returns root/transfusion."""
    run, data, codec = (root / name for name in ("transfusion", "data", "autoencoder"))
    write_autoencoder(codec, steps, every)
    write_json(data / "meta.json", {"codec_run": str(codec)})
    write_timing(data, ("prepare", 4.2, 310))
    write_training(run, steps, every, data)
    write_evaluation(run / "evaluation", n)
    return run
