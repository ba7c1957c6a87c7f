"""Points as jobs of a cluster: which are to be submitted, and what a job runs, as one or several processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.scaling.conftest import DONE
from tests.scaling.test_runner import states
from tfusion import distributed, workdir
from tfusion.errors import UserError
from tfusion.scaling import jobs, points, progress


def due(sweep, retry: bool = False) -> tuple[list, dict]:
    found = jobs.due(points.read(sweep.out), retry)
    return [(index, point.name) for index, point in found.submit], found.counts


def leave(sweep, path: str, tree: dict) -> None:
    (sweep.out / path).parent.mkdir(parents=True, exist_ok=True)
    (sweep.out / path).write_text(json.dumps(tree))


def run(sweep, which: str) -> int:
    """In this process, whose handler of SIGTERM is put back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        return jobs.run(sweep.out, points.read(sweep.out), which)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_is_submitted_is_what_can_begin_and_nobody_is_at(sweep):
    sweep.freeze()
    assert due(sweep) == ([(0, "data")], {"ready": 1, "wait for points that they need": 2})
    leave(sweep, "data/made/meta.json", {})
    assert due(sweep) == ([(1, "a"), (2, "b")], {"finished": 1, "ready": 2})
    leave(sweep, "a/sweep.json", {"verb": "train", "status": 1, "why": "error: x"})
    assert due(sweep) == ([(2, "b")], {"finished": 1, "failed": 1, "ready": 1})
    assert due(sweep, retry=True) == ([(1, "a"), (2, "b")], {"finished": 1, "ready": 2})
    leave(sweep, "a/sweep.json", {"verb": "train", "status": 42, "why": ""})
    assert due(sweep)[0] == [(1, "a"), (2, "b")]
    with workdir.hold(sweep.out / "a" / progress.LOCK):
        assert due(sweep, retry=True) == ([(2, "b")], {"finished": 1, "running": 1, "ready": 1})


def test_a_job_runs_what_is_left_of_its_point_and_says_what_became_of_it(sweep, verbs, calls, capsys):
    sweep.freeze()
    verbs()
    with pytest.raises(UserError, match="'a' needs 'data', which is not finished: run that first"):
        run(sweep, "a")
    assert run(sweep, "data") == 0 and run(sweep, "1") == 0
    assert calls() == ["data prepare", "a train", "a evaluate"]
    assert progress.read_json(sweep.out / "a" / "sweep.json") == {"verb": "evaluate", "status": 0, "why": ""}
    assert not workdir.is_held(sweep.out / "a" / progress.LOCK)
    (sweep.out / "a" / "evaluation" / "metrics.json").unlink()
    capsys.readouterr()
    assert run(sweep, "a") == 0 and run(sweep, "a") == 0
    assert calls()[3:] == ["a evaluate"]
    assert capsys.readouterr().out.splitlines() == ["a: evaluate", "a is finished", "a is finished"]
    with pytest.raises(UserError, match=r"--point=7: .*sweep has no such point, but data, a, b"):
        run(sweep, "7")


@pytest.mark.parametrize(("how", "status", "why", "what"), [
    ("print('error: no', file=sys.stderr); sys.exit(1)", 1, "error: no", "failed"),
    ("print('saved', file=sys.stderr); sys.exit(42)", 42, "saved", "preempted"),
    ("os.kill(os.getpid(), 9)", 137, "ended by SIGKILL: memory ran out, or somebody did it", "failed"),
    ("sys.exit(0)", 1, "train ended well and left nothing: ", "failed")])
def test_a_verb_that_fails_ends_the_job_with_its_status(sweep, verbs, calls, capfd, how, status, why, what):
    """So 42 reaches the engine, which restarts it; and what it said reaches the engine's log."""
    sweep.freeze()
    leave(sweep, "data/made/meta.json", {})
    verbs(how)
    assert run(sweep, "a") == status and calls() == ["a train"]
    assert states(sweep)["a"].what == what
    assert progress.read_json(sweep.out / "a" / "sweep.json") == {"verb": "train", "status": status, "why": why}
    if why.startswith("error"):
        assert why in capfd.readouterr().err and states(sweep)["a"].why == why


def test_what_another_process_is_at_is_refused_and_not_said_to_have_failed(sweep, verbs, calls):
    sweep.freeze()
    verbs()
    (sweep.out / "data").mkdir()
    held = workdir.hold(sweep.out / "data" / progress.LOCK)
    with pytest.raises(UserError, match="is being written by another process"):
        run(sweep, "data")
    held.close()
    assert calls() == [] and not (sweep.out / "data" / "sweep.json").exists()


def test_of_several_processes_all_run_the_verbs_and_the_first_writes(sweep, verbs, calls, monkeypatch):
    sweep.freeze()
    for name, value in zip(distributed.OURS, ("localhost:1", "2", "1")):
        monkeypatch.setenv(name, value)
    with workdir.hold(sweep.out / progress.LOCK):
        verbs("assert os.environ['JAX_PROCESS_ID'] == '1'")
        assert run(sweep, "data") == 0
    assert calls() == ["data prepare"] and not (sweep.out / "data" / "sweep.json").exists()
    assert not (sweep.out / "data" / progress.LOCK).exists()
    (sweep.out / "data" / "made" / "meta.json").unlink()
    verbs("sys.exit(42)")
    assert run(sweep, "data") == 42 and not (sweep.out / "data" / "sweep.json").exists()
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    assert run(sweep, "data") == 42 and states(sweep)["data"].what == "preempted"


