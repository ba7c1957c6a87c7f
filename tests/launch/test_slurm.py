"""Jobs on a real SLURM: what is begun again and what is not, a sweep that is preempted, every verb.

The first half runs a stand-in for Python in the job's processes, so that what SLURM and the scripts do is seen
alone. With TFUSION_DRILL_LOG=FILE the sweep's drill writes what was typed and what happened.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import processes
from tests.launch import loopback
from tests.launch.stubs import SLURM
from tests.launch.test_guides import GUIDES, commands
from tests.launch.tiny import STEPS
from tests.test_resume import lines, saved_steps

pytestmark = pytest.mark.cluster
ROOT = processes.ROOT
FAST = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
TWO = ("--nodes=2", "--ntasks=2")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if why := loopback.missing():
        loopback.absent(why)
    with loopback.cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


def job(slurm, number: str) -> tuple[str, int, int]:
    """(state, how often it was begun again, exit status) of a job, or of an array's element."""
    said = slurm.run("scontrol", "show", "job", number)
    return (re.search(r"JobState=(\w+)", said)[1], int(re.search(r"Restarts=(\d+)", said)[1]),
            int(re.search(r"ExitCode=(\d+)", said)[1]))


def wait_for(condition, what: str, seconds: float = 150) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"it did not come to be in {seconds} s: {what}"
        time.sleep(0.2)


def wait_for_end(slurm, *numbers: str, log: str = "") -> None:
    wait_for(lambda: all(job(slurm, number)[0] in ENDED for number in numbers), f"the end of {numbers}; {log}")


def test_the_guides_and_the_scripts_flags_are_slurms(slurm):
    script = re.sub(r"\s\\\n\s*", " ", (ROOT / "launch/slurm.sh").read_text())
    lines = commands(GUIDES["slurm.md"]) + [line for line in script.splitlines() if line.strip()[0:1] != "#"]
    calls = [(name, re.split(rf"(?<![.\w]){name} (?=-)", line)[1:]) for line in lines for name in SLURM]
    found = {(name, flag) for name, words in calls for flag in re.findall(
        r"--[a-z-]+", "".join(words).partition("launch/slurm/train.sbatch")[0])}
    assert len(found) > 15
    helps = {name: slurm.run(name, "--help") for name in SLURM}
    unknown = {(name, flag) for name, flag in found if not re.search(rf"{flag}\b", helps[name])}
    assert unknown == {("squeue", "--me"), ("scancel", "--me")}  # in their manuals alone


# ---------------------------------------------------------------- what is begun again

STAND_IN = """#!/bin/bash
# python -m tfusion.VERB FIRST SECOND LATER: what process 0 does, what process 1, and both once begun again
act() {
  case $1 in
    exit:*) exit "${1#exit:}" ;;
    killed) kill -KILL $$ ;;
    wait)
      trap 'sleep 1; exit 42' TERM  # saves
      for _ in {1..600}; do sleep 0.1; done ;;
  esac
}
shift 2
if ((${SLURM_RESTART_COUNT:-0})); then act "$3"; elif ((SLURM_PROCID)); then act "$2"; else act "$1"; fi
"""


@pytest.fixture(scope="module")
def stand_in(slurm, tmp_path_factory):
    """submit(words, flags of sbatch...): a job of two processes on two nodes; returns its number."""
    repository = tmp_path_factory.mktemp("repository")
    (repository / "launch").symlink_to(ROOT / "launch")
    python = repository / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def submit(words: str, *flags: str, **more: str) -> str:
        return slurm.run("sbatch", "--parsable", *TWO, *flags, "launch/slurm/train.sbatch", *words.split(),
                         cwd=repository, **more).strip()

    submit.log = lambda number: (repository / f"slurm-{number}.out").read_text()
    return submit


