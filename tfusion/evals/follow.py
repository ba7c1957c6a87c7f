"""Watches a run and has every new checkpoint evaluated, until the run is done."""

from collections.abc import Callable, Iterator
from pathlib import Path

from tfusion.checkpoint import Checkpoints
from tfusion.errors import UserError
from tfusion.paths import replace_bytes, replace_text

STEPS = "steps"  # evaluation/steps/<step>: the evaluation of each checkpoint
DONE = "metrics.json"


def steps_of(workdir: Path) -> list[int]:
    """Those of its whole checkpoints, in order; none as long as the folder is not there."""
    return Checkpoints(workdir).steps() if (workdir / "checkpoints").is_dir() else []


def publish(step_folder: Path, folder: Path) -> None:
    """Makes a step's evaluation the newest: its files in `folder`, metrics.json last."""
    for path in files_below(step_folder):
        if path != step_folder / DONE:
            copy = folder / path.relative_to(step_folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            replace_bytes(copy, path.read_bytes())
    replace_text(folder / DONE, (step_folder / DONE).read_text())


def files_below(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        yield from files_below(path) if path.is_dir() else [path]


def follow(workdir: Path, evaluate: Callable[[int, Path], object], wait: Callable[[], object],
           list_steps: Callable[[Path], list[int]] = steps_of) -> None:
    """Calls `evaluate(step, folder)` for each checkpoint that has none of evaluation/steps/<step>/metrics.json,
    and `wait()` when there is nothing to do. Ends when summary.json is there and all is evaluated.

    A checkpoint that is gone before it could be read is named and passed over.
    """
    folder, gone = workdir / "evaluation", set()
    while True:
        finished = (workdir / "summary.json").exists()  # before the steps are listed: so the last is among them
        new = [step for step in list_steps(workdir)
               if step not in gone and not (folder / STEPS / str(step) / DONE).exists()]
        for step in new:
            place = folder / STEPS / str(step)
            try:
                evaluate(step, place)
            except (UserError, OSError):
                if step in list_steps(workdir):  # else deleted meanwhile
                    raise
                print(f"step {step}: the checkpoint is gone, it is not evaluated")
                gone.add(step)
            else:
                publish(place, folder)
        if not new:
            if finished:
                return
            wait()
