"""Reads the files that a run leaves behind, and says plainly which one is not there."""

import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from tfusion import paths
from tfusion.training.writers import logged

LOG, CONFIG, SUMMARY, TIMING = "metrics.jsonl", "config.json", "summary.json", "timing.json"
GOODPUT = "goodput.json"
EVALUATION = "evaluation"
FIGURES = f"{EVALUATION}/metrics.json"
STEPS = f"{EVALUATION}/steps"
Made = TypeVar("Made")

# Which command writes the files below a run's folder; the longest prefix that fits counts.
MADE_BY = {"": "python -m tfusion.train --config=experiments/FILE.py --workdir={root}",
           f"{EVALUATION}/": "python -m tfusion.evaluate --workdir={root}"}


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
    """The files of one run, of any kind. Readers raise `Missing` for what is absent; `notes` collects what
    was left out of the page for that reason, as (title, reason)."""

    def __init__(self, root: Path):
        self.root, self.name = root, root.resolve().name
        self.notes: list[tuple[str, str]] = []
        self._log: list[dict[str, Any]] | None = None

    def path(self, name: str) -> Path:
        """The path of file `name`, which must exist."""
        path = self.root / name
        if not path.is_file():
            prefix = max((p for p in MADE_BY if name.startswith(p)), key=len)
            raise Missing(f"{path} is missing; `{MADE_BY[prefix].format(root=self.root)}` makes it")
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

    def log(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without a last one that is still being written; read once."""
        if self._log is None:
            whole, rows = logged(self.root), []
            path = self.path(LOG) if whole is None else self.root / LOG
            for number, line in enumerate((whole or "").splitlines(), start=1):
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise ReportError(f"{path}, line {number} is not JSON: {error}") from error
            self._log = rows
        return self._log

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """Every array of an .npz file."""
        path = self.path(name)
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                return {key: file[key] for key in file.files}
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise ReportError(f"{path} is not a readable .npz file: {error}") from error

    def series(self, key: str) -> Series:
        """The finite values of `key` in the log, in the order of their steps."""
        points = {row["step"]: row[key] for row in self.log()
                  if row.get(key) is not None and math.isfinite(row[key])}
        if not points:
            raise Missing(f"{self.root / LOG} holds no value of {key}")
        steps = sorted(points)
        return Series(np.array(steps, float), np.array([points[s] for s in steps], float))

    def optional_series(self, key: str) -> Series | None:
        """The series, or None where the log is absent or holds no value of `key`."""
        try:
            return self.series(key)
        except Missing:
            return None

    def logged(self, prefix: str) -> list[str]:
        """What follows the prefix in the names of all that was logged, with at least one value."""
        found = {key for row in self.log() for key, value in row.items()
                 if key.startswith(prefix) and value is not None}
        return sorted(key.removeprefix(prefix) for key in found)

    def attempt(self, title: str, build: Callable[["RunFiles"], Made], otherwise: Made = "") -> Made:
        """What `build` makes of these files; nothing, and a note, when something is missing."""
        try:
            return build(self)
        except Missing as error:
            self.notes.append((title, str(error)))
            return otherwise

    def figures(self) -> dict[str, dict[str, Any]]:
        """Every figure of the newest evaluation, by name."""
        return self.json(FIGURES)["metrics"]

    def evaluated_steps(self) -> dict[int, dict[str, dict[str, Any]]]:
        """{step: its figures} of the checkpoints that were evaluated one by one, in order."""
        paths = (self.root / STEPS).glob("[0-9]*/metrics.json")
        steps = sorted(int(path.parent.name) for path in paths if path.parent.name.isdecimal())
        found = {step: self.optional_json(f"{STEPS}/{step}/metrics.json", "metrics") for step in steps}
        return {step: evaluation["metrics"] for step, evaluation in found.items() if evaluation}

    def data(self) -> Path | None:
        """The folder of prepared data that the run was trained from, where it is still there."""
        config = self.optional_json(CONFIG) or {}
        prepared = config.get("data", {}).get("prepared")
        return Path(prepared) if prepared and Path(prepared).is_dir() else None

    def codec_run(self) -> "RunFiles | None":
        """The run that trained the codec of the data's pictures, where they say which, and it is there."""
        data = self.data()
        meta = RunFiles(data).optional_json("meta.json") if data else None
        root = paths.path((meta or {}).get("codec_run") or "/nowhere")
        return RunFiles(root) if logged(root) and root.resolve() != self.root.resolve() else None

    def stages(self) -> list[dict[str, Any]]:
        """Every timed stage behind this run, in order, with the part it belongs to; perhaps none."""
        data, codec = self.data(), self.codec_run()
        parts = [(codec.name, codec, TIMING)] if codec else []
        parts += [("data", RunFiles(data), TIMING)] if data else []
        parts += [(self.name, self, TIMING), ("evaluation", self, f"{EVALUATION}/{TIMING}")]
        return [{"part": part, **stage} for part, files, name in parts
                if (timing := files.optional_json(name, "stages")) for stage in timing["stages"]]


def series_of(steps, values) -> Series:
    return Series(np.array(list(steps), float), np.array(list(values), float))


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