def test_what_is_begun_again_is_what_a_restart_can_mend(slurm, stand_in):
    """The status of the job is that of the process that failed first, not of those that were stopped for it."""
    error, hung, killed = (stand_in(f"wait {how} exit:0", SLURM_WAIT="1")
                           for how in ("exit:1", "exit:134", "killed"))
    often = stand_in("exit:42 exit:42 exit:42", RESTARTS="1")
    wait_for_end(slurm, error, hung, killed, often)
    assert job(slurm, error) == ("FAILED", 0, 1), stand_in.log(error)
    assert "task 0: Killed" in stand_in.log(error)
    assert job(slurm, hung) == ("COMPLETED", 1, 0), stand_in.log(hung)
    assert job(slurm, killed) == ("COMPLETED", 1, 0), stand_in.log(killed)
    assert job(slurm, often) == ("FAILED", 1, 42)
    assert "error: status 42, and it was begun again 1 times already (RESTARTS)" in stand_in.log(often)


def test_a_job_that_is_cancelled_saves_and_is_not_begun_again(slurm, stand_in):
    number = stand_in("wait wait exit:0")
    wait_for(lambda: job(slurm, number)[0] == "RUNNING", "it runs")
    time.sleep(1)
    slurm.run("scancel", number)
    wait_for_end(slurm, number)
    assert "Exited with exit code 42" in stand_in.log(number)
    wait_for(lambda: not slurm.run("squeue", "--noheader"), "the queue is empty", 20)
    assert job(slurm, number)[:2] == ("CANCELLED", 0)


@pytest.mark.parametrize("partition", ["low", "abrupt"])
def test_a_job_that_is_preempted_is_begun_again_once(slurm, stand_in, partition):
    """With grace SLURM lets it end, and takes that for its end: the script requeues it. Without, SLURM does."""
    number = stand_in("wait wait exit:0", "--exclusive", f"--partition={partition}")
    wait_for(lambda: job(slurm, number)[0] == "RUNNING", "it runs")
    time.sleep(1)
    urgent = slurm.run("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive",
                       "--output=/dev/null", "--wrap=sleep 1").strip()
    wait_for_end(slurm, number, urgent)
    assert job(slurm, number) == ("COMPLETED", 1, 0), stand_in.log(number)
    log = stand_in.log(number)
    assert log.count("Exited with exit code 42") == 2
    assert ("status 42: begun again" in log) == (partition == "low")


# ---------------------------------------------------------------- a sweep, for real

class Drill:
    """What is typed at a terminal, and what is seen, with the time of each."""

    def __init__(self, slurm, folder: Path):
        self.slurm, self.folder, self.began, self.lines = slurm, folder, time.monotonic(), []
        self.path = f"{Path(sys.executable).parent}:{slurm.environment['PATH']}"

    def _note(self, text: str) -> None:
        self.lines += [line.rstrip() for line in text.replace(f"{self.folder}/", "sweeps/").splitlines()]

    def types(self, command: str) -> str:
        """Returns what it says; it must succeed."""
        self._note(f"\n[{time.monotonic() - self.began:5.1f} s] $ {command}")
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, env=self.slurm.environment | FAST | {"PATH": self.path})
        self._note(done.stdout)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def sees(self, what: str) -> None:
        self._note(f"\n[{time.monotonic() - self.began:5.1f} s] {what}")

    def write(self, path: str) -> None:
        Path(path).write_text("\n".join(self.lines).strip() + "\n")


QUEUE = "squeue --array --sort=i --format='%12i %10P %10T %r'"


def submitted(said: str) -> str:
    return re.search(r"Submitted batch job (\d+)", said)[1]


