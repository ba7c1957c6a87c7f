"""The quickstart report: self-contained, complete, and forgiving about optional parts."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from tfusion.reporting.quickstart import SECTIONS, write_report

from tfusion.reporting.records import ReportError

REPOSITORY = Path(__file__).parents[2]
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


def training_rows(steps: int, every: int, rng: np.random.Generator) -> list[dict]:
    """Curves that fall as a real run's do, with nulls and partial lines."""
    rows = []
    for step in range(every, steps + 1, every):
        lm = 1.3 + 5.0 * np.exp(-step / (0.05 * steps)) + 0.9 * np.exp(-step / (0.4 * steps))
        bins = [
            b * (0.35 + 0.65 * np.exp(-step / (0.2 * steps))) for b in (0.6, 0.4, 0.3, 0.2, 0.1)
        ]
        noisy = rng.lognormal(0, 0.12, 8)
        row = {
            "step": step,
            "train/lm_loss": lm * noisy[0],
            "train/diffusion_loss": float(np.mean(bins)) * noisy[1],
            "train/grad_norm": (0.4 + 4 * np.exp(-step / (0.03 * steps))) * noisy[2],
            "train/learning_rate": 3e-3
            * min(1, step / (0.03 * steps))
            * (0.525 + 0.475 * np.cos(np.pi * step / steps)),
            "perf/tokens_per_sec": 15900 * rng.normal(1, 0.02),
            "perf/patches_per_sec": 7100 * rng.normal(1, 0.02),
            "perf/step_ms": 29.3,
            "perf/model_flops_per_sec": 9.4e10,
            "data/fill": 0.97,
            "data/wait_fraction": 0.004,
        }
        row |= {f"train/diffusion_loss_bin{k}": bins[k] * noisy[3 + k] for k in range(5)}
        row["train/param_norm"] = 40 + 25 * step / steps
        if step == every:
            row["train/diffusion_loss_bin4"] = None
        rows.append(row)
        if step % (steps // 12) < every:
            rows.append(
                {
                    "step": step,
                    "eval/lm_loss": lm * 1.03,
                    "eval/diffusion_loss": float(np.mean(bins)) * 1.02,
                    **{f"eval/diffusion_loss_bin{k}": b * 1.02 for k, b in enumerate(bins)},
                }
            )
            rows.append(
                {
                    "step": step,
                    "grad_norm/lm_loss": row["train/grad_norm"] * 0.8,
                    "grad_norm/diffusion_loss": row["train/grad_norm"] * 0.5,
                }
            )
    return rows


def write_training(root: Path, steps: int, every: int) -> None:
    rng = np.random.default_rng(0)
    write_lines(root / "transfusion/metrics.jsonl", training_rows(steps, every, rng))
    write_json(
        root / "transfusion/config.json",
        {"name": "quickstart", "model": {"num_layers": 4, "d_model": 128}, "seed": 0},
    )
    write_json(
        root / "transfusion/summary.json",
        {
            "num_params": 953216,
            "steps": steps,
            "tokens": steps * 512,
            "images": steps * 14,
            "flops": 6 * 953216 * steps * 512.0,
        },
    )
    rows = []
    for step in range(every, steps + 1, every):
        error = 0.018 + 0.2 * np.exp(-step / (0.1 * steps))
        rows.append(
            {
                "step": step,
                "train/reconstruction_l1": error * rng.lognormal(0, 0.1),
                "train/reconstruction_mse": error**1.7,
                "train/kl": 300.0,
            }
        )
        if step % (steps // 8) < every:
            rows.append({"step": step, "eval/reconstruction_mse": 0.008 + 0.1 * np.exp(-step / (0.2 * steps))})
    write_lines(root / "autoencoder/metrics.jsonl", rows)
    write_json(root / "autoencoder/config.json", {"width": 64})
    for part, stages in {
        "data": [("scenes and tokenizer", 4.2, 310)],
        "autoencoder": [("compile", 3.1, 700), ("train", 60.3, 820), ("latents", 2.2, 830)],
        "transfusion": [("compile", 6.4, 1010), ("train", 240.9, 1150)],
        "transfusion/evaluation": [("generate", 12.5, 1210), ("caption", 9.8, 1190)],
    }.items():
        write_json(
            root / part / "timing.json",
            {
                "machine": "2 x Intel Xeon @ 2.8 GHz, 7.8 GB",
                "versions": {"jax": "0.7", "python": "3.11"},
                "stages": [
                    {"name": name, "seconds": seconds, "peak_memory_mb": memory}
                    for name, seconds, memory in stages
                ],
            },
        )


def metric(title, value, n, low, high, chance, want, better="higher") -> dict:
    return {
        "title": title,
        "value": value,
        "n": n,
        "low": low,
        "high": high,
        "chance": chance,
        "want": want,
        "better": better,
    }


METRICS = {
    "canvas": metric("painted: background colour", 1.0, 128, 0.971, 1.0, 0.25, 0.95),
    "sprites": metric("painted: exactly the right objects", 0.984, 128, 0.945, 0.996, 0.02, 0.8),
    "relation": metric("painted: objects in the right places", 0.78, 70, 0.67, 0.86, 0.5, 0.9),
    "captions": metric("described: objects and colour", 0.941, 256, 0.905, 0.964, 0.01, 0.8),
    "lm": metric("LM loss on captions", 0.832, None, None, None, 2.4, 1.0, "lower"),
    "psnr": metric("autoencoder, PSNR in dB", 27.1, 256, 26.8, 27.4, None, 25.0),
    "fid": metric("repeated pictures", 0.0, 128, 0.0, 0.029, None, None, "lower"),
}


CLASSES = {
    name: {
        key: metric(f"{key}, {name}", value, n, 0.5, 1.0, 0.0, want)
        for key, value, want in (
            ("generation_all", 0.96, None),
            ("caption_all", 0.95, None),
            ("caption_exact", 0.91, 0.9),
        )
    }
    for name, n in (("one", 15), ("two", 26))
}


def write_evaluation(folder: Path, n: int) -> None:
    rng = np.random.default_rng(1)
    write_json(
        folder / "metrics.json",
        {
            "metrics": METRICS,
            "classes": CLASSES,
            "linear_baseline": {
                "bins": [0.71, 0.52, 0.43, 0.30, 0.14],
                "model": [0.42, 0.21, 0.13, 0.09, 0.08],
            },
            "ngrams": {
                "captions": {"model": 0.83, "unigram": 3.71, "bigram": 1.42},
                "glosses": {"model": 2.95, "unigram": 5.6, "bigram": 3.9},
            },
        },
    )
    write_answers(folder, scenes(n), rng)


def write_answers(folder: Path, made: list, rng: np.random.Generator) -> None:
    """Pictures, captions, reconstructions and documents, some of them wrong."""
    images = np.stack([image for _, image in made])
    blurred = np.clip(images + rng.normal(0, 9, images.shape), 0, 255).astype(np.uint8)
    np.savez(folder / "generations.npz", images=blurred)
    write_lines(
        folder / "generations.jsonl",
        [
            {
                "prompt": prompt,
                "canvas": True,
                "sprites": i % 11 != 5,
                "relation": (i % 13 != 7) if "left" in prompt else None,
            }
            for i, (prompt, _) in enumerate(made)
        ],
    )
    np.savez(folder / "captions.npz", images=images)
    write_lines(
        folder / "captions.jsonl",
        [
            {
                "reference": text,
                "all": i % 9 != 4,
                "relation": None,
                "caption": text.replace("a ", "a moon & ", 1)
                if i % 9 == 4
                else text.replace(" on", " upon")
                if i % 9 == 2
                else text,
            }
            for i, (text, _) in enumerate(made)
        ],
    )
    np.savez(folder / "reconstructions.npz", images=images[:16], reconstructions=blurred[:16])
    np.savez(folder / "interleaved.npz", images=images[:3])
    write_json(
        folder / "interleaved.json",
        [
            [
                {"text": "a star left of an <apple> on teal\n"},
                {"image": 1},
                {"text": "moon: the satellite of the earth; seen at night.\na leaf on pink"},
                {"image": 2},
            ],
            [{"image": 0}, {"text": "a star on teal"}],
        ],
    )


def write_mask(folder: Path, repeat: int) -> None:
    """A row of documents, each text, an image of 16 patches, text; then padding."""
    segments, image_ids, pieces = [], [], []
    for document in range(1, repeat + 1):
        before = ["<bos>", "▁a", "▁star", "▁left", "▁of", "▁a", "▁moon", "<boi>"][
            : 4 + document % 5
        ]
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
    np.savez(folder / "mask.npz", mask=mask, segment_ids=segments, image_ids=image_ids)
    write_json(folder / "mask.json", {"pieces": pieces})


def write_fake_run(root: Path, steps=240, every=4, n=12, documents=2) -> Path:
    """A made-up run with every file that the report reads."""
    write_training(root, steps, every)
    write_evaluation(root / "transfusion/evaluation", n)
    write_mask(root / "transfusion/evaluation", documents)
    return root


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    return write_fake_run(tmp_path_factory.mktemp("whole") / "quickstart")


@pytest.fixture
def run(whole_run, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(whole_run, tmp_path / "quickstart")


def report(root: Path) -> str:
    write_report(root, root / "out/report.html")
    return (root / "out/report.html").read_text()


def test_page_is_whole_and_self_contained(run):
    text = report(run)
    for name, title, _ in SECTIONS:
        assert f'<section id="{name}"><h2>{title}</h2>' in text
    assert 'id="left-out"' not in text
    assert "http:" not in text and "https:" not in text and "<script" not in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources and all(s.startswith(("data:", "#")) for s in sources)
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text)
    assert len(text) < 4_000_000
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids)), "two plots share an id"
    assert [p.name for p in (run / "out").iterdir()] == ["report.html"]


