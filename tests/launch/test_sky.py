"""Managed jobs of SkyPilot: what is submitted, what its own parser makes of it, and what a job does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launch.stubs import ROOT, flags_of, given, one_line_error, tool
from tfusion.accelerators import CHIPS, names
from tfusion.errors import RESTARTED

RUN = ["--workdir=gs://b/runs/my run"]
# After what it prints besides, as of its own server.
SKY = """if [[ "$2" == queue ]]; then echo 'Fetching'; echo "${QUEUE:-[]}"
else cp "${*: -1}" "$CALLS.yaml"; fi"""
# What SkyPilot's own catalogue calls them (sky/catalog/__init__.py and gcp_catalog.py of 0.14.1).
KNOWN = {"A100-80GB", "H100", "H200"} | {
    f"tpu-{called}-{count}" for chip, called in dict(v4="v4", v5e="v5litepod", v5p="v5p", v6e="v6e").items()
    for count in names(CHIPS[chip])}


@pytest.fixture
def sky(engines):
    engines.answer("sky", SKY)
    return engines


def submit(sky, *args, **settings) -> tuple[dict, dict[str, str]]:
    """The task's YAML, and its variables."""
    done = sky.run("sky.sh", *args, **{"VERB": "evaluate"} | settings)
    assert done.returncode == 0, done.stderr
    call = sky.calls("sky", "jobs", "launch")[-1]
    flags = flags_of(call[:-1])
    return (yaml.safe_load(Path(f"{sky.record}.yaml").read_text()),
            dict(line.partition("=")[::2] for line in flags["--env"].split("\n")))


@pytest.mark.parametrize("topology, accelerators, nodes, version, device", [
    ("v4-16", "tpu-v4-16:1", 1, "tpu-ubuntu2204-base", "tpu"),
    ("v5litepod-16", "tpu-v5litepod-16:1", 1, "v2-alpha-tpuv5-lite", "tpu"),
    ("v5p-256", "tpu-v5p-256:1", 1, "v2-alpha-tpuv5", "tpu"),
    ("v6e-8", "tpu-v6e-8:1", 1, "v2-alpha-tpuv6e", "tpu"),
    ("h100-4", "H100:4", 1, None, "cuda13"), ("h200-16", "H200:8", 2, None, "cuda13"),
    ("a100-64", "A100-80GB:8", 8, None, "cuda13")])
def test_the_machines(sky, topology, accelerators, nodes, version, device):
    task, variables = submit(sky, *RUN, TOPOLOGY=topology, SPOT="1")
    resources = task["resources"]
    assert (resources["accelerators"], task["num_nodes"], resources["use_spot"]) == (accelerators, nodes, True)
    assert accelerators.split(":")[0] in KNOWN
    assert resources.get("accelerator_args") == ({"runtime_version": version} if version else None)
    assert (variables["DEVICE"], variables["VERB"], variables["RESTARTS"]) == (device, "evaluate", "20")
    assert variables["JAX_COMPILATION_CACHE_DIR"] == "gs://b/runs/compilation_cache"


@pytest.mark.parametrize("verb, args", [
    ("prepare", ["--config=a.py", "--config.data.prepared=/data/prepared"]),
    ("sample", ["--workdir=gs://b/x", "--prompt=a 'red' house", "--num_documents=30000"]),
    ("evaluate", ["--workdir=gs://b/x"])])
def test_every_verb_is_launched(sky, verb, args):
    task, variables = submit(sky, *args, TOPOLOGY="h100-8", VERB=verb, SHARED="/data")
    assert task["resources"]["use_spot"] is False
    status, runs = run(sky, task["run"], variables, ends="0")
    assert status == 0 and runs == [["python", "-m", f"tfusion.{verb}", *args]]


def run(sky, script: str, variables: dict[str, str], ends: str, **node: str) -> tuple[int, list[list[str]]]:
    """The job on one machine, where Python ends with these statuses one after the other."""
    left = sky.record.parent / "ends"
    left.write_text(ends.replace(" ", "\n") + "\n")
    sky.answer("python", f"""if [[ "$1" == -c ]]; then exec {sys.executable} "$@"; fi
env -0 >"$CALLS.env"; status=$(head -n 1 {left}); sed -i 1d {left}; exit "$status" """)
    # Of the PATH that the script makes, .venv/bin/python would come before ours.
    place = sky.record.parent / "work"
    place.mkdir(exist_ok=True)
    for name in ("launch", "tfusion"):
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to(ROOT / name)
    before = len(sky.calls("python", "-m"))
    done = subprocess.run(["bash", "-c", script], cwd=place, capture_output=True, text=True, timeout=60,
                          env=sky.environment(**variables, **{"SKYPILOT_NUM_NODES": "1"} | node))
    (sky.bin / "python").unlink()
    return done.returncode, sky.calls("python", "-m")[before:]


@pytest.mark.parametrize("ends, status, number", [
    ("0", 0, 1), (" ".join(map(str, RESTARTED)) + " 0", 0, len(RESTARTED) + 1), ("42 1 0", 1, 2), ("1 0", 1, 1),
    ("42 42 42 42 0", 42, 3)])
