"""Processes that get SIGTERM, and one that is killed: what they leave, how they end, where the time went."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import processes
from tests.test_resume import lines, saved_steps
from tfusion.errors import PREEMPTED

ROOT = Path(__file__).parents[1]
STEPS, EVERY = 3000, 200

# The toy kind is trained by a verb of its own process; goodput.json is written often enough for a short test.
DRIVER = """
import sys
import tests.toy
from tfusion.errors import run
from tfusion import train
from tfusion.training import goodput, loop
goodput.BEAT_S = 0.2
slow = sys.argv.pop()
real = loop.compile_step if slow == "compile" else loop.Held.evaluate
if slow == "compile":
    import jax, jax.numpy as jnp
    def compile_step(run, *args):
        print("compiling", flush=True)
        x = jnp.ones((8, 8))
        def long(x):
            for k in range(4000):
                x = jnp.sin(x @ x) + k
            return x
        jax.jit(long).lower(x).compile()
        return real(run, *args)
    loop.compile_step = compile_step
if slow == "evaluation":
    import time
    def evaluate(self, state, frozen, ended):
        print("evaluating", flush=True)
        return real(self, state, frozen, lambda losses: time.sleep(0.5) or ended(losses))
    loop.Held.evaluate = evaluate
run(train.main)
"""


class Process:
    """A run of the toy in `workdir`; slow: "compile" or "evaluation", which then says that it begins, and takes
    long."""

    def __init__(self, workdir: Path, slow: str = ""):
        self.workdir, self.log, self.began = workdir, workdir.with_suffix(".log"), time.time()
        keys = dict(num_steps=STEPS, checkpoint_every=EVERY, log_every=20, eval_every=1000, diagnostics_every=0)
        flags = [f"--config={ROOT}/tests/toy.py", f"--workdir={workdir}",
                 *(f"--config.train.{key}={value}" for key, value in keys.items())]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, "-c", DRIVER, *flags, slow], cwd=ROOT, env=env,
                                            stdout=log, stderr=subprocess.STDOUT)

    def wait_for(self, what) -> None:
        """what: a function of this, or a word of its output."""
        deadline = time.monotonic() + 300
        while not (what(self) if callable(what) else what in self.output()):
            assert self.process.poll() is None and time.monotonic() < deadline, self.output()
            time.sleep(0.02)

    def end(self, with_signal=None) -> tuple[int, float]:
        """(its status, the seconds until it ended)"""
        began = time.monotonic()
        if with_signal is not None:
            self.process.send_signal(with_signal)
        status = self.process.wait(300)
        return status, time.monotonic() - began

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def errors(self) -> list[str]:
        return [line for line in self.output().splitlines() if line.startswith(processes.ENDS)]

    def lived(self) -> float:
        """Seconds until it last wrote down where the time went: at most 0.2 before a kill, or at its end."""
        return (self.workdir / "goodput.json").stat().st_mtime - self.began

    def step(self) -> int:
        """Of the last line of its metrics."""
        path = self.workdir / "metrics.jsonl"
        found = path.read_text().splitlines() if path.exists() else []
        return json.loads(found[-1])["step"] if found else 0


@pytest.mark.slow
def test_killed_and_preempted_in_every_phase_ends_where_an_undisturbed_run_does(tmp_path):
    """Killed after a save, then SIGTERM in a compilation, in a step and in an evaluation; then to the end."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = Process(whole)
    assert process.end()[0] == 0, process.output()

    process = Process(broken)
    process.wait_for(lambda p: p.step() >= EVERY + 60 and (broken / f"checkpoints/{EVERY}").is_dir())
    assert process.end(signal.SIGKILL)[0] == -signal.SIGKILL
    walls = [process.lived()]
    assert saved_steps(broken)[-1] == EVERY

    process = Process(broken, slow="compile")
    process.wait_for("compiling")
    time.sleep(1.0)  # in C++ by now
    status, seconds = process.end(signal.SIGTERM)
    assert status == PREEMPTED and seconds < 5, process.output()
    assert process.errors() == ["stopped by SIGTERM; the same command goes on"]
    walls.append(process.lived())

    process = Process(broken)
    process.wait_for(lambda p: p.step() >= EVERY + 100)
    assert process.end(signal.SIGTERM)[0] == PREEMPTED, process.output()
    step = saved_steps(broken)[-1]
    assert step > EVERY + 100 and step == process.step()
    assert process.errors() == [
        f"preempted at step {step}: it is saved; the same command goes on from there"]
    walls.append(process.lived())

    process = Process(broken, slow="evaluation")
    process.wait_for("evaluating")
    status, seconds = process.end(signal.SIGTERM)
    assert status == PREEMPTED, process.output()
    assert saved_steps(broken)[-1] == 1000 and process.step() < 1000  # the line waits for its evaluation
    walls.append(process.lived())

    process = Process(broken)
    assert process.end()[0] == 0, process.output()
    walls.append(process.lived())
    found, expected = ({line["step"]: line for line in lines(x)} for x in (broken, whole))
    assert found.keys() - expected.keys() <= {step}
    split = {s for s in expected if abs(s - step) <= 20}
    assert all(found[s] == expected[s] for s in expected.keys() - split)
    assert (broken / "summary.json").read_text() == (whole / "summary.json").read_text()

    goodput = json.loads((broken / "goodput.json").read_text())
    assert len(goodput["attempts"]) == 5
    seconds = goodput["seconds"]
    assert sum(seconds.values()) == pytest.approx(sum(walls), rel=0.03)
    assert seconds["lost"] > 0 and seconds["eval"] > 0.5


@pytest.mark.slow
def test_sigterm_to_one_of_two_ends_both_at_the_same_step(tmp_path):
    flags = [f"--config={ROOT}/tests/toy.py", f"--workdir={tmp_path}/run", "--config.train.num_steps=100000",
             "--config.train.log_every=10", "--config.train.eval_every=0", "--config.train.diagnostics_every=0",
             "--config.train.checkpoint_every=100000"]

    def under_way() -> bool:
        path = tmp_path / "run/metrics.jsonl"
        return path.exists() and len(path.read_text().splitlines()) >= 3

    with processes.running(2, "tfusion.train", *flags) as both:
        processes.wait_for(under_way, both)
        both[1].kill(signal.SIGTERM)
        assert [process.wait() for process in both] == [PREEMPTED] * 2, [process.stderr() for process in both]
    (step,) = saved_steps(tmp_path / "run")
    said = f"preempted at step {step}: it is saved; the same command goes on from there"
    assert [process.errors() for process in both] == [[said]] * 2
    assert step == max(line["step"] for line in lines(tmp_path / "run"))