def test_verdicts_and_faults_are_shown(run):
    text = report(run)
    assert "Below what was wanted: 1 of 8, painted: objects in the right places" in text
    assert text.count('<span class="good">✓</span>') == 5 + 2
    assert text.count('<span class="bad">✗</span>') == 1
    assert "0.945 to 0.996 · n = 128" in text
    assert "wrong objects" in text and "wrong places" in text
    assert "All 12, in the order they came; 10 of these 12 are right" in text
    assert "an &lt;apple&gt; on teal" in text and "a moon &amp; " in text
    assert "Not one visible pair breaks this rule." in text


def test_a_wanted_metric_without_a_value_is_not_reached(run):
    """Nothing could be scored (n = 0): the page says so, and is written all the same."""
    path = run / "transfusion/evaluation/metrics.json"
    evaluation = json.loads(path.read_text())
    unscored = {"value": None, "n": 0, "low": None, "high": None}
    evaluation["metrics"]["sprites"] |= unscored
    evaluation["metrics"]["fid"] |= unscored  # nothing is wanted of this one
    path.write_text(json.dumps(evaluation))
    text = report(run)
    assert "Below what was wanted: 2 of 8, painted: exactly the right objects, painted:" in text
    assert text.count('<span class="good">✓</span>') == 4 + 2
    assert text.count('<span class="bad">✗</span>') == 2
    row = text[text.index("<td>painted: exactly the right objects") :]
    row = row[: row.index("</tr>")]
    assert '<td class="value">–<small>n = 0</small>' in row and "✗" in row and "≥ 0.8" in row