@pytest.mark.parametrize("status", [42, 143])
def test_that_another_process_failed_is_not_forgotten_by_the_first_which_is_stopped_for_it(
        sweep, verbs, monkeypatch, status):
    sweep.freeze()
    for name, value in zip(distributed.OURS, ("localhost:1", "2", "1")):
        monkeypatch.setenv(name, value)
    (sweep.out / "data").mkdir()
    progress.note(sweep.out / "data", "prepare", 42, "")  # once before
    verbs("print('error: no such mount', file=sys.stderr); sys.exit(1)")
    fails = sweep.out / "data" / "fails.json"
    assert run(sweep, "data") == 1
    os.rename(sweep.out / "data" / "sweep.json", fails)
    progress.note(sweep.out / "data", "prepare", 42, "")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    verbs(f"os.rename(folder / 'fails.json', folder / 'sweep.json'); sys.exit({status})")
    assert run(sweep, "data") == status
    assert states(sweep)["data"].what == "failed" and states(sweep)["data"].why == "error: no such mount"


def test_what_is_left_is_decided_once(sweep, verbs, calls):
    """Another process of the job, which began at the same time, runs the same verbs: what appears meanwhile
    changes nothing."""
    sweep.freeze()
    leave(sweep, "data/made/meta.json", {})
    verbs("""
if verb == "train":
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation" / "metrics.json").write_text(json.dumps({"step": steps}))
""")
    assert run(sweep, "a") == 0 and calls() == ["a train", "a evaluate"]


def test_an_experiment_that_was_changed_is_refused(sweep, verbs, calls):
    sweep.freeze()
    sweep.path.write_text(sweep.path.read_text().replace("if arg ==", "config.seed = 9\n    if arg =="))
    verbs()
    with pytest.raises(UserError, match="'data' is no longer what was frozen in"):
        run(sweep, "data")
    assert calls() == []


def test_a_sweep_may_lie_in_a_bucket_and_anywhere_else_than_it_was_frozen(sweep, bucket):
    sweep.write('[dict(name="a", config="FILE"), dict(name="b", config="FILE:wide")]')
    sweep.freeze()
    there = bucket / "moved"
    there.mkdir()
    (there / "points.jsonl").write_text((sweep.out / "points.jsonl").read_text())
    frozen = points.read(there)
    assert [str(point.folder) for point in frozen] == [f"{there}/a", f"{there}/b"]
    progress.note(frozen[0].folder, "train", 1, "error: no")
    (there / "b" / "metrics.000000000001.jsonl").write_text('{"step": 20, "time": 1.0, "train/lm_loss": 2.5}\n')
    (there / "b" / "goodput.json").write_text(json.dumps(
        {"seconds": {"step": 1.0, "lost": 3.0}, "attempts": [{"seconds": {}}] * 3}))
    (there / "b" / workdir.LOCK).write_text(json.dumps({"who": "x", "token": "y", "time": time.time()}))
    named = {point.name: point for point in frozen}
    a, b = (progress.state(point, named) for point in frozen)
    assert (a.what, a.why) == ("failed", "error: no")
    assert (b.what, b.step, b.losses) == ("running", 20, {"train/lm_loss": 2.5})
    assert (a.goodput, a.restarts, b.goodput, b.restarts) == (None, None, 0.25, 2)
    found = jobs.due(frozen, retry=True)
    assert [point.name for _, point in found.submit] == ["a"] and found.counts["running"] == 1


JOB = """
import sys
from pathlib import Path
from jax._src import xla_bridge
from tfusion.scaling import jobs, points, runner
out = Path(sys.argv[1])
runner.command = lambda point, verb, named, results: [
    sys.executable, "-S", "-c", sys.argv[2], verb, point.workdir,
    points.place(point.resolved["data"]["prepared"], named), str(point.resolved["train"]["num_steps"])]
status = jobs.run(out, points.read(out), "a")
assert not xla_bridge.backends_are_initialized()  # the devices are the verb's alone
sys.exit(status)
"""
SAVES = """
import signal
def save(*_):
    (folder / "saved").touch()
    sys.exit(42)
signal.signal(signal.SIGTERM, save)
(folder / "begun").touch()
time.sleep(60)
"""


@pytest.mark.slow
def test_sigterm_reaches_the_verb_and_its_status_the_engine(sweep):
    sweep.freeze()
    leave(sweep, "data/made/meta.json", {})
    (sweep.out / "a").mkdir()
    process = subprocess.Popen([sys.executable, "-c", JOB, sweep.out, DONE.replace("BEFORE", SAVES)],
                               env=os.environ | {"JAX_PLATFORMS": "cpu"})
    until = time.time() + 120
    while not (sweep.out / "a" / "begun").exists() and time.time() < until:
        time.sleep(0.1)
    assert states(sweep)["a"].what == "running"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 42 and (sweep.out / "a" / "saved").exists()
    assert states(sweep)["a"].what == "preempted"