def test_what_is_restarted_on_the_machine(sky, ends, status, number):
    task, variables = submit(sky, *RUN, TOPOLOGY="v6e-8", RESTARTS="2" if number == 3 else "9")
    ended, runs = run(sky, task["run"], variables, ends)
    assert (ended, len(runs)) == (status, number)


def test_several_machines_of_gpus_find_each_other(sky):
    task, variables = submit(sky, *RUN, TOPOLOGY="h100-16")
    node = dict(SKYPILOT_NODE_IPS="10.0.0.2\n10.0.0.3", SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK="1")
    assert run(sky, task["run"], variables, "0", **node)[0] == 0
    environment = given(sky)
    assert [environment[f"JAX_{name}"] for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")] == [
        "10.0.0.2:8476", "2", "1"]
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == ".9"  # what the planner counts on
    task, variables = submit(sky, *RUN, TOPOLOGY="v6e-16")  # TPUs do by themselves
    assert run(sky, task["run"], variables, "0", **node)[0] == 0
    assert "JAX_NUM_PROCESSES" not in given(sky)


@pytest.mark.parametrize("status, again", [
    ("PENDING", False), ("RUNNING", False), ("RECOVERING", False), ("SUCCEEDED", True), ("FAILED_SETUP", True),
    ("CANCELLED", True)])
def test_submitting_twice(sky, status, again):
    submit(sky, *RUN, TOPOLOGY="v6e-8")
    name = flags_of(sky.calls("sky", "jobs", "launch")[0][:-1])["--name"]
    other = "SUCCEEDED" if status == "RUNNING" else "RUNNING"  # an older job of that name
    queue = [dict(job_id=1, job_name=name, status=other), dict(job_id=2, job_name=name, status=status)]
    done = sky.run("sky.sh", *RUN, TOPOLOGY="v6e-8", VERB="evaluate", QUEUE=json.dumps(queue))
    assert done.returncode == 0, done.stderr
    assert len(sky.calls("sky", "jobs", "launch")) == 1 + again


@pytest.mark.parametrize("topology, message", [
    ("2xv6e-16", "error: SkyPilot gives one slice a job: several by launch/gke.sh or launch/tpu_vm.sh"),
    ("h100-9", "error: 'h100-9' is not a valid slice of h100"), ("tpu7x-8", "error: ")])
def test_mistakes(sky, topology, message):
    error = one_line_error(sky.run("sky.sh", *RUN, TOPOLOGY=topology, VERB="evaluate"))
    assert error.startswith(message) and not sky.calls("sky", "jobs", "launch")


@pytest.mark.parametrize("queue, message", [
    ("\x1b[2mFetching\x1b[0m\n[]", ""), ("[INFO] up\n[ ]\nbye", ""),
    ("\x1b[2mNo jobs\x1b[0m", "error: sky jobs queue --output=json says no JSON: "),
    ("[{", "error: sky jobs queue")])
def test_what_comes_with_the_queue(sky, queue, message):
    done = sky.run("sky.sh", *RUN, TOPOLOGY="v6e-8", VERB="evaluate", QUEUE=queue)
    assert bool(sky.calls("sky", "jobs", "launch")) == (not message)
    if message:
        assert one_line_error(done).startswith(message)


def test_no_sky(engines):
    error = one_line_error(engines.run("sky.sh", *RUN, TOPOLOGY="v6e-8"))
    assert error.startswith("error: sky not found: pip install 'skypilot[gcp]==0.14.1'")


PARSE = """
import json, sys, sky
found = []
for path in sys.argv[1:]:
    task = sky.Task.from_yaml(path)
    (one,) = task.resources
    found.append([one.accelerators, one.accelerator_args, one.use_spot, one.job_recovery, task.num_nodes])
print(json.dumps(found))
"""


@pytest.mark.cluster
def test_skypilots_own_parser_takes_it(sky, tmp_path):
    """Which knows the keys, and which not whether an accelerator exists: KNOWN is for that."""
    python = Path(tool("sky")).parent / "python"
    texts = [(ROOT / "launch/sky/task.yaml").read_text()]
    for topology in ("v5litepod-16", "h100-16"):
        submit(sky, *RUN, TOPOLOGY=topology)
        texts.append(Path(f"{sky.record}.yaml").read_text())
    paths = [tmp_path / f"{number}.yaml" for number in range(len(texts))]
    for path, text in zip(paths, texts):
        path.write_text(text)
    done = subprocess.run([python, "-c", PARSE, *paths], cwd=ROOT, capture_output=True, text=True, check=True,
                          env=sky.environment(HOME=str(tmp_path)))
    recovery = {"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": 0}
    assert json.loads(done.stdout.splitlines()[-1]) == [
        [{"tpu-v6e-8": 1}, {"runtime_version": "v2-alpha-tpuv6e"}, True, recovery, 1],
        [{"tpu-v5litepod-16": 1}, {"runtime_version": "v2-alpha-tpuv5-lite"}, False, recovery, 1],
        [{"H100": 8}, None, False, recovery, 2]]