def test_a_class_of_scenes_that_fails_is_named(run):
    """Each class has its row; one that is asked for more than it gives counts in the verdict."""
    path = run / "transfusion/evaluation/metrics.json"
    evaluation = json.loads(path.read_text())
    evaluation["classes"]["two"]["caption_exact"]["value"] = 0.08
    path.write_text(json.dumps(evaluation))
    text = report(run)
    assert "2 of 8, painted: objects in the right places, caption_exact, two" in text
    row = text[text.index('<td class="" data-label="class of scene">two') :]
    row = row[: row.index("</tr>")]
    assert ">26<" in row and "0.080" in row and row.count("✗") == 1 and "0.950" in row


def test_a_run_without_scenes_has_no_classes(run):
    path = run / "transfusion/evaluation/metrics.json"
    evaluation = json.loads(path.read_text())
    del evaluation["classes"]
    path.write_text(json.dumps(evaluation))
    assert "class of scene" not in report(run)


def test_a_leak_in_the_mask_is_counted(run):
    path = run / "transfusion/evaluation/mask.npz"
    arrays = dict(np.load(path))
    arrays["mask"][0, 1] = arrays["mask"][-1, 0] = arrays["mask"][-1, -2] = True
    np.savez(path, **arrays)
    assert "3 visible pairs (red) break this rule." in report(run)


