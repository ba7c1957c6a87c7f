"""Where the numbers of a run go: one interface, any number of files and services behind it."""

import json
import math
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import Protocol

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from tfusion import paths
from tfusion.config import RunConfig
from tfusion.errors import UserError
from tfusion.paths import replace_text

LINES, PART = "metrics.jsonl", "metrics.{step:012d}.jsonl"  # the latter in buckets, by a part's first step
FLUSH_SECONDS = 60  # in a bucket, between two parts


class Writer(Protocol):
    """Takes {name: int, float or None} of one step; steps ascend, each comes once."""

    def write(self, step: int, values: dict) -> None: ...

    def flush(self) -> None:
        """Returns when all that was written is where others find it."""

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: a line a step, each one flat JSON object with "step" and "time" (Unix seconds, UTC).

    Floats have 7 digits, integers all; null is a mean over nothing, or a number that is not finite.
    """

    def __init__(self, folder: Path, first_step: int):
        _drop_after(paths.path(folder / LINES), first_step)
        self._waiting, self._file = b"", open(folder / LINES, "ab", buffering=0)  # noqa: SIM115 (until close)

    def write(self, step: int, values: dict) -> None:
        self._waiting += _line(step, values).encode()
        self.flush()

    def flush(self) -> None:
        """What a full disk does not take waits for the next time."""
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting):]

    def close(self) -> None:
        with self._file:
            self.flush()


class JsonParts:
    """The same in a bucket, as metrics.<first step>.jsonl: one more file per flush, the lines of a minute."""

    def __init__(self, folder: Path, first_step: int):
        self._folder, self._lines = folder, []
        for part in reversed(_parts(folder)):
            if not _drop_after(part, first_step):
                break  # those before it are of earlier steps

    def write(self, step: int, values: dict) -> None:
        self._lines.append((step, _line(step, values)))

    def flush(self) -> None:
        if self._lines:
            part = self._folder / PART.format(step=self._lines[0][0])
            part.write_text("".join(line for _, line in self._lines))
        self._lines = []

    def close(self) -> None:
        self.flush()


def logged(folder, last: float = math.inf) -> str | None:
    """What was logged of a run, as text, whole lines alone; of a bucket's parts as few as hold `last` lines.
    None where nothing was."""
    texts, folder = [], paths.path(folder)
    for path in reversed((folder / LINES, *_parts(folder))):
        if sum(text.count("\n") for text in texts) < last and path.is_file():
            text = path.read_bytes().decode(errors="replace")
            texts.insert(0, text[: text.rfind("\n") + 1])
    return "".join(texts) if texts else None


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob(PART.replace("{step:012d}", "[0-9]*")))


def _line(step: int, values: dict) -> str:
    line = {"step": step, "time": round(time.time(), 3)} | {k: _rounded(v) for k, v in values.items()}
    return json.dumps(line, allow_nan=False) + "\n"


def _drop_after(path: Path, step: int) -> bool:
    """A resumed run writes the steps after its checkpoint again: the old lines go, and so does what a killed
    writer or a full disk left of one. Returns whether there were any."""
    lines = path.read_bytes().decode(errors="replace").splitlines() if path.exists() else []
    kept = [line for line in lines if _step(line) <= step]
    if not kept and paths.in_bucket(path):
        path.unlink(missing_ok=True)
    elif lines:
        replace_text(path, "".join(line + "\n" for line in kept))
    return len(kept) < len(lines)


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
    """Event files; a resumed run hides the old points after its checkpoint. In a bucket a file per flush, which
    TensorBoard reads one after the other."""

    def __init__(self, folder: Path, first_step: int):
        self._folder, self._file = folder, None
        self._beside = tempfile.TemporaryDirectory() if paths.in_bucket(folder) else None
        self._put(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def _put(self, event: Event) -> None:
        """Where it cannot be written, the next one begins another file: of this one half may be there."""
        place = Path(self._beside.name if self._beside else self._folder)
        try:
            if self._file is None:
                place.mkdir(parents=True, exist_ok=True)
                self._file = EventsWriter(str(place / "events"), f".{secrets.token_hex(4)}")
            event.wall_time = time.time()
            self._file.write_event(event)
            self._file.flush()
        except OSError:
            self._file = None
            for empty in (path for path in place.glob("events.*") if not path.stat().st_size):
                empty.unlink()
            raise

    def write(self, step: int, values: dict) -> None:
        points = [Summary.Value(tag=name, simple_value=value) for name, value in finite(values).items()]
        self._put(Event(step=step, summary=Summary(value=points)))

    def flush(self) -> None:
        if self._beside and self._file:
            self._file.close()
            self._file = None
        for path in Path(self._beside.name).iterdir() if self._beside else ():
            (self._folder / path.name).write_bytes(path.read_bytes())
            path.unlink()

    def close(self) -> None:
        self.flush()
        if self._file:
            self._file.close()
        if self._beside:
            self._beside.cleanup()


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
        name = path.read_bytes().decode(errors="replace").strip() if path.exists() else ""
        if not (name.isascii() and name.isalnum()):
            name = secrets.token_hex(4)
            replace_text(path, name + "\n")
        try:
            folder = None if paths.in_bucket(workdir) else str(workdir)
            self._run = wandb.init(project=project, id=name, name=workdir.name, resume="allow",
                                   dir=folder, config=cfg.to_dict(), allow_val_change=True,
                                   settings=wandb.Settings(console="off"))
        except wandb.Error as e:
            raise UserError(f"--wandb={project}: {e}; `wandb login` first, or set WANDB_MODE=offline") from e

    def write(self, step: int, values: dict) -> None:
        self._run.log(finite(values), step=step)

    def flush(self) -> None:
        pass  # it uploads by itself

    def close(self) -> None:
        self._run.finish(exit_code=int(sys.exc_info()[0] is not None))  # closed on the way out of a failure?


class Together:
    """Several writers as one, flushed once a minute. What one cannot write is said, once until it can again,
    and stops neither the others nor the run."""

    def __init__(self, *writers: Writer):
        self._writers, self._flushed, self._failing = writers, time.monotonic(), set()

    def write(self, step: int, values: dict) -> None:
        self._each(lambda writer: writer.write(step, values))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._each(lambda writer: writer.flush())
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._each(lambda writer: writer.close())

    def _each(self, call) -> None:
        for writer in self._writers:
            try:
                call(writer)
                self._failing.discard(writer)
            except Exception as e:  # of a disk, a bucket's client, a service
                if writer not in self._failing:
                    tqdm.write(f"warning: {type(writer).__name__} cannot be written ({type(e).__name__}: {e}); "
                               "the run goes on", file=sys.stderr)
                self._failing.add(writer)


def open_writers(workdir: Path, first_step: int, cfg: RunConfig, wandb: str | None = None) -> Writer:
    """metrics.jsonl and TensorBoard's events in the workdir, going on after `first_step`; and the project
    `wandb` of Weights & Biases."""
    services = [WeightsAndBiases(wandb, workdir, cfg)] if wandb else []  # first: it may refuse
    lines = JsonParts if paths.in_bucket(workdir) else JsonLines
    return Together(lines(workdir, first_step), TensorBoard(workdir / "tensorboard", first_step), *services)
