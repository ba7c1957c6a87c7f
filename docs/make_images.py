"""The README's pictures and figures, from a finished quickstart:  python docs/make_images.py runs/quickstart

Writes docs/images/*.png (but inspect.png, which a browser took of `prepare --inspect`'s page), and
docs/quickstart_metrics.json: the figures, times and versions of that run, and the tables of figures in
README.md, between their marks.

  python docs/make_images.py FOLDER FOLDER     what `sample --draw --out=FOLDER` drew of both recipes, the same
                                               prompts: Transfusion above, Chameleon below (both_draw.png)
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).parent
ROWS = (  # of README's first table: a figure's name, how its row is called
    ("generation_canvas", "drawn: the canvas has the colour asked for"),
    ("generation_sprites", "drawn: exactly the sprites asked for, and looking right"),
    ("generation_relation", "drawn: they stand as asked, where both are there"),
    ("caption_canvas", "told: the canvas's colour"),
    ("caption_all", "told: the colour, the sprites and how they stand"),
    ("caption_exact", "told: the caption word for word"),
    ("diffusion_vs_linear_worst_bin", "diffusion loss / the best linear predictor's, worst noise level"),
    ("scenes_vs_bigram", "LM loss on captions less a bigram's, nats per token"),
    ("glosses_vs_unigram", "LM loss on glosses less a unigram's, nats per token"),
    ("glosses_vs_bigram", "LM loss on glosses less a bigram's, nats per token"),
    ("autoencoder_sprites", "ceiling: the autoencoder's reconstructions, as the drawn sprites are judged"),
    ("autoencoder_psnr", "autoencoder: PSNR, dB"))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def samples(run: Path) -> None:
    folder = run / "transfusion" / "evaluation" / "scenes"
    images, records = np.load(folder / "card.npz")["drawn"], lines(folder / "drawn.jsonl")
    fig, axes = plt.subplots(4, 8, figsize=(14, 8.4))
    for ax, image, record in zip(axes.flat, images, records):
        ax.imshow(image, interpolation="nearest")
        ax.set_title(record["scene"].replace(" on a", "\non a"), fontsize=8)
        ax.axis("off")
    fig.tight_layout()
    fig.savefig(ROOT / "images" / "quickstart_samples.png", dpi=80)


def both_draw(folders: list[Path]) -> None:
    rows = [lines(folder / "documents.jsonl") for folder in folders]
    fig, axes = plt.subplots(2, len(rows[0]), figsize=(1.75 * len(rows[0]), 4.3))
    for recipe, folder, documents, row in zip(("Transfusion", "Chameleon"), folders, rows, axes):
        for ax, document in zip(row, documents):
            picture = next(part["image"] for part in document["parts"] if "image" in part)
            ax.imshow(plt.imread(folder / picture), interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
        row[0].set_ylabel(recipe, fontsize=10)
    for ax, document in zip(axes[0], rows[0]):
        ax.set_title(document["prompt"].replace(" on a", "\non a"), fontsize=7.5)
    fig.tight_layout()
    fig.savefig(ROOT / "images" / "both_draw.png", dpi=80)


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
    folder = run / "transfusion" / "evaluation" / "mask"
    data, card = np.load(folder / "card.npz"), json.loads((folder / "card.json").read_text())
    pieces = card["sections"][0]["blocks"][0]["pieces"]
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
    summary["evaluation/metrics.json"]["data"].pop("prepared")  # a path of the machine that ran it
    text = json.dumps(summary | {"timing": timing}, indent=1)
    (ROOT / "quickstart_metrics.json").write_text(text + "\n")


def cell(m: dict) -> str:
    if m["value"] is None:
        return "none"
    interval = f" [{m['low']:.3f}, {m['high']:.3f}]" if m["low"] is not None else ""
    return f"{m['value']:.3f}{interval}"


def reached(m: dict) -> str:
    """A wanted value, and whether it is met."""
    if m["want"] is None:
        return ""
    sign, best = (1, m["high"]) if m["better"] == "higher" else (-1, m["low"])
    met, within = (x is not None and sign * x >= sign * m["want"] for x in (m["value"], best))
    word = "reached" if met else "short of it, within the interval" if within else "**not reached**"
    return f"{m['want']:g}, {word}"


def tables(found: dict) -> str:
    """README's tables, from an evaluation's metrics.json."""
    metrics = found["metrics"]
    lines = ["| held out | value [95 % interval] | chance | wanted |", "|---|---|---|---|"]
    for name, title in ROWS:
        m = metrics[name]
        chance = "" if m["chance"] is None else f"{m['chance']:.3f}"
        lines.append(f"| {title} | {cell(m)} | {chance} | {reached(m)} |")
    lines += ["", "| class of scene | n | drawn: all of it | told: all of it | told: word for word |",
              "|---|---|---|---|---|"]
    for part in ("one", "two", "left of", "above"):
        figures = [metrics[f"{name}/{part}"] for name in ("generation_all", "caption_all", "caption_exact")]
        cells = [cell(m) + (f" ({reached(m)})" if m["want"] is not None else "") for m in figures]
        lines.append(f"| {part} | {max(m['n'] for m in figures)} | {' | '.join(cells)} |")
    lines += ["", "| held-out text | LM loss, nats per token | unigram | bigram | bits per byte |",
              "|---|---|---|---|---|"]
    for source in (name.removesuffix("_vs_unigram") for name in metrics if name.endswith("_vs_unigram")):
        value = {name: metrics[f"{source}_{name}"]["value"]
                 for name in ("lm_loss", "vs_unigram", "vs_bigram", "bits_per_byte")}
        unigram, bigram = (value["lm_loss"] - value[f"vs_{name}"] for name in ("unigram", "bigram"))
        lines.append(f"| {source} | {value['lm_loss']:.3f} | {unigram:.3f} | {bigram:.3f} | "
                     f"{value['bits_per_byte']:.3f} |")
    return "\n".join(lines)


def readme(run: Path) -> None:
    found = json.loads((run / "transfusion" / "evaluation" / "metrics.json").read_text())
    path, begin, end = ROOT.parent / "README.md", "<!-- figures -->\n", "<!-- /figures -->"
    before, after = path.read_text().split(begin)
    path.write_text(before + begin + tables(found) + "\n" + end + after.split(end)[1])


if __name__ == "__main__":
    (ROOT / "images").mkdir(exist_ok=True)
    given = [Path(folder) for folder in sys.argv[1:]]
    if len(given) == 2:
        both_draw(given)
    else:
        for make in (samples, curves, mask, figures, readme):
            make(*given)
