"""How far a point of a sweep is: read from its workdir alone, whoever works there."""

import json
from pathlib import Path
from typing import NamedTuple

from tfusion import config, workdir
from tfusion.errors import PREEMPTED
from tfusion.objectives import make_objective
from tfusion.paths import replace_text
from tfusion.scaling.points import Point, place
from tfusion.scaling.results import EVALUATION, OUTCOME, SUMMARY, kept, other_config, read_json
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


def configured(point: Point, points: dict[str, Point]) -> config.RunConfig:
    """Its config, other points' names replaced by their workdirs."""
    named = {key: place(value, points) for key, value in point.overrides.items()}
    return config.changed(config.from_dict(point.resolved), named)


def _prepared(folder: Path, cfg) -> bool:
    return (Path(cfg.data.prepared) / "meta.json").is_file()


def _trained(folder: Path, cfg) -> bool:
    return (read_json(folder / SUMMARY) or {}).get("steps") == cfg.train.num_steps


def _evaluated(folder: Path, cfg) -> bool:
    return (read_json(folder / EVALUATION) or {}).get("step") == cfg.train.num_steps


DONE = {"prepare": _prepared, "train": _trained, "evaluate": _evaluated}  # what a verb writes last


def next_verb(point: Point, points: dict[str, Point]) -> str:
    """The first of its verbs that is not done; "" where all are."""
    cfg, folder = configured(point, points), point.folder
    return next((verb for verb in point.verbs if not DONE[verb](folder, cfg)), "")


def note(folder: Path, verb: str, status: int, why: str) -> None:
    """Leaves what a verb came to."""
    replace_text(folder / OUTCOME, json.dumps({"verb": verb, "status": status, "why": why}) + "\n")


def state(point: Point, points: dict[str, Point], results: Path | None = None) -> State:
    """results: where what is kept of finished runs stands, also of another machine's (results.py)."""
    steps = point.resolved["train"]["num_steps"] if "train" in point.verbs else 0
    if results and kept(results, point.name, point.config_hash):
        return State(FINISHED, "", steps, steps, None, {}, "")
    folder, verb = point.folder, next_verb(point, points)
    outcome, lines = read_json(folder / OUTCOME) or {}, _logged(folder)
    step = lines[-1]["step"] if lines else 0
    other = other_config(folder, point._asdict())
    failed, why = outcome.get("status", 0) != 0, outcome.get("why", "")
    if other:
        why = f"its workdir holds another run ({other}): move it away"
    held = any(workdir.is_held(folder / name) for name in (workdir.LOCK, LOCK))
    if held:
        what = RUNNING
    elif other:
        what = FAILED
    elif not verb:
        what = FINISHED
    elif failed:
        what = INTERRUPTED if outcome["status"] == PREEMPTED else FAILED
    else:
        what = STOPPED if folder.is_dir() else WAITING
    return State(what, verb, step, steps, _eta(lines, steps) if what == RUNNING and verb == "train" else None,
                 _losses(point, lines), why if what == FAILED else "")


def _logged(folder: Path) -> list[dict]:
    """The last lines of its metrics.jsonl; of a line that is broken nothing."""
    found = []
    for line in (logged(folder) or "").splitlines()[-RECENT:]:
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
    """The newest of each loss that it trains on: in training, and held out."""
    names = list(make_objective(config.from_dict(point.resolved)).weights) if lines else []
    found = {}
    for line in lines:
        found |= {key: line[key] for name in names for key in (f"train/{name}", f"eval/{name}")
                  if line.get(key) is not None}
    return found
