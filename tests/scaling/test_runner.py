"""A sweep that is run: what is begun, in which order, what is skipped, left alone and tried again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tfusion import workdir
from tfusion.errors import Stopped, UserError
from tfusion.scaling import jobs, points, progress, runner, study

WITH_CODEC = """[
    dict(name="codec", config="FILE", verbs=["train"]),
    dict(name="data", config="FILE", verbs=["prepare"], overrides={"data.prepared": "{data}/made"},
         flags={"prepare": {"codec": "{codec}"}}),
    dict(name="a", config="FILE", overrides={"data.prepared": "{data}/made"}),
]"""
ALL = ["data prepare", "a train", "a evaluate", "b train", "b evaluate"]


def run(sweep, parallel: int = 1, retry: bool = False) -> None:
    runner.Runner(sweep.out, points.read(sweep.out), parallel, retry).run()


def states(sweep) -> dict:
    named = {point.name: point for point in points.read(sweep.out)}
    return {name: progress.state(point, named) for name, point in named.items()}


def whats(sweep) -> list[str]:
    return [state.what for state in states(sweep).values()]


def test_points_run_in_order_each_verb_after_the_other_and_once(sweep, verbs, calls):
    sweep.freeze()
    assert whats(sweep) == ["waiting"] * 3
    verbs()
    run(sweep)
    assert calls() == ALL and whats(sweep) == ["finished"] * 3
    run(sweep)
    assert calls() == ALL


def test_the_commands_are_those_that_one_would_type(sweep):
    named = sweep.freeze()
    prepared = f"--config.data.prepared={sweep.out}/data/made"
    words = [runner.command(named["b"], verb, named)[1:] for verb in ("train", "evaluate")]
    assert words == [
        ["-m", "tfusion.train", f"--config={sweep.path}:wide", prepared, f"--workdir={sweep.out}/b"],
        ["-m", "tfusion.evaluate", f"--workdir={sweep.out}/b", "--number=8"]]
    assert runner.command(named["data"], "prepare", named)[1:] == [
        "-m", "tfusion.prepare", f"--config={sweep.path}", prepared, "--codec=codec.npz"]


def test_a_verb_that_is_done_is_not_run_again(sweep, verbs, calls):
    """Trained by hand: only the evaluation is missing. One of another step counts for nothing."""
    named = sweep.freeze()
    steps = named["a"].resolved["train"]["num_steps"]
    for path, tree in (("data/made/meta.json", {}), ("a/summary.json", {"steps": steps}),
                       ("a/evaluation/metrics.json", {"step": steps - 1}),
                       ("b/summary.json", {"steps": steps - 1})):
        (sweep.out / path).parent.mkdir(parents=True, exist_ok=True)
        (sweep.out / path).write_text(json.dumps(tree))
    verbs()
    run(sweep)
    assert calls() == ["a evaluate", "b train", "b evaluate"]


def test_several_at_a_time_but_none_before_what_it_names(sweep, verbs, calls):
    sweep.freeze()
    verbs("""
running = folder / "alone"
others = [other for other in folder.parent.iterdir() if (other / "alone").exists()]
if verb == "train":
    running.touch()
    until = time.time() + 10
    while time.time() < until and len([1 for x in folder.parent.iterdir() if (x / "alone").exists()]) < 2:
        time.sleep(0.01)
    assert time.time() < until
""")
    run(sweep, parallel=2)
    assert calls()[0] == "data prepare" and sorted(calls()) == sorted(ALL)


def test_a_failure_ends_its_point_hurts_no_other_and_waits_for_retry(sweep, verbs, calls):
    sweep.freeze()
    verbs("""
if folder.name == "a" and verb == "train":
    print("error: it will not do")
    sys.exit(1)
