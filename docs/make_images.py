"""The README's pictures and figures, from a finished quickstart:  python docs/make_images.py runs/quickstart

Writes docs/images/*.png, and docs/quickstart_metrics.json: the figures, times and versions of that run.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).parent


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def samples(run: Path) -> None:
    folder = run / "transfusion" / "evaluation"
    images, records = np.load(folder / "generations.npz")["images"], lines(folder / "generations.jsonl")
    fig, axes = plt.subplots(4, 8, figsize=(14, 8.4))
    for ax, image, record in zip(axes.flat, images, records):
        ax.imshow(image, interpolation="nearest")
        ax.set_title(record["prompt"].replace(" on a", "\non a"), fontsize=8)
        ax.axis("off")
    fig.tight_layout()
    fig.savefig(ROOT / "images" / "quickstart_samples.png", dpi=80)


def curves(run: Path) -> None:
    rows = lines(run / "transfusion" / "metrics.jsonl")
    fig, axes = plt.subplots(1, 3, figsize=(14, 3.8))

    def plot(ax, key, **style):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        ax.plot(*zip(*points), **style)

    for ax, name in zip(axes, ("lm_loss", "diffusion_loss")):
        plot(ax, f"train/{name}", color="#9db4cf", lw=1, label="training")
        plot(ax, f"eval/{name}", color="#1f2d3d", marker="o", ms=3, label="held out (moving average)")
        ax.set_title(name)
        ax.legend(frameon=False)
    for i in range(5):
        plot(axes[2], f"eval/diffusion_loss_bin{i}", label=f"t in ({i / 5:.1f}, {(i + 1) / 5:.1f}]")
    axes[2].set_title("held-out diffusion_loss by noise level")
    axes[2].set_yscale("log")
    axes[2].legend(frameon=False, fontsize=8)
    for ax in axes:
        ax.set_xlabel("step")
    fig.tight_layout()
    fig.savefig(ROOT / "images" / "quickstart_curves.png", dpi=80)


def mask(run: Path) -> None:
    folder = run / "transfusion" / "evaluation"
    data, pieces = np.load(folder / "mask.npz"), json.loads((folder / "mask.json").read_text())["pieces"]
    visible, T = data["mask"], len(pieces)
    later = visible & np.triu(np.ones((T, T), bool), 1)
    fig, ax = plt.subplots(figsize=(9, 9))
    colours = matplotlib.colors.ListedColormap(["#f7f6f1", "#b4c5da", "#c4703c"])
    ax.imshow(visible.astype(int) + later, cmap=colours)
    marked = [i for i, piece in enumerate(pieces) if piece in ("<boi>", "<eoi>") or i == 0
              or data["segment_ids"][i] != data["segment_ids"][i - 1]]
    ax.set_yticks(marked, [pieces[i] for i in marked], fontsize=7)
    ax.set_xticks([])
    ax.set_title("rows see columns; orange: patches seen ahead, within their image", fontsize=10)
    fig.tight_layout()
    fig.savefig(ROOT / "images" / "mask.png", dpi=80)


def figures(run: Path) -> None:
    folder = run / "transfusion"
    timing = {part: json.loads((run / part / "timing.json").read_text())
              for part in ("autoencoder", "data", "transfusion", "transfusion/evaluation")}
    summary = {name: json.loads((folder / name).read_text())
               for name in ("summary.json", "evaluation/metrics.json")}
    text = json.dumps(summary | {"timing": timing}, indent=1)
    (ROOT / "quickstart_metrics.json").write_text(text + "\n")


if __name__ == "__main__":
    (ROOT / "images").mkdir(exist_ok=True)
    for make in (samples, curves, mask, figures):
        make(Path(sys.argv[1]))
