"""Runs the evaluators: all that is asked of a run and can be measured, and a line for what cannot."""

import json
import time
import traceback
from pathlib import Path

import jax

from tfusion.errors import UserError
from tfusion.evals.base import EVALUATORS, NEEDS, LeftOut, Options, lacking
from tfusion.inference.trained import Trained
from tfusion.paths import replace_text
from tfusion.training.metrics import write_timing


def in_order() -> list:
    """The evaluators as they are run: by their order, what another needs before it."""
    found, waiting = [], sorted(EVALUATORS.values(), key=lambda evaluator: (evaluator.order, evaluator.name))
    while waiting:
        names = {evaluator.name for evaluator in waiting}
        ready = next(evaluator for evaluator in waiting if not (names - NEEDS.keys()) & set(evaluator.needs))
        found.append(ready)
        waiting.remove(ready)
    return found


def measure(run: Trained, folder: Path, options: Options) -> dict:
    """{'metrics': figures, 'evaluators': who measured them, 'left_out': {evaluator: why}}; what each has to
    show is written to `folder/<evaluator>`.
    """
    metrics, done, left_out, broken = {}, [], {}, {}
    for evaluator in in_order():
        why = lacking(evaluator, run, done)
        if not why:
            place = folder / evaluator.name
            place.mkdir(parents=True, exist_ok=True)
            try:
                metrics |= evaluator.run(run, place, options)
                done.append(evaluator.name)
            except LeftOut as e:
                why = str(e)
                if not any(place.iterdir()):
                    place.rmdir()
            except UserError:
                raise
            except Exception as e:  # one of many; the others' figures are not to be lost
                traceback.print_exc()
                broken[evaluator.name] = why = f"it failed: {type(e).__name__}: {e}"
        if why:
            left_out[evaluator.name] = why
            print(f"left out: {evaluator.name} ({why})")
    return {"metrics": metrics, "evaluators": done, "left_out": left_out, "broken": broken}


def check_nothing_is_lost(run: Trained, folder: Path) -> None:
    """Raises UserError where what was measured of this very step cannot be now: it would be overwritten."""
    path = folder / "metrics.json"
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        return
    done = before.get("evaluators", ()) if before.get("step") == run.step else ()
    lost = {name: why for name in done if name in EVALUATORS and (why := lacking(EVALUATORS[name], run, done))}
    if lost:
        raise UserError(f"{path} has {', '.join(lost)} of step {run.step}, which cannot be measured now "
                        f"({next(iter(lost.values()))}): mend that, or move {folder} away")


def evaluate(run: Trained, folder: Path, options: Options) -> dict:
    """Measures a run; metrics.json is written last: with it, all is there."""
    began, tree = time.perf_counter(), run.cfg.to_dict()
    check_nothing_is_lost(run, folder)
    folder.mkdir(parents=True, exist_ok=True)
    result = measure(run, folder, options) | {"seed": options.seed, "step": run.step, "jax": jax.__version__}
    result |= {group: tree[group] for group in ("data", "sampling") if group in tree}
    write_timing(folder, "evaluate", time.perf_counter() - began)
    broken = result.pop("broken")
    replace_text(folder / "metrics.json", json.dumps(result, indent=1) + "\n")
    if broken:
        raise UserError(f"{', '.join(broken)} failed (above); what the others measured is in {folder}")
    return result
