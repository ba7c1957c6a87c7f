"""A slice that is rented, used and given back: gcloud is a stub that keeps the slice's state in a file."""

import os
import re
import shutil
import signal
import subprocess
import threading
import time

import pytest

from tests.launch.stubs import ROOT, flags_of, one_line_error, run_remotely
from tfusion.accelerators import CHIPS

# Any verb does: of train the config is checked first, which takes seconds.
HERE = dict(TOPOLOGY="v5litepod-16", ZONE="us-west4-a", PROJECT="p", POLL_S="0", VERB="evaluate")
RUN = ["--workdir=gs://b/runs/x"]
# A queue of statuses that the runs end with, and what becomes of the slice with each: "42", "1 SUSPENDED", ...
# Of a MUTE slice gcloud cannot say what it is, of an OFFLINE one not at first, a STUCK one cannot be deleted
# either. Files tell it what to do:
# calls.hold: installing takes until it is gone; calls.wait: a run takes until it is stopped; calls.term: the
# process that is told to stop when the second of two slices is asked for; calls.unreachable: no ssh.
GCLOUD = """slice="$CALLS.slice${SLICES:+.$5}" ends="$CALLS.ends"
case "$*" in
  "compute "*" create "*)
    if [[ -n "${NOQUOTA-}" ]]; then echo "ERROR: quota" >&2; exit 1; fi
    echo WAITING_FOR_RESOURCES >"$slice"
    if [[ -n "${TIMEOUT-}" ]]; then echo "ERROR: no answer" >&2; exit 1; fi ;;
  "compute "*" describe "*)
    if [[ -f "$CALLS.term" && "$*" == *second* ]]; then
      until [[ -f "$CALLS.runs" ]]; do sleep .05; done
      kill -TERM $(cat "$CALLS.term"); rm "$CALLS.term"
    fi
    if [[ ! -f "$slice" ]]; then echo "ERROR: (gcloud) NOT_FOUND: no such slice" >&2; exit 1; fi
    is=$(cat "$slice")
    case $is in
      OFFLINE) echo ACTIVE >"$slice"; echo "ERROR: (gcloud) no network" >&2; exit 1 ;;
      MUTE | STUCK) echo "ERROR: (gcloud) try again" >&2; exit 1 ;;
      DELETING) rm "$slice" ;;
      WAITING_FOR_RESOURCES) echo ${GIVEN-ACTIVE} >"$slice" ;;
    esac
    echo "WARNING: something"; echo "$is" ;;
  "compute "*" delete "*) [[ $(cat "$slice") != STUCK ]] && rm "$slice" ;;
  *" scp "*) for word; do if [[ "$word" == *.tgz ]]; then tar -tzf "$word" >"$CALLS.files"; fi; done ;;
  *install.sh*)
    touch "$CALLS.installs"; while [[ -f "$CALLS.hold" ]]; do sleep .05; done
    exit ${INSTALLED:-0} ;;
  *"python -m"*)
    if [[ -f "$CALLS.wait" ]]; then
      touch "$CALLS.runs"; until [[ -f "$CALLS.stopped" ]]; do sleep .05; done; exit 42
    fi
    end=$(head -n 1 "$ends"); sed -i 1d "$ends"
    set -- $end
    if [[ -n "${2-}" ]]; then echo "$2" >"$slice"; fi
    exit "${1:-0}" ;;
  *"kill -TERM"*) touch "$CALLS.stopped" ;;
  *" ssh "*)
    if [[ -f "$CALLS.unreachable" ]]; then exit 255; fi
    mkdir -p "$CALLS.host"; cd "$CALLS.host"
    for word; do if [[ "$word" == --command=* ]]; then bash -c "${word#*=}"; fi; done ;;
esac"""


@pytest.fixture
def cloud(engines):
    engines.answer("gcloud", GCLOUD)
    return engines


