"""A slice that is rented, used and given back: gcloud is a stub that keeps the slice's state in a file."""

import os
import re
import signal
import subprocess
import time

import pytest

from tests.launch.stubs import ROOT, flags_of, run_remotely
from tfusion.accelerators import CHIPS

HERE = dict(TOPOLOGY="v5litepod-16", ZONE="us-west4-a", PROJECT="p", POLL_S="0")
RUN = ["--config=experiments/quickstart.py", "--workdir=gs://b/runs/x"]
# A queue of statuses that the runs end with, and what becomes of the slice with each: "42", "1 SUSPENDED", ...
GCLOUD = """slice="$CALLS.slice" ends="$CALLS.ends"
case "$*" in
  "compute "*" create "*)
    if [[ -n "${NOQUOTA-}" ]]; then echo "ERROR: quota" >&2; exit 1; fi
    echo WAITING_FOR_RESOURCES >"$slice" ;;
  "compute "*" describe "*)
    if [[ ! -f "$slice" ]]; then echo "ERROR: (gcloud) NOT_FOUND: no such slice" >&2; exit 1; fi
    echo "WARNING: something"; cat "$slice"
    if [[ $(cat "$slice") == WAITING_FOR_RESOURCES ]]; then echo ${GIVEN-ACTIVE} >"$slice"; fi ;;
  "compute "*" delete "*) rm "$slice" ;;
  *" scp "*) for word; do if [[ "$word" == *.tgz ]]; then tar -tzf "$word" >"$CALLS.files"; fi; done ;;
  *"kill -0"*) [[ -f "$CALLS.alive" ]] ;;
  *"kill -TERM"*) touch "$CALLS.stopped" ;;
  *install.sh*) exit ${INSTALLED:-0} ;;
  *" ssh "*)
    if [[ -f "$CALLS.wait" ]]; then
      touch "$CALLS.runs"; until [[ -f "$CALLS.stopped" ]]; do sleep .05; done; exit 42
    fi
    end=$(head -n 1 "$ends"); sed -i 1d "$ends"
    set -- $end
    if [[ -n "${2-}" ]]; then echo "$2" >"$slice"; fi
    exit "${1:-0}" ;;
esac"""


@pytest.fixture
def cloud(engines):
    engines.answer("gcloud", GCLOUD)
    return engines


def run(cloud, *args, ends="0", **given):
    (cloud.record.parent / "calls.ends").write_text(ends.replace(", ", "\n") + "\n")
    return cloud.run("tpu_vm.sh", *args, **HERE | given)


def slices(cloud) -> list[str]:
    """What was done to slices, in its order."""
    return [call[4] for call in cloud.calls("gcloud", "compute", "tpus") if call[4] in ("create", "delete")]


def runs(cloud) -> list[dict[str, str]]:
    ssh = map(flags_of, cloud.calls("gcloud", "compute", "tpus", "queued-resources", "ssh"))
    return [flags for flags in ssh if "python -m" in flags["--command"]]


def test_a_run(cloud):
    done = run(cloud, *RUN, SPOT="1", DATA="gs://b/data")
    assert done.returncode == 0, done.stderr
    (create,) = cloud.calls("gcloud", "compute", "tpus", "queued-resources", "create")
    assert flags_of(create) == {
        "--zone": "us-west4-a", "--project": "p", "--node-id": create[5], "--accelerator-type": "v5litepod-16",
        "--runtime-version": "v2-alpha-tpuv5-lite", "--valid-until-duration": "6h", "--spot": ""}
    (ssh,) = runs(cloud)
    assert (ssh["--node"], ssh["--worker"], ssh["--batch-size"]) == ("all", "all", "all")  # else 64 at a time
    home = cloud.record.parent
    (home / "tfusion/.venv/bin").mkdir(parents=True)
    words, environment, status = run_remotely(cloud, f"cd {home}; {ssh['--command']}", status=42)
    assert (words[1:], status) == (["-m", "tfusion.train", *RUN], 42)
    assert "LIBTPU_INIT_ARGS" in environment
    assert (home / "tfusion.pid").read_text().strip().isdecimal()
    assert slices(cloud) == ["create", "delete"]
    assert done.stdout.splitlines()[-1].endswith("ended with status 0")


def test_the_code_is_put_on_every_host(cloud, tmp_path):
    run(cloud, *RUN, DATA="gs://b/data")
    (scp,) = cloud.calls("gcloud", "compute", "tpus", "queued-resources", "scp")
    assert flags_of([word for word in scp if not word.endswith((".tgz", ":"))])["--worker"] == "all"
    files = set((cloud.record.parent / "calls.files").read_text().split())
    assert {"tfusion/train.py", "experiments/quickstart.py", "launch/install.sh", "requirements.txt"} <= files
    assert {name.split("/")[0] for name in files} == {"tfusion", "experiments", "launch", "requirements.txt"}
    ssh = map(flags_of, cloud.calls("gcloud", "compute", "tpus", "queued-resources", "ssh"))
    (setup,) = [flags for flags in ssh if "install.sh" in flags["--command"]]
    assert setup["--worker"] == setup["--node"] == "all"
    # As a host does it, twice: what was installed and copied stays, other files are the new ones.
    (tmp_path / "new/launch").mkdir(parents=True)
    (tmp_path / "new/launch/install.sh").write_text("#!/bin/bash\necho $1 >tfusion/.venv/installed\n")
    (tmp_path / "new/launch/install.sh").chmod(0o755)
    (tmp_path / "tfusion/.venv").mkdir(parents=True)
    (tmp_path / "tfusion/old.py").touch()
    subprocess.run(["tar", "-czf", tmp_path / "tfusion.tgz", "-C", tmp_path / "new", "."], check=True)
    cloud.answer("gcloud", "touch tfusion/data/copied")
    subprocess.run(["bash", "-c", setup["--command"]], check=True, cwd=tmp_path, env=cloud.environment())
    assert (tmp_path / "tfusion/.venv/installed").read_text() == "tpu\n"
    assert cloud.calls("gcloud", "storage")[-1][2:] == ["rsync", "-r", "gs://b/data", "tfusion/data"]
    assert not (tmp_path / "tfusion/old.py").exists()


