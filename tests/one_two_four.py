"""One process, two and four on the same mesh of eight CPU devices compute the same numbers.

  python -m tests.one_two_four        prints the rows of docs/processes.md, minutes

Trains a small Transfusion for 20 steps from the same seed: data 2 x fsdp 2 x tensor 2.
"""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests import golden, processes
from tests.test_errors import write_experiment
from tfusion import config

STEPS, DEVICES = 20, 8


def experiment(folder: Path) -> None:
    golden.write_data(folder / "data")
    tree = golden.tiny_tree(folder / "data")
    tree.mesh.update(data=2, fsdp=2, tensor=2)
    tree.model.num_layers = 1
    tree.train.update(num_steps=STEPS, num_microbatches=1, checkpoint_every=STEPS)
    write_experiment(folder, config.from_dict(tree))


def train(folder: Path, n: int) -> list[dict]:
    workdir = folder / f"run{n}"
    with processes.running(n, "tfusion.train", f"--config={folder / 'tiny.py'}", f"--workdir={workdir}",
                           devices_per_process=DEVICES // n, JAX_DISABLE_MOST_OPTIMIZATIONS="1") as started:
        processes.succeed(started, 3600)
    return golden.read_metrics(workdir)


def difference(a: dict, b: dict, names) -> float:
    return max(abs(a[name] - b[name]) / abs(a[name]) for name in names)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        experiment(Path(folder))
        one = train(Path(folder), 1)
        losses = ("lm_loss", "diffusion_loss")
        print("| processes x devices | losses of step 1 | gradient's norm of step 1 | losses of 20 steps |")
        print("|---|---|---|---|")
        for n in (2, 4):
            many = train(Path(folder), n)
            figures = (difference(one[0], many[0], losses), difference(one[0], many[0], ["grad_norm"]),
                       max(difference(a, b, losses) for a, b in zip(one, many, strict=True)))
            row = [f"{n} x {DEVICES // n}", *(f"{figure:.1e}" for figure in figures)]
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
