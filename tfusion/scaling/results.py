"""What is kept of a finished point of a sweep, without its weights: small enough to be committed, and enough to
draw the comparison anew, and for another machine to know that the point is done.

    <results>/<point>/result.json    the point and the identity of its data; written last
        config.json summary.json timing.json     metrics.jsonl, thinned
        evaluation/metrics.json, timing.json, scenes/drawn.jsonl, told.jsonl     samples.png
    <results>/<point of data>/result.json, codec.npz     its image tokenizer: trained anew on another machine it
        has other bits, and runs on the two cannot be compared
"""

import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from tfusion.errors import UserError
from tfusion.paths import replace_bytes, replace_text
from tfusion.training.writers import logged
from tfusion.workdir import CODEC

POINTS = "points.jsonl"  # of a sweep: a line each
RESULT, LOG = "result.json", "metrics.jsonl"
OUTCOME = "sweep.json"  # what a point's last verb came to, where a sweep ran it
SUMMARY, EVALUATION = "summary.json", "evaluation/metrics.json"  # written last by training, by an evaluation
DONE = ("config.json", SUMMARY, EVALUATION)  # a run that has these is trained and evaluated
COPIED = (*DONE, "timing.json", "evaluation/timing.json", "evaluation/scenes/drawn.jsonl",
          "evaluation/scenes/told.jsonl")
LINES = 100  # of the log that are kept, besides those of evaluations
ACROSS, SAMPLES = 8, 32  # pictures in samples.png


def read_json(path: Path) -> dict | None:
    """None where it is absent or broken: a process that was killed leaves such."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def is_whole(folder: Path, steps: int | None = None) -> bool:
    """Whether a folder holds a run that is trained to its end, of so many steps, and was evaluated there."""
    summary, evaluation = (read_json(folder / name) for name in (SUMMARY, EVALUATION))
    return bool(summary and evaluation and (folder / "config.json").is_file()
                and evaluation.get("step") == summary["steps"] == (steps or summary["steps"]))


def kept(results: Path, name: str, config_hash: str) -> Path | None:
    """The folder where a point's finished run is kept; None where none is, or of another configuration. Of one
    that is not to be evaluated (an image tokenizer's) the summary says that it was finished."""
    point = _kept_point(folder := results / name, config_hash)
    if point and "evaluate" not in point.get("verbs", ["evaluate"]):
        return folder if (folder / SUMMARY).is_file() else None
    return folder if point and is_whole(folder) else None


def kept_codec(results: Path, name: str, config_hash: str) -> Path | None:
    """The image tokenizer that is kept of a point that prepares data."""
    path = results / name / CODEC
    return path if _kept_point(results / name, config_hash) and path.is_file() else None


def prepared_codec(workdir: Path) -> Path | None:
    """The image tokenizer of the data that a point has prepared in a folder of its workdir."""
    return next((path for path in workdir.glob(f"*/{CODEC}") if (path.parent / "meta.json").is_file()), None)


def _kept_point(folder: Path, config_hash: str) -> dict | None:
    found = read_json(folder / RESULT)
    return found["point"] if found and found["point"]["config_hash"] == config_hash else None


def flat(tree, prefix: str = "") -> dict:
    """{dotted key: value} of JSON values."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {key: value for name, x in tree.items() for key, value in flat(x, f"{prefix}{name}.").items()}


def other_config(workdir: Path, point: dict) -> str:
    """What the run in a point's workdir is configured otherwise than the point, in a few words; "" of nothing.
    Values that name other points' workdirs are not compared; a run has made its paths absolute."""
    found = read_json(workdir / "config.json")
    if found is None or "resolved" not in point:
        return ""
    have, wanted = flat(found), flat(point["resolved"])
    other = [f"{key} = {have.get(key)}, not {value}" for key, value in sorted(wanted.items())
             if have.get(key) != value and not (isinstance(value, str) and _same_path(value, have.get(key)))]
    return f"{', '.join(other[:2])}{' ...' * (len(other) > 2)}"


def _same_path(frozen: str, kept) -> bool:
    """Whether a text may be a path that the run made absolute, or that of another point's workdir."""
    return "{" in frozen or (isinstance(kept, str) and os.path.isabs(kept)
                             and kept.endswith(f"/{os.path.normpath(frozen)}"))


def log_lines(folder: Path) -> list[dict]:
    """Of its metrics.jsonl; of a line that is broken nothing."""
    found = []
    for line in (logged(folder) or "").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict)]