""")
    with pytest.raises(UserError, match=r"1 of 3 points failed \(a\): their sweep.log says why; --retry"):
        run(sweep)
    assert whats(sweep) == ["finished", "failed", "finished"]
    assert states(sweep)["a"].why == "error: it will not do"
    before = calls()
    with pytest.raises(UserError, match="1 of 3 points failed"):
        run(sweep)
    assert calls() == before
    verbs()
    run(sweep, retry=True)
    assert calls()[len(before):] == ["a train", "a evaluate"] and whats(sweep) == ["finished"] * 3


def test_what_needs_a_failed_point_is_not_begun(sweep, verbs, calls):
    sweep.freeze()
    verbs("sys.exit(1)")
    with pytest.raises(UserError, match=r"1 of 3 points failed \(data\)"):
        run(sweep)
    assert calls() == ["data prepare"] and whats(sweep) == ["failed", "waiting", "waiting"]


def test_a_verb_that_ends_well_and_leaves_nothing_has_failed(sweep, verbs):
    sweep.freeze()
    verbs("if verb == 'train': sys.exit(0)")
    with pytest.raises(UserError, match=r"2 of 3 points failed \(a, b\)"):
        run(sweep)


@pytest.mark.parametrize("how", ["sys.exit(42)", "os.kill(os.getpid(), 9)"])
def test_the_preempted_and_the_killed_are_started_again_a_few_times(sweep, verbs, calls, how):
    sweep.freeze()
    verbs(f"""
if folder.name == "a" and verb == "train" and not (folder / "second").exists():
    (folder / "second").touch()
    {how}
""")
    run(sweep)
    assert calls() == ["data prepare", "a train", *ALL[1:]]
    (sweep.out / "b" / "evaluation" / "metrics.json").unlink()
    verbs(how)
    with pytest.raises(UserError, match=r"1 of 3 points failed \(b\)"):
        run(sweep)
    assert calls().count("b evaluate") == 1 + 1 + runner.RESTARTS
    assert whats(sweep)[2] == ("preempted" if "42" in how else "failed")
    verbs()
    if "42" in how:  # it is gone on with, without being asked to
        run(sweep)
        assert whats(sweep) == ["finished"] * 3


def test_what_another_process_is_at_is_left_alone(sweep, verbs, calls):
    sweep.freeze()
    (sweep.out / "a").mkdir()
    verbs()
    with workdir.hold(sweep.out / "a" / workdir.LOCK):  # trained by hand
        assert whats(sweep) == ["waiting", "running", "waiting"]
        run(sweep)
    assert calls() == ["data prepare", "b train", "b evaluate"]
    run(sweep)
    assert calls()[3:] == ["a train", "a evaluate"]


def test_what_is_kept_of_another_machine_is_not_run_again(sweep, verbs, calls, tmp_path):
    """Of this very configuration; the points that it needed are run all the same."""
    named, kept = sweep.freeze(), tmp_path / "results"
    for name, digest in (("a", named["a"].config_hash), ("b", "another")):
        for file, tree in (("config.json", {}), ("summary.json", {"steps": 60}),
                           ("evaluation/metrics.json", {"step": 60}),
                           ("result.json", {"point": {"config_hash": digest}})):
            (kept / name / file).parent.mkdir(parents=True, exist_ok=True)
            (kept / name / file).write_text(json.dumps(tree))
    verbs()
    runner.Runner(sweep.out, list(named.values()), 1, False, kept).run()
    assert calls() == ["data prepare", "b train", "b evaluate"]


def test_another_machine_prepares_with_the_image_tokenizer_that_is_kept(sweep, tmp_path):
    """Trained anew it would have other bits: its point is finished where it is kept, the data's is not."""
    sweep.write(WITH_CODEC)
    named, kept = sweep.freeze(), tmp_path / "results"
    for path in ("data/half/codec.npz", "data/made/codec.npz", "codec/config.json"):
        (sweep.out / path).parent.mkdir(parents=True, exist_ok=True)
        (sweep.out / path).write_text("{}" if path.endswith("json") else path)
    (sweep.out / "codec/config.json").write_text(json.dumps(named["codec"].resolved))
    (sweep.out / "codec/summary.json").write_text(json.dumps({"steps": 59}))
    assert study.keep(sweep.out, kept) == []  # neither is done
    (sweep.out / "data/made/meta.json").write_text("{}")
    assert [path.name for path in study.keep(sweep.out, kept)] == ["data"]
    (sweep.out / "codec/summary.json").write_text(json.dumps({"steps": 60}))
    assert [path.name for path in study.keep(sweep.out, kept)] == ["codec"]
    assert study.keep(sweep.out, kept) == []
    shutil.rmtree(sweep.out / "data")
    shutil.rmtree(sweep.out / "codec")
    state = {name: progress.state(point, named, kept).what for name, point in named.items()}
    assert state == {"codec": "finished", "data": "waiting", "a": "waiting"}
    file = kept / "data/codec.npz"
    assert file.read_text() == "data/made/codec.npz"
    assert runner.command(named["data"], "prepare", named, kept)[-1] == f"--codec={file}"
    assert runner.command(named["data"], "prepare", named)[-1] == f"--codec={sweep.out}/codec"
    changed = named["data"]._replace(config_hash="another")
    assert runner.command(changed, "prepare", named, kept)[-1] == f"--codec={sweep.out}/codec"
    assert [point.name for _, point in jobs.due(list(named.values()), False, kept).submit] == ["data"]


