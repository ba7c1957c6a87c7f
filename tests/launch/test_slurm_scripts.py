"""What the scripts for SLURM ask of it, by stand-ins for its commands; tests/launch/test_slurm.py runs the real
ones."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.launch import loopback
from tests.launch.stubs import one_line_error, sweep
from tfusion.errors import RESTARTED
from tfusion.scaling import progress

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "launch" / "slurm"


def test_the_restart_list_is_that_of_the_package():
    found = re.search(r'restarted=" ([\d ]+) "', (SLURM / "train.sbatch").read_text())[1].split()
    assert found == [str(status) for status in RESTARTED]
    cases = re.search(r"(0 \|[\d |]+)\)", (SLURM / "task.sh").read_text())[1]
    assert cases.split(" | ") == ["0", *map(str, RESTARTED)]


def test_a_cluster_that_cannot_be_is_a_skip_that_says_why_and_in_ci_an_error(monkeypatch):
    monkeypatch.setattr(loopback.shutil, "which", lambda name, path: None if name == "munged" else name)
    why = loopback.missing()
    assert why == "munged not found: apt-get install slurm-wlm munge"
    monkeypatch.delenv("TFUSION_CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=why):
        loopback.absent(why)
    monkeypatch.setenv("TFUSION_CI", "1")
    with pytest.raises(pytest.fail.Exception, match=why):
        loopback.absent(why)


def test_a_job_ends_in_the_verb():
    job, task = ((SLURM / name).read_text() for name in ("train.sbatch", "task.sh"))
    assert job.count(' launch/slurm/task.sh "$@"') == 1
    assert task.count('\npython -m "tfusion.${VERB:-train}" "$@" || status=$?\n') == 1


@pytest.fixture
def task(tmp_path):
    """(variables) -> (what task.sh says, in which Python says which devices JAX is to take, its status)"""
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\necho "$* takes ${JAX_LOCAL_DEVICE_IDS-what JAX finds}"\nexit ${STATUS-0}\n')
    python.chmod(0o755)

    def run(**variables: str) -> tuple[str, int]:
        done = subprocess.run(["launch/slurm/task.sh", "--flag"], cwd=tmp_path, text=True, capture_output=True,
                              env={"PATH": os.environ["PATH"]} | variables, check=False)
        assert not done.stderr
        return done.stdout.strip(), done.returncode

    return run


@pytest.mark.parametrize(("visible", "on_node", "tasks", "local", "takes"), [
    ("0,1,2,3", "4", "1(x2)", "0", "0,1,2,3"),  # one process a node has them all
    ("0,1,2,3", "4", "4(x2)", "2", "2"),  # one a GPU
    ("0,1,2,3", "4", "2(x2)", "1", "2,3"),
    ("0", "4", "4(x2)", "3", "0"),  # --gpus-per-task=1: each sees its own, under the number 0
    ("0,1", "4", "2", "1", "0,1"),
    ("4,7", "2", "1", "0", "0,1")])  # some of the node's: JAX numbers those that it sees
def test_a_process_takes_its_share_of_the_nodes_gpus(task, visible, on_node, tasks, local, takes):
    """Left alone, JAX takes that whose number is the process's on its node: one of four."""
    said, status = task(CUDA_VISIBLE_DEVICES=visible, SLURM_GPUS_ON_NODE=on_node, SLURM_LOCALID=local,
                        SLURM_STEP_TASKS_PER_NODE=tasks)
    assert (said, status) == (f"-m tfusion.train --flag takes {takes}", 0)


def test_more_processes_than_gpus_are_refused(task):
    said, status = task(CUDA_VISIBLE_DEVICES="0,1", SLURM_GPUS_ON_NODE="2", SLURM_LOCALID="0",
                        SLURM_STEP_TASKS_PER_NODE="4")
    assert said.startswith("error: 4 processes share 2 GPUs of ") and status == 255


@pytest.mark.parametrize(("status", "given"), [(0, 0), (42, 42), (137, 137), (1, 255), (127, 255), (2, 255)])
def test_a_status_that_is_not_to_be_restarted_is_told_apart(task, status, given):
    said, found = task(STATUS=str(status), VERB="sample")
    assert found == given and said == "-m tfusion.sample --flag takes what JAX finds"


@pytest.fixture
def job(engines, tmp_path):
    """(the times that squeue is asked in vain) -> (what train.sbatch says, its status, the calls of scontrol),
    where its processes end with 42 and its state is RUNNING."""
    engines.answer("srun", "exit 42")
    engines.answer("sleep")
    engines.answer("scontrol")

    def run(vain: int, state: str = "RUNNING") -> tuple[str, int, list[list[str]]]:
        engines.record.write_text("")
        engines.answer("squeue", f"""if (($(grep -ao squeue "$CALLS" | wc -l) <= {vain})); then exit 1; fi
echo {state}""")
        done = subprocess.run([SLURM / "train.sbatch", "--workdir=x"], cwd=ROOT, capture_output=True, text=True,
                              env=engines.environment(SLURM_JOB_ID="7", TMPDIR=str(tmp_path)), timeout=60)
        return done.stdout + done.stderr, done.returncode, engines.calls("scontrol")

    return run