def why_not(workdir: Path, point: dict) -> str:
    """Of a point that is not finished: how far its workdir has come, and what the last verb failed of."""
    summary, evaluation, outcome = (read_json(workdir / name) for name in (SUMMARY, EVALUATION, OUTCOME))
    if other := other_config(workdir, point):
        return f"its workdir holds another run ({other}): move it away"
    if outcome and outcome.get("status"):
        return f"{outcome['verb']} ended with {outcome['status']}: {outcome['why']}".rstrip(": ")
    if summary and evaluation:
        return f"trained to step {summary['steps']}, evaluated at step {evaluation.get('step')}"
    if summary:
        return "trained, not evaluated"
    steps = [line["step"] for line in log_lines(workdir) if "step" in line]
    if not steps:
        return "begun, nothing logged" if workdir.is_dir() else "not begun"
    config, step = read_json(workdir / "config.json") or {}, steps[-1]
    return f"stopped or under way at step {step} of {config.get('train', {}).get('num_steps', '?')}"


def identity(folder: Path) -> dict:
    """{what: fingerprint} of the data that a finished run was trained on; {} where nothing says so."""
    if kept := read_json(folder / RESULT):
        return kept["identity"]
    if not (folder / "checkpoints").is_dir():
        return {}
    from tfusion.checkpoint import Checkpoints  # here: reports need no JAX

    checkpoints = Checkpoints(folder)
    steps = checkpoints.steps()
    return checkpoints.meta(steps[-1]).get("identity", {}) if steps else {}


def thinned(text: str, lines: int = LINES) -> str:
    """A log with at most so many lines, the last among them, and every line with held-out values."""
    rows = text.splitlines()
    chosen = set(np.linspace(0, len(rows) - 1, min(lines, len(rows))).round().astype(int).tolist())
    return "".join(f"{row}\n" for i, row in enumerate(rows) if i in chosen or '"eval/' in row)


def samples(folder: Path) -> bytes | None:
    """A sheet of the first pictures that were drawn, as PNG; None of a run that drew none."""
    cards = [folder / "evaluation" / name / "card.npz" for name in ("scenes", "drawn")]
    for path in (path for path in cards if path.is_file()):
        with np.load(io.BytesIO(path.read_bytes())) as arrays:  # it may lie in a bucket
            drawn = arrays["drawn"][:SAMPLES]
        drawn = drawn[: len(drawn) // ACROSS * ACROSS or None]
        sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in
                                (drawn[i : i + ACROSS] for i in range(0, len(drawn), ACROSS))])
        buffer = io.BytesIO()
        Image.fromarray(sheet).save(buffer, "PNG", optimize=True)
        return buffer.getvalue()
    return None


def keep(point: dict, workdir: Path, results: Path) -> Path:
    """Copies what is kept of a point, finished in its workdir, to results/<name>.

    point: a line of points.jsonl. Raises UserError where another configuration's run is kept there.
    """
    place = results / point["name"]
    found = read_json(place / RESULT)
    if found and found["point"]["config_hash"] != point["config_hash"]:
        raise UserError(f"{place} is of another configuration than {point['name']} has now: name another "
                        "--results, or delete it")
    files = {name: workdir / name for name in COPIED}
    if "prepare" in point.get("verbs", ()) and (codec := prepared_codec(workdir)):
        files[CODEC] = codec
    for name, path in files.items():
        if path.is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            replace_bytes(place / name, path.read_bytes())
    if log := logged(workdir):
        replace_text(place / LOG, thinned(log))
    if sheet := samples(workdir):
        replace_bytes(place / "samples.png", sheet)
    replace_text(place / RESULT, json.dumps({"point": point, "identity": identity(workdir)}, indent=1) + "\n")
    return place