def test_a_changed_experiment_is_refused_before_anything_runs(sweep, verbs, calls):
    sweep.freeze()
    sweep.path.write_text(sweep.path.read_text().replace("if arg ==", "config.seed = 9\n    if arg =="))
    verbs()
    with pytest.raises(UserError, match="'data' is no longer what was frozen in"):
        run(sweep)
    assert calls() == []


def test_looking_whether_a_lock_is_held_does_not_take_it(tmp_path):
    lock = tmp_path / "lock"
    assert not workdir.is_held(lock) and not lock.exists()
    with workdir.hold(lock):
        assert workdir.is_held(lock)
        assert "process" in lock.read_text()
    assert not workdir.is_held(lock)


def test_who_takes_a_lock_waits_for_who_looks_at_it(tmp_path, monkeypatch):
    """`is_held` has it for a moment: a run that begins just then must not be refused."""
    import fcntl

    lock = tmp_path / "lock"
    lock.touch()
    looking = open(lock)  # noqa: SIM115
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr(workdir.time, "sleep", lambda seconds: looking.close())
    workdir.hold(lock).close()


RUN = """
import sys
from tests.scaling import test_runner
from tfusion.scaling import points, runner
from pathlib import Path
out = Path(sys.argv[1])
named = {point.name: point for point in points.read(out)}
runner.command = lambda point, verb, named, results: [
    sys.executable, "-S", "-c", sys.argv[2], verb, point.workdir,
    points.place(point.resolved["data"]["prepared"], named), str(point.resolved["train"]["num_steps"])]
runner.POLL_S = 0.02
try:
    runner.Runner(out, list(named.values()), 1, False).run()
except Exception as e:
    print(e)
    sys.exit(getattr(e, "status", 3))
"""
SLOW = """
import signal
if folder.name == "a" and verb == "train" and not (folder / "saved").exists():
    def save(*_):
        (folder / "saved").touch()
        sys.exit(42)
    signal.signal(signal.SIGTERM, save)
    (folder / "begun").write_text(str(os.getpid()))
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_runner_that_is_ended_in_the_middle(sweep, calls, verbs, number):
    """Stopped, it has its run save and ends with 42. Killed, its run goes on, which the next runner leaves
    alone."""
    from tests.scaling.conftest import DONE

    sweep.freeze()
    process = subprocess.Popen([sys.executable, "-c", RUN, sweep.out, DONE.replace("BEFORE", SLOW)],
                               env=os.environ | {"JAX_PLATFORMS": "cpu"})
    until = time.time() + 120
    while not (sweep.out / "a" / "begun").exists() and time.time() < until:
        time.sleep(0.1)
    process.send_signal(number)
    status = process.wait(60)
    verbs()
    if number == signal.SIGTERM:
        assert status == Stopped.status and (sweep.out / "a" / "saved").exists()
        assert whats(sweep) == ["finished", "preempted", "waiting"]
    else:
        assert whats(sweep) == ["finished", "running", "waiting"]
        run(sweep)
        assert whats(sweep) == ["finished", "running", "finished"] and calls().count("a train") == 1
        os.kill(int((sweep.out / "a" / "begun").read_text()), signal.SIGTERM)
        while whats(sweep)[1] == "running":
            time.sleep(0.1)
    run(sweep)
    assert whats(sweep) == ["finished"] * 3 and calls().count("a train") == 2