def test_a_sweep_is_preempted_and_ends_as_if_it_had_not_been(slurm, tmp_path):
    """Three points of two tasks each. An urgent job, which trains what the longest of them does, takes their
    nodes; a point fails, which hurts no other; it is mended, and --retry submits that alone."""
    drill, out, whole, given = Drill(slurm, tmp_path), tmp_path / "tiny", tmp_path / "whole", tmp_path / "given"
    drill.types("sinfo --version; sinfo; nproc; uptime")
    drill.types(f"python -m tfusion.sweep --config=tests/launch/tiny.py:{given} --out={out}")
    submit = f"launch/slurm.sh --sweep={out} --nodes=2 --ntasks=2"
    array = submitted(drill.types(submit))
    queued = slurm.run("squeue", "--array", "--noheader", "--format=%i")
    assert sorted(queued.split()) == [f"{array}_{index}" for index in range(3)]
    again = drill.types(submit)
    assert again.count("left alone") == 3
    assert slurm.run("squeue", "--array", "--noheader", "--format=%i") == queued
    long, short, broken = (f"{array}_{index}" for index in range(3))

    def log(index: int) -> str:
        return (out / f"slurm-{array}_{index}.log").read_text()

    wait_for(lambda: job(slurm, broken)[0] == "FAILED", "the broken point has failed")
    wait_for(lambda: (out / "long/checkpoints").is_dir() and saved_steps(out / "long"), "a checkpoint")
    drill.sees("the third point has failed, the first has a checkpoint; an urgent job takes both nodes")
    urgent = submitted(drill.types(
        "sbatch --partition=high --nodes=2 --ntasks=2 --exclusive --output=/dev/null launch/slurm/train.sbatch "
        f"--config=tests/launch/tiny.py --workdir={whole}"))
    wait_for(lambda: job(slurm, urgent)[0] == "RUNNING", "the urgent job runs")
    drill.types(QUEUE)
    wait_for_end(slurm, urgent)
    drill.sees("the urgent job has ended")
    wait_for_end(slurm, long, short)
    drill.sees("so have those that it interrupted")
    drill.types(f"grep --no-filename -E '^(error|preempted|resumed|status)' {out}/slurm-{array}_*.log")
    assert job(slurm, long) == ("COMPLETED", 1, 0), log(0)
    assert "preempted at step" in log(0) and f"of {STEPS}" in log(0)
    assert lines(out / "long") == lines(whole), "bit for bit"
    assert job(slurm, short)[0] == "COMPLETED" and job(slurm, broken) == ("FAILED", 0, 1), log(1) + log(2)

    nothing = drill.types(submit)
    assert "submitted" not in nothing and "1 failed" in nothing and "2 finished" in nothing
    drill.types(f"cp -r {out}/short {given}  # what the third point begins with")
    mended = drill.types(submit.replace("--nodes", "--retry --nodes"))
    assert re.findall(r"(\w+): submitted", mended) == ["broken"]
    wait_for_end(slurm, f"{submitted(mended)}_2")
    status = drill.types(f"python -m tfusion.sweep --status --out={out}")
    assert status.splitlines()[-1] == "3 finished"
    assert re.search(rf"^long +finished +{STEPS}/{STEPS} +\d+% +1$", status, re.M)
    if path := os.environ.get("TFUSION_DRILL_LOG"):
        drill.write(path)


# ---------------------------------------------------------------- the other verbs

def test_each_verb_is_launched(slurm, tmp_path):
    """By flags: two tasks prepare, one trains on it, samples and evaluates."""
    def launch(verb: str, *flags: str) -> None:
        number = slurm.run("sbatch", "--parsable", f"--output={tmp_path}/{verb}.log", *flags[:1],
                           "launch/slurm/train.sbatch", *flags[1:], cwd=ROOT, VERB=verb, **FAST).strip()
        wait_for_end(slurm, number)
        assert job(slurm, number) == ("COMPLETED", 0, 0), (tmp_path / f"{verb}.log").read_text()

    config = ("--config=tests/launch/tiny.py:text", f"--config.data.prepared={tmp_path}/data")
    launch("prepare", "--ntasks=2", *config)
    assert (tmp_path / "data/meta.json").exists()
    launch("train", "--ntasks=1", *config, f"--workdir={tmp_path}/run")
    launch("sample", "--ntasks=1", f"--workdir={tmp_path}/run", "--num_documents=1", "--max_images=0",
           f"--out={tmp_path}/samples")
    assert (tmp_path / "samples/documents.jsonl").read_text()
    launch("evaluate", "--ntasks=1", f"--workdir={tmp_path}/run", "--number=2")
    assert json.loads((tmp_path / "run/evaluation/metrics.json").read_text())["step"] == 3
