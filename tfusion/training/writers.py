"""Where the numbers of a run go: one interface, any number of files and services behind it."""

import json
import math
import time
from pathlib import Path
from typing import Protocol

from tensorboardX import SummaryWriter

from tfusion.config import replace_text


class Writer(Protocol):
    """Takes {name: int, float or None} of one step; steps ascend, each comes once."""

    def write(self, step: int, values: dict) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: a line a step, each one flat JSON object with "step" and "time" (Unix seconds, UTC).

    Floats have 7 digits, integers all; null is a mean over nothing, or a number that is not finite.
    """

    def __init__(self, path: Path, first_step: int):
        self._drop_after(path, first_step)
        self._file = path.open("a")

    @staticmethod
    def _drop_after(path: Path, step: int) -> None:
        """A resumed run writes the steps after its checkpoint again: the old lines go, and so does what a
        killed writer or a full disk left of one."""
        if path.exists():
            lines = path.read_text(errors="replace").splitlines()
            replace_text(path, "".join(line + "\n" for line in lines if _step(line) <= step))

    def write(self, step: int, values: dict) -> None:
        line = {"step": step, "time": round(time.time(), 3)} | {k: _rounded(v) for k, v in values.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step(line: str) -> float:
    """The step of a line; infinity where the line is broken."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return math.inf


def _rounded(value):
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None


class TensorBoard:
    """Event files; a resumed run hides the old points after its checkpoint."""

    def __init__(self, folder: Path, first_step: int):
        self._board = SummaryWriter(str(folder), purge_step=first_step + 1)

    def write(self, step: int, values: dict) -> None:
        for name, value in finite(values).items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


def finite(values: dict) -> dict:
    """What a curve can show."""
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


class Together:
    """Several writers as one."""

    def __init__(self, *writers: Writer):
        self._writers = writers

    def write(self, step: int, values: dict) -> None:
        for writer in self._writers:
            writer.write(step, values)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def open_writers(workdir: Path, first_step: int) -> Writer:
    """metrics.jsonl and TensorBoard's events in the workdir, going on after `first_step`."""
    return Together(JsonLines(workdir / "metrics.jsonl", first_step),
                    TensorBoard(workdir / "tensorboard", first_step))