def started(cloud, *args, **given) -> subprocess.Popen:
    return subprocess.Popen([cloud.root / "launch/tpu_vm.sh", *args], env=cloud.environment(**HERE | given),
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


def wait_for(path, script: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline and script.poll() is None
        time.sleep(0.05)


def run(cloud, *args, ends="0", **given):
    (cloud.record.parent / "calls.ends").write_text(ends.replace(", ", "\n") + "\n")
    return cloud.run("tpu_vm.sh", *args, **HERE | given)


def put_on_host(home) -> None:
    (home / "tfusion/launch").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "launch/detached.sh", home / "tfusion/launch")


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
    put_on_host(home)
    words, environment, status = run_remotely(cloud, f"cd {home}; {ssh['--command']}", status=42)
    assert (words[1:], status) == (["-m", "tfusion.evaluate", *RUN], 42)
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
    # A run that lost its ssh: it is told to save, and only then the new files come.
    old = subprocess.Popen(["bash", "-c", "trap 'sleep .5; ls -A tfusion >seen; exit 42' TERM; touch trapped; "
                            "while :; do sleep .05; done"], cwd=tmp_path)
    wait_for(tmp_path / "trapped", old)
    threading.Thread(target=old.wait).start()  # whose process would else stay, as one that nobody asked for
    (tmp_path / "tfusion.pid").write_text(f"{old.pid}\n")
    subprocess.run(["tar", "-czf", tmp_path / "tfusion.tgz", "-C", tmp_path / "new", "."], check=True)
    cloud.answer("gcloud", "touch tfusion/data/copied")
    subprocess.run(["bash", "-c", setup["--command"]], check=True, cwd=tmp_path, env=cloud.environment())
    assert (old.returncode, "old.py" in (tmp_path / "seen").read_text()) == (42, True)
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
    ("1 MUTE, 0", 1, 1, ["create", "delete"]),  # gcloud cannot say whether it is still there
    ("42 DELETING, 0", 0, 2, ["create", "create", "delete"]),
])
def test_what_is_restarted(cloud, ends, status, number, of_slices):
    done = run(cloud, *RUN, ends=ends, **({"RESTARTS": "2"} if ends.startswith("42, 42") else {}))
    assert (done.returncode, len(runs(cloud)), slices(cloud)) == (status, number, of_slices), done.stderr
    assert done.stdout.splitlines()[-1].endswith(f"ended with status {status}")


@pytest.mark.parametrize("ends, status, number, installs, of_slices, given", [
    ("255, 255, 0", 0, 3, 1, ["create", "delete"], {}),  # the same run, looked for again
    ("255 OFFLINE, 255 OFFLINE, 0", 0, 3, 1, ["create", "delete"], dict(RESTARTS="0")),  # no network
    ("255 SUSPENDED, 0", 0, 2, 2, ["create", "delete", "create", "delete"], {}),
    ("255, 255, 255, 255, 0", 255, 4, 2, ["create", "delete"], dict(RESTARTS="1"))])
def test_a_lost_connection_is_no_restart(cloud, ends, status, number, installs, of_slices, given):
    done = run(cloud, *RUN, ends=ends, **given)
    assert (done.returncode, len(runs(cloud)), slices(cloud)) == (status, number, of_slices), done.stderr
    assert len(cloud.calls("gcloud", "compute", "tpus", "queued-resources", "scp")) == installs
    assert len({flags["--command"] for flags in runs(cloud)}) == installs  # a host knows it by that