@pytest.mark.parametrize(
    "missing,section",
    [
        ("transfusion/evaluation/generations.npz", "pictures"),
        ("transfusion/evaluation/captions.jsonl", "captions"),
        ("transfusion/evaluation/interleaved.json", "interleaved"),
        ("transfusion/evaluation/mask.json", "mask"),
    ],
)
def test_a_missing_part_is_left_out_with_a_note(run, missing, section):
    (run / missing).unlink()
    text = report(run)
    assert f'<section id="{section}">' not in text and f'href="#{section}"' not in text
    note = text[text.index('id="left-out"') :]
    assert Path(missing).name in note and "python -m tfusion.evaluate" in note


def test_the_bare_minimum_is_enough(run):
    kept = {
        "transfusion/metrics.jsonl",
        "transfusion/config.json",
        "transfusion/evaluation/metrics.json",
    }
    for path in run.rglob("*"):
        if path.is_file() and str(path.relative_to(run)) not in kept:
            path.unlink()
    (run / "transfusion/metrics.jsonl").write_text('{"step": 1, "train/lm_loss": 2.5}\n')
    text = report(run)
    assert 'id="losses"' in text and 'id="left-out"' in text and 'id="autoencoder"' not in text


@pytest.mark.parametrize(
    "required",
    ["transfusion/metrics.jsonl", "transfusion/config.json", "transfusion/evaluation/metrics.json"],
)
def test_a_required_file_is_named_with_its_command(run, required):
    (run / required).unlink()
    with pytest.raises(ReportError, match=rf"{required} is missing; `.*` makes it"):
        report(run)
    assert not (run / "out").exists()


def test_damage_is_reported_with_its_place(run):
    with open(run / "transfusion/metrics.jsonl", "a") as file:
        file.write('{"step": 3\n')
    with pytest.raises(ReportError, match=r"metrics.jsonl, line \d+ is not JSON"):
        report(run)


@pytest.mark.parametrize("text", ["", '{"stages": [', "[]", "null", "{}"])
def test_broken_side_files_are_left_out_and_named(run, text):
    for name in ("timing.json", "summary.json"):
        (run / "transfusion" / name).write_text(text)
    with open(run / "transfusion/metrics.jsonl", "a") as file:
        file.write('{"step": 3')  # being written
    written = report(run)
    for name in ("timing.json", "summary.json"):
        assert f"transfusion/{name} is broken" in written[written.index('id="left-out"') :]


def verb(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tfusion.report", *args],
        text=True,
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )


def test_the_verb_writes_beside_the_run_and_fails_in_one_line(run, tmp_path):
    done = verb(f"--workdir={run}")
    assert done.returncode == 0, done.stderr
    assert (run / "report.html").is_file() and "wrote" in done.stdout
    (run / "transfusion/evaluation/metrics.json").unlink()
    failed = verb(f"--workdir={run}", f"--out={tmp_path / 'no.html'}")
    assert failed.returncode == 1 and not (tmp_path / "no.html").exists()
    assert len(failed.stderr.strip().splitlines()) == 1
    assert "metrics.json is missing; `python -m tfusion.evaluate" in failed.stderr


def test_reporting_needs_no_jax():
    code = "import sys, tfusion.report; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
