"""Reads the files that a quickstart run leaves behind, and says plainly which one is not there."""

import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TRAIN = "transfusion/metrics.jsonl"
CONFIG = "transfusion/config.json"
AUTOENCODER = "autoencoder/metrics.jsonl"
EVALUATION = "transfusion/evaluation"
METRICS = f"{EVALUATION}/metrics.json"

# Which command writes the files below a folder; the longest prefix that fits counts.
MADE_BY = {
    "": "make quickstart",
    "transfusion/evaluation/": "python -m tfusion.evaluate --workdir={root}/transfusion",
}


class ReportError(Exception):
    """The report cannot be written as asked; the message is one line, fit for the user."""


class Missing(ReportError):
    """A file, or a quantity inside one, is not there; optional parts are left out because of it."""


class Series(NamedTuple):
    """One logged quantity: its finite values (float64) and the steps they were logged at."""

    steps: np.ndarray
    values: np.ndarray

    def near(self, step: float) -> float:
        """The value logged closest to `step`."""
        return float(self.values[np.argmin(np.abs(self.steps - step))])


class RunFiles:
    """The files of one run. Readers raise `Missing` for what is absent; `notes` collects what was
    left out of the page for that reason, as (title, reason)."""

    def __init__(self, root: Path):
        self.root = root
        self.notes: list[tuple[str, str]] = []
        self._lines: dict[str, list[dict[str, Any]]] = {}

    def path(self, name: str) -> Path:
        """The path of file `name`, which must exist."""
        path = self.root / name
        if not path.is_file():
            prefix = max((p for p in MADE_BY if name.startswith(p)), key=len)
            command = MADE_BY[prefix].format(root=self.root)
            raise Missing(f"{path} is missing; `{command}` makes it")
        return path

    def json(self, name: str) -> Any:
        """A JSON file."""
        path = self.path(name)
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise ReportError(f"{path} is not JSON: {error}") from error

    def optional_json(self, name: str, *keys: str) -> dict[str, Any] | None:
        """A JSON object that has these keys; None where the file is absent, and with a note where a killed
        process or a full disk left something else."""
        if not (self.root / name).is_file():
            return None
        try:
            found = json.loads(self.path(name).read_text())
        except ValueError:
            found = None
        if isinstance(found, dict) and all(key in found for key in keys):
            return found
        note = (name, f"{self.root / name} is broken; the next run of its command writes it anew")
        self.notes += [note] if note not in self.notes else []
        return None

    def jsonl(self, name: str) -> list[dict[str, Any]]:
        """A file of one JSON object a line, without a last line that is still being written; read once."""
        if name not in self._lines:
            path = self.path(name)
            rows = []
            whole = path.read_text(errors="replace").rpartition("\n")[0]
            for number, line in enumerate(whole.splitlines(), start=1):
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise ReportError(f"{path}, line {number} is not JSON: {error}") from error
            self._lines[name] = rows
        return self._lines[name]

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """Every array of an .npz file."""
        path = self.path(name)
        try:
            with np.load(path, allow_pickle=False) as file:
                return {key: file[key] for key in file.files}
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise ReportError(f"{path} is not a readable .npz file: {error}") from error

    def judged_images(self, stem: str) -> list[tuple[np.ndarray, dict[str, Any]]]:
        """Pairs of an image from `stem`.npz and the record of the same number in `stem`.jsonl."""
        images = self.arrays(f"{stem}.npz")["images"]
        records = self.jsonl(f"{stem}.jsonl")
        if len(images) != len(records):
            raise ReportError(
                f"{self.root / stem}: {len(images)} images in the .npz but "
                f"{len(records)} lines in the .jsonl; write both anew"
            )
        return list(zip(images, records, strict=True))

    def series(self, name: str, key: str) -> Series:
        """The finite values of `key` in a metrics.jsonl, in the order of their steps."""
        points = {
            row["step"]: row[key]
            for row in self.jsonl(name)
            if row.get(key) is not None and math.isfinite(row[key])
        }
        if not points:
            raise Missing(f"{self.root / name} holds no value of {key}")
        steps = sorted(points)
        return Series(np.array(steps, float), np.array([points[s] for s in steps], float))

    def optional_series(self, name: str, key: str) -> Series | None:
        """The series, or None where the file is absent or holds no value of `key`."""
        try:
            return self.series(name, key)
        except Missing:
            return None

    def sources(self, name: str) -> list[str]:
        """The sources of data whose held-out loss `name` was measured in training."""
        keys = {key for row in self.jsonl(TRAIN) for key in row}
        found = [key.split("/")[1] for key in sorted(keys) if key.endswith(f"/{name}")]
        return [source for source in found if f"eval/{source}/{name}" in keys]

    def attempt(self, title: str, build: Callable[["RunFiles"], str]) -> str:
        """What `build` makes of these files; nothing, and a note, when something is missing."""
        try:
            return build(self)
        except Missing as error:
            self.notes.append((title, str(error)))
            return ""

    def stages(self) -> list[dict[str, Any]]:
        """Every timed stage of the run, in order, with the part it belongs to; perhaps none."""
        found = []
        for part in ("data", "autoencoder", "transfusion", "transfusion/evaluation"):
            if timing := self.optional_json(f"{part}/timing.json", "stages"):
                found += [{"part": part.split("/")[-1], **stage} for stage in timing["stages"]]
        return found


def smooth(series: Series, points: int = 250) -> Series:
    """A running mean over 3 % of the curve, thinned to at most `points` points."""
    half = max(1, round(0.015 * len(series.values)))
    total = np.concatenate([[0.0], np.cumsum(series.values)])
    index = np.arange(len(series.values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(index))
    mean = (total[high] - total[low]) / (high - low)
    keep = np.unique(np.linspace(0, len(index) - 1, min(points, len(index))).round().astype(int))
    return Series(series.steps[keep], mean[keep])


def thin(series: Series, points: int = 400) -> Series:
    """Every n-th value, so that a long run still makes a small page."""
    keep = np.unique(
        np.linspace(0, len(series.steps) - 1, min(points, len(series.steps))).round().astype(int)
    )
    return Series(series.steps[keep], series.values[keep])
