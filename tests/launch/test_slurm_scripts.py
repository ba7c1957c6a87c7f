"""What the scripts for SLURM ask of it, by stand-ins for its commands; tests/launch/test_slurm.py runs the real
ones."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.scaling.test_jobs import leave
from tfusion.errors import RESTARTED
from tfusion.scaling import points

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "launch" / "slurm"


def test_the_restart_list_is_that_of_the_package():
    found = re.search(r'restarted=" ([\d ]+) "', (SLURM / "train.sbatch").read_text())[1].split()
    assert found == [str(status) for status in RESTARTED]
    cases = re.search(r"(0 \|[\d |]+)\)", (SLURM / "task.sh").read_text())[1]
    assert cases.split(" | ") == ["0", *map(str, RESTARTED)]


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
def submit(sweep, tmp_path):
    """(flags, queued=what squeue prints, fails=whether it fails) -> (what slurm.sh says, its status, the calls
    of sbatch)."""
    sweep.write('[dict(name=x, config="FILE", overrides={"seed": i}) for i, x in enumerate("abc")]')
    sweep.freeze()
    tools = tmp_path / "tools"
    tools.mkdir()

    def run(*flags: str, queued: str = "", fails: bool = False, **variables: str):
        for name, text in (("squeue", f"printf '{queued}'; exit {int(fails)}"),
                           ("sbatch", f'printf "%s|" "$@" >> {tools}/calls; echo >> {tools}/calls')):
            (tools / name).write_text(f"#!/bin/bash\n{text}\n")
            (tools / name).chmod(0o755)
        (tools / "calls").write_text("")
        done = subprocess.run([ROOT / "launch" / "slurm.sh", f"--sweep={sweep.out}", *flags], text=True,
                              capture_output=True, check=False, env=os.environ | variables | {
                                  "PATH": f"{tools}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"})
        calls = [line.strip("|").split("|") for line in (tools / "calls").read_text().splitlines()]
        return done.stdout + done.stderr, done.returncode, calls

    return run


@pytest.mark.slow
def test_what_is_missing_is_submitted_as_one_array_and_what_is_queued_left_alone(sweep, submit):
    leave(sweep, "b/sweep.json", {"verb": "train", "status": 1, "why": "error: x"})
    said, status, calls = submit("--time=10", queued="0 PENDING\\n")
    assert status == 0 and "a: PENDING, left alone" in said and "c: submitted" in said
    (call,) = calls
    assert call[1:] == ["--array=2", "--export=ALL,VERB=sweep", f"--output={sweep.out}/slurm-%A_%a.log",
                        "--time=10", "launch/slurm/train.sbatch", f"--out={sweep.out}"]
    assert re.fullmatch(r"--job-name=sweep-[0-9a-f]{8}", call[0])
    said, status, (again,) = submit("--retry", "--time=10")
    assert again[:2] == [call[0], "--array=0,1,2"] and again[5:] == call[5:]


@pytest.mark.slow
def test_an_engine_that_cannot_say_what_it_has_is_given_nothing(submit):
    said, status, calls = submit(fails=True)
    assert status == 1 and said.splitlines()[-1] == "error: squeue failed" and not calls
    said, status, calls = submit("--retry", "--time=10", queued="0 RUNNING\\n1 PENDING\\n2 COMPLETING\\n")
    assert status == 0 and not calls


@pytest.mark.slow
def test_points_get_as_many_gpus_as_their_topology_has(sweep, submit):
    lines = [point._asdict() for point in points.read(sweep.out)]
    assert "topology" in lines[0]
    for line, topology in zip(lines, ("h100-16", "h100-4", "h100-16")):
        line["topology"] = topology
    points.replace_text(sweep.out / points.POINTS, "".join(points.json.dumps(line) + "\n" for line in lines))
    said, status, calls = submit("--partition=big")
    assert status == 0, said
    assert sorted([call[1], *call[4:7]] for call in calls) == [
        ["--array=0,2", "--nodes=2", "--gpus-per-node=8", "--partition=big"],
        ["--array=1", "--nodes=1", "--gpus-per-node=4", "--partition=big"]]
    lines[0]["topology"] = "v5p-8"
    points.replace_text(sweep.out / points.POINTS, "".join(points.json.dumps(line) + "\n" for line in lines))
    said, status, calls = submit()
    assert status == 1 and "error: v5p-8 is no slice of GPUs: launch/gke.sh submits to TPUs" in said
