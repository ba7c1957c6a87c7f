"""A sweep of a few points on a tiny experiment, and verbs that take no time."""

import sys

import pytest

from tfusion import experiment
from tfusion.scaling import points, runner

EXPERIMENT = '''
from experiments import quickstart


def get_config(arg=None):
    config = quickstart.get_config("smoke")
    if arg == "wide":
        config.model.d_model = 256
    elif arg:
        raise ValueError(f"unknown variant '{arg}'")
    return config


def get_sweep(arg=None):
    return SWEEP
'''
SWEEP = """[
    dict(name="data", config="FILE", verbs=["prepare"], overrides={"data.prepared": "{data}/made"},
         flags={"prepare": {"codec": "codec.npz"}}),
    dict(name="a", config="FILE", overrides={"data.prepared": "{data}/made", "seed": 1},
         tags={"part": "ladder"}),
    dict(name="b", config="FILE:wide", overrides={"data.prepared": "{data}/made"},
         flags={"evaluate": {"number": 8}}),
]"""


class Sweep:
    """The experiment file in a folder, and its sweep frozen beside it."""

    def __init__(self, folder):
        self.path, self.out = folder / "tiny.py", folder / "sweep"
        self.write(SWEEP)

    def write(self, sweep: str, experiment: str = EXPERIMENT) -> None:
        self.path.write_text(experiment.replace("SWEEP", sweep).replace("FILE", str(self.path)))

    def make(self) -> list:
        return points.make(experiment.call(str(self.path), "get_sweep"), "tiny", self.out)

    def freeze(self) -> dict:
        made = self.make()
        points.freeze(self.out, made)
        return {point.name: point for point in made}


@pytest.fixture
def sweep(tmp_path):
    return Sweep(tmp_path)


DONE = """
import json, os, pathlib, sys, time
verb, steps = sys.argv[1], int(sys.argv[4])
folder, prepared = map(pathlib.Path, sys.argv[2:4])
with open(folder.parent / "calls", "a") as file:
    file.write(f"{folder.name} {verb}\\n")
BEFORE
def write(path, tree):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))
if verb == "prepare": write(prepared / "meta.json", {})
if verb == "train": write(folder / "summary.json", {"steps": steps})
if verb == "evaluate": write(folder / "evaluation" / "metrics.json", {"step": steps})
"""


@pytest.fixture
def verbs(sweep, monkeypatch):
    """verbs(code): every verb is a script that notes its call in OUT/calls, runs the code and leaves what the
    real one leaves last. Returns what was called so far."""
    def begin(before: str = ""):
        def command(point, verb, named, results=None):
            prepared = points.place(point.resolved["data"]["prepared"], named)
            return [sys.executable, "-S", "-c", DONE.replace("BEFORE", before), verb, point.workdir, prepared,
                    str(point.resolved["train"]["num_steps"])]
        monkeypatch.setattr(runner, "command", command)

    monkeypatch.setattr(runner, "POLL_S", 0.02)
    return begin


@pytest.fixture
def calls(sweep):
    return lambda: (sweep.out / "calls").read_text().splitlines() if (sweep.out / "calls").exists() else []