def test_a_run_goes_on_where_ssh_fails(cloud):
    """Real processes on the host: its ssh is killed, and what it was given is given again."""
    home = cloud.record.parent
    host = home / "calls.host"
    put_on_host(host)
    (host / "tfusion/.venv/bin").mkdir(parents=True)
    python = host / "tfusion/.venv/bin/python"
    python.write_text("""#!/usr/bin/env bash
if [[ "$1" == -c ]]; then exit 0; fi
echo begun; echo $$ >>"$CALLS.begun"
for _ in {1..1200}; do if [[ -f "$CALLS.go" ]]; then break; fi; sleep .05; done
echo ended; exit 1
""")
    python.chmod(0o755)
    cloud.answer("gcloud", """if [[ "$*" == *"python -m"* ]]; then
  for word; do [[ "$word" != --command=* ]] || command=${word#*=}; done
  cd "$CALLS.host"
  if [[ -f "$CALLS.begun" ]]; then touch "$CALLS.go"; exec bash -c "$command"; fi
  bash -c "exec $command" &
  for _ in {1..600}; do if [[ -f "$CALLS.begun" ]]; then break; fi; sleep .05; done
  kill -KILL $!; exit 255
fi
""" + GCLOUD)
    done = run(cloud, *RUN, RESTARTS="1")
    assert done.returncode == 1, done.stderr
    assert len((home / "calls.begun").read_text().split()) == 1
    assert "connection lost" in done.stdout and "ended" in done.stdout.splitlines()
    assert slices(cloud) == ["create", "delete"]


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
    home = cloud.record.parent
    (home / "calls.slice").write_text("ACTIVE\n")
    (home / "calls.host").mkdir()
    pid, mark = (home / "calls.host" / name for name in ("tfusion.pid", "tfusion.mark"))
    unreachable = home / "calls.unreachable"

    def left_alone() -> bool:
        done = run(cloud, *RUN, HOSTNAME="here")
        assert done.returncode == 0, done.stderr
        return "queued or running, left alone" in done.stdout and not runs(cloud)

    pid.write_text(f"{os.getpid()}\n")
    assert left_alone()
    pid.unlink()
    unreachable.touch()
    assert left_alone()
    unreachable.unlink()
    mark.write_text("there\n")  # another machine's script is installing there
    assert left_alone()
    os.utime(mark, (1, 1))  # nobody is there, as after a script was killed: it is taken up again
    assert not left_alone()
    assert len(runs(cloud)) == 1 and slices(cloud) == ["delete"]


def test_a_slice_that_is_kept(cloud):
    done = run(cloud, *RUN, KEEP="1")
    assert slices(cloud) == ["create"] and "stays, and costs" in done.stdout


@pytest.mark.parametrize("given, message, of_slices", [
    (dict(GIVEN="FAILED"), "error: evaluate-x-[0-9a-f]{8}: no such slice within 6h .FAILED.: another ZONE", 2),
    (dict(INSTALLED="1"), "error: evaluate-x-[0-9a-f]{8}: installing failed, see above", 2),
    (dict(NOQUOTA="1"), "ERROR: quota", 1), (dict(TIMEOUT="1"), "ERROR: no answer", 2)])
def test_what_fails_before_the_run_leaves_no_slice(cloud, given, message, of_slices):
    done = run(cloud, *RUN, **given)
    assert done.returncode == 1 and re.match(message, done.stderr), done.stderr
    assert not runs(cloud) and len(slices(cloud)) == of_slices
    assert not (cloud.record.parent / "calls.slice").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_it_saves_and_gives_the_slice_back(cloud, number):
    home = cloud.record.parent
    (home / "calls.wait").touch()
    script = started(cloud, *RUN)
    wait_for(home / "calls.runs", script)
    if number == signal.SIGINT:
        os.killpg(script.pid, number)  # as a terminal does it: to all
    else:
        script.send_signal(number)
    out, err = script.communicate(timeout=60)
    assert script.returncode == 42, (out, err)
    assert (home / "calls.stopped").exists() and slices(cloud) == ["create", "delete"]



def test_a_stop_while_it_waits_for_a_slice(cloud):
    script = started(cloud, *RUN, GIVEN="WAITING_FOR_RESOURCES", POLL_S=".1")
    wait_for(cloud.record.parent / "calls.slice", script)
    script.send_signal(signal.SIGTERM)
    out, err = script.communicate(timeout=60)
    assert script.returncode == 42, (out, err)
    assert slices(cloud) == ["create", "delete"] and not (cloud.record.parent / "calls.installs").exists()


def test_a_stop_while_a_sweep_is_submitted(cloud):
    """The first of two runs already: it saves, and the second gets no slice."""
    home = cloud.record.parent
    cloud.checkout([("first", "v5p-8"), ("second", "v5p-8")])
    (home / "calls.wait").touch()
    script = started(cloud, "--sweep=gs://b/x", SLICES="2")
    (home / "calls.term").write_text(f"{script.pid}\n")
    out, err = script.communicate(timeout=60)
    assert script.returncode == 42, (out, err)
    assert slices(cloud) == ["create", "delete"] and not list(home.glob("calls.slice*")), (out, err)


