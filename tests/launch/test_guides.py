"""Each guide, walked through as it stands there: all its commands, in their order, in one shell. The clouds'
tools are stubs that know the real ones' flags; the launch scripts are the real ones; what Python would do for
minutes is recorded, and its flags are looked for in the verbs.
"""

import re
import subprocess

import pytest

from tests.launch.stubs import ROOT, flags_of
from tests.launch.test_gke import GCLUSTER
from tests.launch.test_tpu_vm import GCLOUD

GUIDES = {name: (ROOT / "docs" / name).read_text()
          for name in ("first_slice.md", "ladder_on_v5p.md", "slurm.md")}
SLURM = {"sbatch": "echo Submitted batch job 7; touch slurm-7.out", "squeue": "", "sinfo": "", "scontrol": "",
         "scancel": ""}
POINTS = [("transfusion-0.16b-seed0", "v5p-16"), ("chameleon-7b-seed0", "v5p-512")]


def commands(text: str) -> list[str]:
    """Of the blocks marked bash, lines that are continued joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines() if line.strip()]


@pytest.fixture
def newcomer(engines):
    """A checkout whose Python only records, and a machine with stubs; returns what walks through a guide."""
    for tool, script in SLURM.items():
        engines.answer(tool, script)
    for tool in ("make", "docker"):
        engines.answer(tool, '[[ "$1" != image ]]')
    engines.answer("gcluster", GCLUSTER)
    engines.answer("gcloud", GCLOUD)
    (engines.record.parent / "calls.ends").write_text("0\n" * 9)

    def walk(name: str, frozen: list[tuple[str, str]] = POINTS) -> None:
        place = engines.checkout(frozen)
        script = "set -euxo pipefail\n" + "\n".join(commands(GUIDES[name]))
        done = subprocess.run(["bash", "-c", script], cwd=place, capture_output=True, text=True, timeout=120,
                              env=engines.environment(POLL_S="0"))
        assert done.returncode == 0, done.stderr[-3000:]
        engines.check()
        for call in engines.calls("python", "-m"):
            if call[2] != "pip":
                check_verb(call)

    return walk


def check_verb(call: list[str]) -> None:
    """Each of its flags is defined in the verb's file."""
    verb = call[2].removeprefix("tfusion.")
    source = (ROOT / f"tfusion/{verb}.py").read_text()
    for word in call[3:]:
        name = word.removeprefix("--").partition("=")[0].partition(".")[0]
        defined = re.search(rf'(define|DEFINE)\w*\(\s*"{name}"', source)
        assert word.startswith("--") and (defined or name == "config"), f"tfusion.{verb} has no {word}"


def test_a_first_slice(engines, newcomer):
    newcomer("first_slice.md")
    assert [call[4:6] for call in engines.calls("gcloud", "compute", "tpus")
            if call[4] in ("create", "delete")] == [["create", "first"], ["delete", "first"]]
    ssh = engines.calls("gcloud", "compute", "tpus", "queued-resources", "ssh")
    ran = [flags_of(call)["--command"] for call in ssh]
    ran = [re.search(r"exec python -m (.*)'", command)[1] for command in ran if "exec python" in command]
    assert ran == ["tfusion.train --config=experiments/quickstart.py --config.data.prepared=data "
                   "--workdir=gs://my-bucket/runs/first", "tfusion.evaluate --workdir=gs://my-bucket/runs/first"]
    assert not (engines.record.parent / "calls.slice").exists()  # nothing is left that costs


def test_the_ladder(engines, newcomer):
    newcomer("ladder_on_v5p.md")
    jobs = [flags_of(call) for call in engines.calls("gcluster", "job", "submit")]
    assert [job["--command"].split("exec python -m ")[1].split()[0] for job in jobs] == [
        "tfusion.prepare", "tfusion.prepare", "tfusion.sweep", "tfusion.sweep"]
    for job in jobs:  # gcluster would take a folder for a part of the bucket's name
        assert re.fullmatch(r"gs://[a-z-]+;/tfusion/data;rw", job["--mount"])
    assert [job["--topology"] for job in jobs] == ["2x2x1", "2x2x1", "2x2x2", "4x8x8"]
    assert jobs[-1]["--command"].endswith(
        "tfusion.sweep --out=gs://my-bucket/sweeps/paper --point=chameleon-7b-seed0")


def test_a_gpu_node(engines, newcomer):
    newcomer("slurm.md", [("a", ""), ("b", "h100-16")])
    jobs = [call[1:] for call in engines.calls("sbatch")]
    behind = [call[call.index("launch/slurm/train.sbatch") + 1:] for call in jobs]
    verbs = ["train", "train", "prepare", "sample", "evaluate", *["sweep"] * 4]
    for verb, flags in zip(verbs, behind, strict=True):
        check_verb(["python", "-m", f"tfusion.{verb}", *flags])
    assert sorted(call[1] for call in jobs[5:]) == ["--array=0", "--array=0", "--array=1", "--array=1"]


@pytest.mark.parametrize("name", GUIDES)
def test_commands_are_explained_and_pages_exist(name):
    """Each variable and flag of a launch script in a guide is spoken of outside the commands too."""
    text = GUIDES[name]
    prose = re.sub(r"^```bash\n.*?^```", "", text, flags=re.M | re.S) + (ROOT / "launch/README.md").read_text()
    for line in commands(text):
        if "launch/" in line:
            for word in re.findall(r"\b([A-Z_]{4,})=", line.partition("launch/")[0]):
                assert word in prose, f"{word} is not explained"
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (ROOT / "docs" / link).exists(), link
    for word in ("hangs", "preempted", "out of memory", "none of it has been run"):
        assert word in text.lower()
