"""How far a point of a sweep is: read from its workdir alone, whoever works there."""

import contextlib
import json
from pathlib import Path
from typing import NamedTuple

from tfusion import config, paths, workdir
from tfusion.errors import PREEMPTED, UserError
from tfusion.objectives import make_objective
from tfusion.paths import replace_text
from tfusion.scaling.points import Point, place
from tfusion.scaling.results import EVALUATION, OUTCOME, SUMMARY, kept, other_config, read_json
from tfusion.training import goodput
from tfusion.training.writers import logged

LOCK, LOG = "sweep.lock", "sweep.log"  # of who runs its verbs
STATES = FINISHED, RUNNING, FAILED, INTERRUPTED, STOPPED, WAITING = (
    "finished", "running", "failed", "preempted", "stopped", "waiting")
RECENT = 20  # lines of the log that a pace is taken of


class State(NamedTuple):
    what: str  # finished, running, failed, preempted, stopped (begun, and nobody is at it), waiting (not begun)
    verb: str  # the next one, or the one under way; "" where none is left
    step: int  # of training
    steps: int
    eta: float | None  # seconds that training takes yet, where it is under way and has a pace
    losses: dict  # the last ones that training logged
    why: str  # of a failure
    goodput: float | None = None  # share of the training's wall time that went into steps
    restarts: int | None = None  # how often training was begun again


def _prepared(point: Point, points: dict[str, Point]) -> bool:
    return (paths.path(place(point.resolved["data"]["prepared"], points)) / "meta.json").is_file()


def _trained(point: Point, points: dict[str, Point]) -> bool:
    return (read_json(point.folder / SUMMARY) or {}).get("steps") == point.resolved["train"]["num_steps"]


def _evaluated(point: Point, points: dict[str, Point]) -> bool:
    return (read_json(point.folder / EVALUATION) or {}).get("step") == point.resolved["train"]["num_steps"]


DONE = {"prepare": _prepared, "train": _trained, "evaluate": _evaluated}  # by what a verb writes last


def verbs_left(point: Point, points: dict[str, Point]) -> list[str]:
    """Its verbs that are not done, in their order."""
    return [verb for verb in point.verbs if not DONE[verb](point, points)]


def next_verb(point: Point, points: dict[str, Point]) -> str:
    """The first of them; "" where all are done."""
    return next(iter(verbs_left(point, points)), "")


def note(folder: Path, verb: str, status: int, why: str) -> None:
    """Leaves what a verb came to."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / OUTCOME, json.dumps({"verb": verb, "status": status, "why": why}) + "\n")


def outcome(point: Point) -> dict:
    """What the last of its verbs that ended came to: {verb, status, why}; {} where none is known to have."""
    return read_json(point.folder / OUTCOME) or {}


def state(point: Point, points: dict[str, Point], results: Path | None = None) -> State:
    """results: where what is kept of finished runs stands, also of another machine's (results.py)."""
    steps = point.resolved["train"]["num_steps"] if "train" in point.verbs else 0
    if results and kept(results, point.name, point.config_hash):
        return State(FINISHED, "", steps, steps, None, {}, "")
    folder, verb = point.folder, next_verb(point, points)
    last, lines = outcome(point), _logged(folder)
    step = lines[-1]["step"] if lines else 0
    why, other = last.get("why", ""), other_config(folder, point._asdict())
    if other:
        why = f"its workdir holds another run ({other}): move it away"
    held = any(workdir.is_held(folder / name) for name in (workdir.LOCK, LOCK))
    if held:
        what = RUNNING
    elif other:
        what = FAILED
    elif not verb:
        what = FINISHED
    elif last.get("status", 0) != 0:
        what = INTERRUPTED if last["status"] == PREEMPTED else FAILED
    else:
        what = STOPPED if folder.is_dir() else WAITING
    return State(what, verb, step, steps, _eta(lines, steps) if what == RUNNING and verb == "train" else None,
                 _losses(point, lines), why if what == FAILED else "",
                 *(goodput.of_run(folder) or (None, None)))


def _logged(folder: Path) -> list[dict]:
    """The last lines of its metrics.jsonl; of a line that is broken nothing."""
    found = []
    for line in (logged(folder, RECENT) or "").splitlines()[-RECENT:]:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict) and {"step", "time"} <= line.keys()]


def _eta(lines: list[dict], steps: int) -> float | None:
    """By the pace of the last lines. A run that was interrupted among them looks slow until they are past."""
    if len(lines) < 2 or lines[-1]["step"] == lines[0]["step"]:
        return None
    pace = (lines[-1]["time"] - lines[0]["time"]) / (lines[-1]["step"] - lines[0]["step"])
    return pace * (steps - lines[-1]["step"])


def _losses(point: Point, lines: list[dict]) -> dict:
    """The newest of each loss that it trains on: in training, and held out; none of a kind of training that its
    experiment registers."""
    names, found = [], {}
    with contextlib.suppress(UserError):
        names = list(make_objective(config.from_dict(point.resolved)).weights) if lines else []
    for line in lines:
        found |= {key: line[key] for name in names for key in (f"train/{name}", f"eval/{name}")
                  if line.get(key) is not None}
    return found
