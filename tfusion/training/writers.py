"""Where the numbers of a run go: one interface, any number of files and services behind it."""

import contextlib
import json
import math
import secrets
import sys
import time
from pathlib import Path
from typing import Protocol

from tensorboardX import SummaryWriter

from tfusion.config import RunConfig, replace_text
from tfusion.errors import UserError


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


def import_wandb():
    """The package. Raises UserError where it is not installed; a folder of that name is not it."""
    try:
        import wandb
    except ImportError:
        wandb = None
    if not hasattr(wandb, "init"):
        raise UserError("--wandb needs a package that is not installed: pip install '.[wandb]'")
    return wandb


class WeightsAndBiases:
    """A run of Weights & Biases with the config in it; WANDB_MODE=offline keeps it in `<workdir>/wandb`.

    A resumed run goes on under the id kept in `<workdir>/wandb_run_id`. Steps that the service has already it
    keeps as they are: they come out the same, unless the config was changed in between.
    """

    def __init__(self, project: str, workdir: Path, cfg: RunConfig):
        wandb, path = import_wandb(), workdir / "wandb_run_id"
        name = path.read_text(errors="replace").strip() if path.exists() else ""
        if not (name.isascii() and name.isalnum()):
            name = secrets.token_hex(4)
            replace_text(path, name + "\n")
        try:
            self._run = wandb.init(project=project, id=name, name=workdir.name, resume="allow",
                                   dir=str(workdir), config=cfg.to_dict(), allow_val_change=True,
                                   settings=wandb.Settings(console="off"))
        except wandb.Error as e:
            raise UserError(f"--wandb={project}: {e}; `wandb login` first, or set WANDB_MODE=offline") from e

    def write(self, step: int, values: dict) -> None:
        self._run.log(finite(values), step=step)

    def close(self) -> None:
        self._run.finish(exit_code=int(sys.exc_info()[0] is not None))  # closed on the way out of a failure?


class Together:
    """Several writers as one."""

    def __init__(self, *writers: Writer):
        self._writers = writers

    def write(self, step: int, values: dict) -> None:
        for writer in self._writers:
            writer.write(step, values)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # all, even where one fails
            for writer in self._writers:
                stack.callback(writer.close)


def open_writers(workdir: Path, first_step: int, cfg: RunConfig, wandb: str | None = None) -> Writer:
    """metrics.jsonl and TensorBoard's events in the workdir, going on after `first_step`; and the project
    `wandb` of Weights & Biases."""
    services = [WeightsAndBiases(wandb, workdir, cfg)] if wandb else []  # first: it may refuse
    return Together(JsonLines(workdir / "metrics.jsonl", first_step),
                    TensorBoard(workdir / "tensorboard", first_step), *services)