def test_a_sweep_has_a_slice_a_point(cloud):
    cloud.checkout([("first", "v5p-8"), ("second", "v5p-16")])
    done = run(cloud, "--sweep=gs://b/x", SLICES="2", ends="0, 0")
    assert done.returncode == 0, done.stderr
    assert sorted(slices(cloud)) == ["create", "create", "delete", "delete"] and len(runs(cloud)) == 2


def test_an_error_while_submitting_leaves_no_slice(cloud):
    """The second point's slice cannot be asked for: the first is stopped, saved and given back."""
    home = cloud.record.parent
    cloud.checkout([("first", "v5p-8"), ("second", "v5p-8")])
    (home / "calls.wait").touch()
    cloud.answer("gcloud", """if [[ "$*" == *describe*second* ]]; then
  until [[ -f "$CALLS.runs" ]]; do sleep .05; done; echo "ERROR: try again" >&2; exit 1
fi
""" + GCLOUD)
    done = run(cloud, "--sweep=gs://b/x", SLICES="2")
    assert done.returncode == 1 and "error: gcloud cannot say what second-" in done.stderr
    assert slices(cloud) == ["create", "delete"] and not list(home.glob("calls.slice*"))


def test_the_same_command_while_it_installs_is_left_alone(cloud):
    home = cloud.record.parent
    (home / "calls.hold").touch()
    script = started(cloud, *RUN, HOSTNAME="here")
    wait_for(home / "calls.installs", script)
    for other in (dict(HOSTNAME="here"), dict(HOSTNAME="there", XDG_CACHE_HOME=str(home / "theirs"))):
        done = run(cloud, *RUN, **other)
        assert done.returncode == 0 and "queued or running, left alone" in done.stdout, done.stderr
    assert slices(cloud) == ["create"]
    (home / "calls.hold").unlink()
    out, err = script.communicate(timeout=60)
    assert script.returncode == 0, (out, err)
    assert len(runs(cloud)) == 1 and slices(cloud) == ["create", "delete"]


@pytest.mark.parametrize("becomes, status, deletes", [("MUTE", 0, 1), ("STUCK", 1, 3)])
def test_a_slice_of_which_nothing_can_be_said_is_given_back_or_named(cloud, becomes, status, deletes):
    done = run(cloud, *RUN, ends=f"0 {becomes}")
    assert (done.returncode, slices(cloud)) == (status, ["create"] + ["delete"] * deletes), done.stderr
    named = re.search("^error: evaluate-x-[0-9a-f]{8} may still be there, and cost: gcloud compute tpus "
                      "queued-resources list --zone=us-west4-a --project=p$", done.stderr, re.M)
    assert bool(named) == (becomes == "STUCK")


def test_nothing_is_rented_where_gcloud_cannot_say_what_there_is(cloud):
    (cloud.record.parent / "calls.slice").write_text("MUTE\n")
    error = one_line_error(run(cloud, *RUN))
    assert error.startswith("error: gcloud cannot say what evaluate-x-") and not slices(cloud)


@pytest.mark.parametrize("verb, flags, taken", [
    ("evaluate", ["--workdir=data/run"], False), ("sample", [*RUN, "--out=data/x"], False),
    ("prepare", ["--config.data.prepared=data/x"], False),
    ("prepare", ["--config.data.prepared=gs://b/x", "--codec=data/vae"], True),
    ("evaluate", [*RUN, "--config.data.prepared=data"], True),
    ("evaluate", [*RUN, "--config.data.prepared=data2"], False)])
def test_only_what_is_read_may_lie_on_the_hosts_own_disk(cloud, verb, flags, taken):
    done = run(cloud, *flags, VERB=verb, DATA="gs://b/d")
    assert len(runs(cloud)) == taken
    if not taken:
        assert ": workers do not see this machine's folders" in one_line_error(done)
