"""A process that is killed, then interrupted, ends where an undisturbed one does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from tests.conftest import tiny_dict
from tests.processes import ENDS
from tests.test_resume import assert_same_bits, lines, mesh, saved_steps
from tfusion import config
from tfusion.checkpoint import Checkpoints
from tfusion.objectives import make_objective
from tfusion.training import state as states
from tfusion.training.optimizer import make_optimizer

ROOT = Path(__file__).parents[1]
SLOW_STEPS, SLOW_EVERY = 60, 10


class Process:
    """`python -m tfusion.train` on an experiment file in tmp_path."""

    def __init__(self, experiment: Path, workdir: Path):
        self.workdir, self.log = workdir, workdir.with_suffix(".stderr")
        command = [sys.executable, "-m", "tfusion.train", f"--config={experiment}", f"--workdir={workdir}"]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(  # a shell's background job would hand down an ignored SIGINT
                command, cwd=ROOT, env=env, stderr=log, stdout=subprocess.DEVNULL,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    def wait_for_checkpoint(self, after: int) -> int:
        """Returns the first checkpoint past step `after` as soon as it is listed."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.stderr()
            steps = saved_steps(self.workdir) if (self.workdir / "checkpoints").is_dir() else []
            if steps and steps[-1] > after:
                return steps[-1]
            time.sleep(0.02)
        raise AssertionError("no checkpoint within 300 s")

    def end(self, with_signal=None) -> int:
        if with_signal is not None:
            self.process.send_signal(with_signal)
        return self.process.wait(300)

    def stderr(self) -> str:
        return self.log.read_text()


def last_state(cfg, workdir):
    objective, tx = make_objective(cfg), make_optimizer(cfg.optimizer, cfg.train.num_steps)
    checkpoints = Checkpoints(workdir)
    step = max(checkpoints.steps())
    with jax.set_mesh(mesh()):
        target = states.restore_target(objective, tx, cfg.optimizer.ema_decay > 0, mesh())
        items = checkpoints.restore(step, states.items(target))
    checkpoints.close()
    return jax.device_get(states.from_items(step, items, mesh()))


@pytest.mark.slow
def test_killed_then_interrupted_equals_uninterrupted(prepared_root, tmp_path):
    tree = tiny_dict(prepared_root)
    tree.train.update(num_steps=SLOW_STEPS, checkpoint_every=SLOW_EVERY, log_every=3, eval_every=20,
                      diagnostics_every=30)
    experiment = tmp_path / "tiny.py"
    experiment.write_text("import json\nfrom ml_collections import ConfigDict\n\n\ndef get_config(arg=None):\n"
                          f"    return ConfigDict(json.loads({json.dumps(tree.to_dict())!r}))\n")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = Process(experiment, whole)
    assert process.end() == 0, process.stderr()

    process = Process(experiment, broken)
    killed_at = process.wait_for_checkpoint(after=0)
    assert process.end(signal.SIGKILL) == -signal.SIGKILL

    process = Process(experiment, broken)
    interrupted_at = process.wait_for_checkpoint(after=killed_at)
    assert process.end(signal.SIGINT) == 1
    errors = [x for x in re.split(r"[\r\n]+", process.stderr()) if x.startswith(ENDS)]
    step = saved_steps(broken)[-1]
    assert errors == [f"stopped at step {step}: it is saved; the same command goes on from there"]
    assert "Traceback" not in process.stderr()
    assert killed_at < interrupted_at < SLOW_STEPS, "both blows fell in mid-run"

    process = Process(experiment, broken)
    assert process.end() == 0, process.stderr()
    found, expected = ({line["step"]: line for line in lines(x)} for x in (broken, whole))
    assert found.keys() - expected.keys() <= {step}  # the save's own line, which splits one
    assert all(found[s] == line for s, line in expected.items() if abs(s - step) > 3)
    cfg = config.from_dict(tree)
    assert_same_bits(last_state(cfg, broken), last_state(cfg, whole))


@pytest.mark.slow
def test_twenty_kills_in_saves_commits_and_deletions_change_no_bit(tmp_path):
    """At random moments, and as soon as a phase is seen on the disk."""
    from benchmarks import checkpoints  # not in the copies that tests.mutants makes

    found = checkpoints.kill_many(tmp_path, 20)
    assert sum(found.values()) >= 15 and found.keys() & {"commit", "deletion"}, found
