"""The commands of experiments/own_data.py run as they stand, one after the other, in their smoke variant."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import own_data
from tfusion.data.store import Split

ROOT = Path(__file__).parents[1]


def commands() -> list[list[str]]:
    """[[verb, flags], ...] of the docstring, each experiment in its smoke variant."""
    text = re.sub(r"\\\n\s*", "", own_data.__doc__)
    found = re.findall(r"python -m tfusion\.(\w+) +(.+)", text)
    return [[verb, flags.replace("--prompt=\"a photo of a frog\"", "--prompt=grey").replace(
        "experiments/own_data.py", f"{ROOT}/experiments/own_data.py:smoke").replace("smoke:", "smoke,")]
        for verb, flags in found]


@pytest.mark.slow
def test_from_a_folder_to_samples(tmp_path):
    """Sixty pictures: one without a caption, one damaged; and notes."""
    photos = tmp_path / "DIR"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i in range(60):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(photos / f"{i}.jpg")
        (photos / f"{i}.txt").write_text("grey" if i else "")
    (photos / "59.jpg").write_bytes(b"")
    (photos / "notes.jsonl").write_text('{"text": "a note"}\n' * 40)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    assert [verb for verb, _ in commands()] == ["train", "prepare", "train", "sample", "evaluate", "report",
                                                  "prepare"]
    for verb, flags in commands():
        done = subprocess.run([sys.executable, "-m", f"tfusion.{verb}", *flags.split()], cwd=tmp_path, env=env,
                              capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, (verb, done.stderr[-2000:])
    assert "1 of 58 records cannot be read and are left out" in done.stderr
    counts = {split: len(Split(tmp_path / "runs/both/data", "photos", split))
              for split in ("train", "heldout")}
    assert sum(counts.values()) == 59 and min(counts.values()) > 0
    run = tmp_path / "runs/own/transfusion"
    assert list((run / "samples").glob("*.png")) and "grey" in (run / "report.html").read_text()