def test_a_job_is_begun_again_though_squeue_was_too_busy_once(job, tmp_path):
    for vain in (0, 4):
        said, status, calls = job(vain)
        assert (status, calls) == (42, [["scontrol", "requeue", "7"]]), said
    said, status, calls = job(5)
    assert status == 42 and not calls
    assert said == ("error: status 42, and it cannot be begun again (squeue --noheader): the same command goes "
                    "on\n")
    said, status, calls = job(1, "COMPLETING")
    assert (said, status, calls) == ("", 42, [])
    assert not list(tmp_path.glob("tmp.*"))


def test_a_point_that_is_no_slice_of_gpus_is_found_before_any_is_submitted(engines):
    for name in ("sbatch", "squeue"):
        engines.answer(name)
    engines.checkout([("a", ""), ("b", "h100-16"), ("c", "v5p-8")])
    done = engines.run("slurm.sh", "--sweep=gs://b/x")
    assert one_line_error(done) == "error: v5p-8 is no slice of GPUs: launch/gke.sh submits to TPUs"
    assert not engines.calls("sbatch") and not done.stdout


def test_which_points_are_run_is_the_scripts_to_say_and_no_word_too_early(engines):
    engines.answer("sbatch", "echo refused >&2; exit 1")
    engines.answer("squeue")
    engines.checkout([("a", ""), ("b", "")])
    for flag in ("--array=0-3", "-a0"):
        done = engines.run("slurm.sh", "--sweep=gs://b/x", "--time=10", flag)
        assert one_line_error(done).startswith(f"error: {flag}: which points") and not engines.calls("sbatch")
    done = engines.run("slurm.sh", "--sweep=gs://b/x", "--time=10", "--retry")
    (call,) = engines.calls("sbatch")
    assert done.returncode == 1 and not done.stdout and "--time=10" in call and "--retry" not in call


@pytest.fixture
def submit(engines, tmp_path):
    """(flags, queued=what squeue prints, fails=whether it fails) -> (what slurm.sh says, its status, the calls
    of sbatch); the sweep of three points is submit.out."""
    out = tmp_path / "sweep"
    sweep(out, '[dict(name=x, config="tests/launch/tiny.py", overrides={"seed": i}, verbs=["train"]) '
               'for i, x in enumerate("abc")]')
    engines.answer("sbatch")

    def run(*flags: str, queued: str = "", fails: bool = False):
        engines.answer("squeue", f"printf '{queued}'; exit {int(fails)}")
        engines.record.write_text("")
        done = engines.run("slurm.sh", f"--sweep={out}", *flags, JAX_PLATFORMS="cpu")
        return done.stdout + done.stderr, done.returncode, engines.calls("sbatch")

    run.out = out
    return run


def slice_up(out: Path, **changes: str) -> None:
    """Points that are of another slice than was frozen: {name: topology}."""
    lines = [json.loads(line) for line in (out / "points.jsonl").read_text().splitlines()]
    (out / "points.jsonl").write_text("".join(
        json.dumps(line | {"topology": changes[line["name"]]}) + "\n" for line in lines))


@pytest.mark.slow
def test_what_is_missing_is_submitted_as_one_array_and_what_is_queued_left_alone(submit):
    progress.note(submit.out / "b", "train", 1, "error: x")
    said, status, (call,) = submit("--time=10", queued="0 PENDING\\n")
    assert status == 0 and "a: PENDING, left alone" in said and "c: submitted" in said
    assert call[2:] == ["--array=2", "--export=ALL,VERB=sweep", f"--output={submit.out}/slurm-%A_%a.log",
                        "--time=10", "launch/slurm/train.sbatch", f"--out={submit.out}"]
    assert re.fullmatch(r"--job-name=sweep-[0-9a-f]{8}", call[1])
    said, status, (again,) = submit("--retry", "--time=10")
    assert again[1:3] == [call[1], "--array=0,1,2"] and again[6:] == call[6:]


@pytest.mark.slow
def test_an_engine_that_cannot_say_what_it_has_is_given_nothing(submit):
    said, status, calls = submit(fails=True)
    assert status == 1 and said.splitlines()[-1] == "error: squeue failed" and not calls
    said, status, calls = submit("--retry", "--time=10", queued="0 RUNNING\\n1 PENDING\\n2 COMPLETING\\n")
    assert status == 0 and not calls


@pytest.mark.slow
def test_points_get_as_many_gpus_as_their_topology_has(submit):
    slice_up(submit.out, a="h100-16", b="h100-4", c="h100-16")
    said, status, calls = submit("--partition=big")
    assert status == 0, said
    assert sorted([call[2], *call[5:8]] for call in calls) == [
        ["--array=0,2", "--nodes=2", "--gpus-per-node=8", "--partition=big"],
        ["--array=1", "--nodes=1", "--gpus-per-node=4", "--partition=big"]]
    slice_up(submit.out, a="v5p-8", b="v5p-8", c="v5p-8")
    said, status, calls = submit()
    assert status == 1 and "error: v5p-8 is no slice of GPUs: launch/gke.sh submits to TPUs" in said
    assert not calls