@pytest.mark.parametrize("ends, status, number, of_slices", [
    ("42, 0", 0, 2, ["create", "delete"]),  # preempted and saved
    ("134, 137, 139, 143, 255, 0", 0, 6, ["create", "delete"]),  # 255: ssh's own
    ("1, 0", 1, 1, ["create", "delete"]),  # the user's error: never again
    ("2, 0", 2, 1, ["create", "delete"]),
    ("1 SUSPENDED, 0", 0, 2, ["create", "delete", "create", "delete"]),  # taken away: another slice
    ("42, 42, 42, 0", 42, 3, ["create", "delete"]),  # RESTARTS=2
])
def test_what_is_restarted(cloud, ends, status, number, of_slices):
    done = run(cloud, *RUN, ends=ends, **({"RESTARTS": "2"} if ends.startswith("42, 42") else {}))
    assert (done.returncode, len(runs(cloud)), slices(cloud)) == (status, number, of_slices), done.stderr


def test_several_slices_and_other_chips(cloud):
    run(cloud, *RUN, TOPOLOGY="2xv5p-128")
    (create,) = cloud.calls("gcloud", "compute", "tpus", "queued-resources", "create")
    flags = flags_of(create)
    assert (flags["--node-count"], flags["--node-prefix"]) == ("2", create[5]) and "--node-id" not in flags
    assert (flags["--accelerator-type"], flags["--runtime-version"]) == ("v5p-128", "v2-alpha-tpuv5")
    assert "--spot" not in flags


@pytest.mark.parametrize("chip", [name for name in CHIPS if name == "tpu7x"])
def test_ironwood_is_an_instance(cloud, chip):
    image = "--image-family=f --image-project=p"
    done = run(cloud, *RUN, TOPOLOGY="tpu7x-8", GIVEN="RUNNING", ENGINE_FLAGS=image, SPOT="1")
    assert done.returncode == 0, done.stderr
    (create,) = cloud.calls("gcloud", "compute", "instances", "create")
    flags = flags_of(create)
    assert flags["--machine-type"] == "tpu7x-standard-4t" and flags["--provisioning-model"] == "SPOT"
    assert cloud.calls("gcloud", "compute", "instances", "delete") and not slices(cloud)
    for given in (dict(TOPOLOGY="tpu7x-128", ENGINE_FLAGS=image), dict(TOPOLOGY="tpu7x-8")):
        done = run(cloud, *RUN, GIVEN="RUNNING", **given)
        assert done.returncode == 1 and ("gke.sh" in done.stderr or "--image-family" in done.stderr)


def test_a_slice_where_it_runs_already_is_left_alone(cloud):
    state, alive = (cloud.record.parent / name for name in ("calls.slice", "calls.alive"))
    state.write_text("ACTIVE\n")
    alive.touch()
    done = run(cloud, *RUN)
    assert done.returncode == 0 and "queued or running, left alone" in done.stdout
    assert not runs(cloud) and state.exists()
    alive.unlink()  # nobody runs there, as after this script was killed: it is taken up again
    assert run(cloud, *RUN).returncode == 0
    assert len(runs(cloud)) == 1 and slices(cloud) == ["delete"]


def test_a_slice_that_is_kept(cloud):
    done = run(cloud, *RUN, KEEP="1")
    assert slices(cloud) == ["create"] and "stays, and costs" in done.stdout


@pytest.mark.parametrize("given, message, of_slices", [
    (dict(GIVEN="FAILED"), "error: train-x-[0-9a-f]{8}: no such slice within 6h .FAILED.: another ZONE", 2),
    (dict(INSTALLED="1"), "error: train-x-[0-9a-f]{8}: installing failed, see above", 2),
    (dict(NOQUOTA="1"), "ERROR: quota", 1)])
def test_what_fails_before_the_run_leaves_no_slice(cloud, given, message, of_slices):
    done = run(cloud, *RUN, **given)
    assert done.returncode == 1 and re.match(message, done.stderr), done.stderr
    assert not runs(cloud) and len(slices(cloud)) == of_slices
    assert not (cloud.record.parent / "calls.slice").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_it_saves_and_gives_the_slice_back(cloud, number):
    home = cloud.record.parent
    (home / "calls.wait").touch()
    script = subprocess.Popen([ROOT / "launch/tpu_vm.sh", *RUN], env=cloud.environment(**HERE), text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                              preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    deadline = time.monotonic() + 60
    while not (home / "calls.runs").exists():
        assert time.monotonic() < deadline and script.poll() is None
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(script.pid, number)  # as a terminal does it: to all
    else:
        script.send_signal(number)
    out, err = script.communicate(timeout=60)
    assert script.returncode == 42, (out, err)
    assert (home / "calls.stopped").exists() and slices(cloud) == ["create", "delete"]

