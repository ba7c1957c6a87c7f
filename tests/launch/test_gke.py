"""Jobs on GKE by Cluster Toolkit: what gcluster is told, and what the job then does."""

import pytest

from tests.launch.stubs import flags_of, one_line_error, run_remotely, sweep
from tfusion.accelerators import CHIPS
from tfusion.errors import RESTARTED

# What they do with any verb is tried with this one: the config of train is checked first, which takes seconds.
HERE = dict(IMAGE="us-docker.pkg.dev/p/r/tfusion:1", CLUSTER="c", LOCATION="us-east5", VERB="evaluate")
RUN = ["--workdir=gs://b/runs/my run"]
TRAIN = ["--config=experiments/transfusion.py:7b", "--config.mesh.data=2", *RUN]
GCLUSTER = """cat >/dev/null  # it may ask something
case "$1 ${2-}" in
  --version*) echo "gcluster version v${VERSION-1.103.0}"; echo "Built from 'main' branch." ;;
  *list) echo "NAME  STATUS  CREATION_TIME  COMPLETION_TIME"; echo "${LISTED-}" ;;
esac"""


@pytest.fixture
def gke(engines):
    engines.answer("gcluster", GCLUSTER)
    return engines


def submitted(engines) -> list[dict[str, str]]:
    return [flags_of(call) for call in engines.calls("gcluster", "job", "submit")]


def test_a_job(gke):
    done = gke.run("gke.sh", *TRAIN, TOPOLOGY="2xv5p-256", **HERE | {"VERB": ""})
    assert done.returncode == 0, done.stderr
    (flags,) = submitted(gke)
    command = flags.pop("--command")
    assert flags == {
        "--cluster": "c", "--location": "us-east5", "--name": flags["--name"], "--image": HERE["IMAGE"],
        "--compute-type": "ct5p-hightpu-4t", "--topology": "4x4x8", "--num-slices": "2", "--restarts": "20",
        "--restart-on-exit-codes": ",".join(map(str, RESTARTED)), "--grace-period": "600s"}
    words, environment, status = run_remotely(gke, command, status=42)
    assert (words[1:], status) == (["-m", "tfusion.train", *TRAIN], 42)
    assert "--xla_tpu_enable_async_collective_fusion=true" in environment["LIBTPU_INIT_ARGS"].split()
    assert environment["JAX_COMPILATION_CACHE_DIR"] == "gs://b/runs/compilation_cache"
    assert 1 not in RESTARTED


def test_python_takes_the_place_of_the_shell(gke):
    """Else SIGTERM would reach a shell, which dies of it or waits, and the run would not be saved."""
    gke.run("gke.sh", *RUN, TOPOLOGY="v5p-8", **HERE)
    (flags,) = submitted(gke)
    assert "; exec python -m tfusion.evaluate " in flags["--command"]


@pytest.mark.parametrize("topology, machine, shape", [
    ("v4-8", "ct4p-hightpu-4t", "2x2x1"), ("v5litepod-1", "ct5lp-hightpu-1t", "1x1"),
    ("v5litepod-8", "ct5lp-hightpu-8t", "2x4"), ("v5litepod-16", "ct5lp-hightpu-4t", "4x4"),
    ("v5p-8", "ct5p-hightpu-4t", "2x2x1"), ("v6e-8", "ct6e-standard-8t", "2x4"),
    ("v6e-256", "ct6e-standard-4t", "16x16")])
def test_the_machines_of_a_slice(gke, topology, machine, shape):
    gke.run("gke.sh", *RUN, TOPOLOGY=topology, **HERE)
    (flags,) = submitted(gke)
    assert (flags["--compute-type"], flags["--topology"], flags["--num-slices"]) == (machine, shape, "1")


@pytest.mark.parametrize("chip", [name for name in CHIPS if name == "tpu7x"])
def test_ironwood_runs_one_process_a_machine(gke, chip):
    gke.run("gke.sh", *RUN, TOPOLOGY="tpu7x-128", **HERE)
    (flags,) = submitted(gke)
    assert (flags["--compute-type"], flags["--topology"]) == ("tpu7x-standard-4t", "4x4x4")
    assert "--gke-disable-parallel-containers" in flags


@pytest.mark.parametrize("verb, args", [
    ("prepare", ["--config=experiments/quickstart.py", "--config.data.prepared=/data/prepared", "--codec=gs://b/vae"]),
    ("sample", ["--workdir=gs://b/runs/x", "--num_documents=30000", "--prompt=a red house", "--out=gs://b/out"]),
    ("evaluate", ["--workdir=gs://b/runs/x", "--number=5000"]),
    ("export", ["--workdir=gs://b/runs/x", "--out=/data/export"])])
def test_every_verb_is_launched(gke, verb, args):
    done = gke.run("gke.sh", *args, TOPOLOGY="v6e-8", SHARED="/data", **HERE | {"VERB": verb})
    assert done.returncode == 0, done.stderr
    (flags,) = submitted(gke)
    words, _, status = run_remotely(gke, flags["--command"])
    assert (words[1:], status) == (["-m", f"tfusion.{verb}", *args], 0)


def test_an_image_without_the_package_ends_in_one_line(gke):
    gke.run("gke.sh", *RUN, TOPOLOGY="v5p-8", **HERE)
    (flags,) = submitted(gke)
    _, _, status = run_remotely(gke, "IMPORTS=0; " + flags["--command"])
    assert status == 0
    before = len(gke.calls("python", "-m"))
    _, _, status = run_remotely(gke, "export IMPORTS=1; " + flags["--command"])
    assert status == 1 and len(gke.calls("python", "-m")) == before  # 1: never restarted


@pytest.mark.parametrize("status, again", [
    ("Pending", []), ("Running", []), ("Suspended", []), ("QuotaReserved", []),
    ("Succeeded", ["cancel", "submit"]), ("Failed", ["cancel", "submit"])])
def test_submitting_twice(gke, status, again):
    """What is queued or runs is left alone; a job that ended would keep a second one of its name out."""
    gke.run("gke.sh", *RUN, TOPOLOGY="v5p-8", **HERE)
    (flags,) = submitted(gke)
    before = len(gke.calls("gcluster", "job"))
    done = gke.run("gke.sh", *RUN, TOPOLOGY="v5p-8", LISTED=f"{flags['--name']}  {status}  now", **HERE)
    assert done.returncode == 0
    assert [call[2] for call in gke.calls("gcluster", "job")[before:]] == ["list", *again]


POINTS = """[dict(name="codec", config="experiments/quickstart.py:smoke,autoencoder", verbs=["train"]),
        dict(name="data", config="experiments/quickstart.py:smoke", verbs=["prepare"],
             overrides={"data.prepared": "{data}/shards"}, flags={"prepare": {"codec": "{codec}"}}),
        dict(name="A_long.name-of-a-point-0.76B", config="experiments/quickstart.py:smoke"),
        dict(name="A_long.name-of-a-point-0.76C", config="experiments/quickstart.py:smoke",
             overrides={"seed": 1})]"""


@pytest.mark.slow
def test_a_sweep(gke, tmp_path):
    """A job per point that can be run now; again, none; failed ones with --retry alone."""
    out = tmp_path / "sweep"
    sweep(out, POINTS)
    given = dict(SHARED=str(tmp_path), TOPOLOGY="v5p-16", **HERE)
    done = gke.run("gke.sh", f"--sweep={out}/", **given)
    assert done.returncode == 0, done.stderr
    assert "3 ready, 1 wait" in done.stderr
    jobs = submitted(gke)
    words = [run_remotely(gke, job["--command"])[0] for job in jobs]
    points = "codec", "A_long.name-of-a-point-0.76B", "A_long.name-of-a-point-0.76C"
    assert [word[1:] for word in words] == [
        ["-m", "tfusion.sweep", f"--out={out}", f"--point={point}"] for point in points]
    names = [job["--name"] for job in jobs]
    assert len(set(names)) == 3 and all(len(name) <= 28 for name in names)

    listed = "\n".join(f"{name}  {status}" for name, status in zip(names, ("Running", "Failed", "Succeeded")))
    before = len(submitted(gke))
    done = gke.run("gke.sh", f"--sweep={out}", LISTED=listed, **given)
    assert [job["--name"] for job in submitted(gke)[before:]] == names[2:]
    assert f"{names[0]}: queued or running, left alone\n{names[1]}: failed; --retry" in done.stdout
    before = len(submitted(gke))
    gke.run("gke.sh", f"--sweep={out}", "--retry", LISTED=listed, **given)
    assert [job["--name"] for job in submitted(gke)[before:]] == names[1:]


@pytest.mark.parametrize("args, given, message", [
    (RUN, dict(TOPOLOGY="v5p-255"), "error: 'v5p-255' is not a valid slice of v5p (the number counts cores); "
     "nearest: v5p-128 (4x4x4), v5p-256 (4x4x8), v5p-384 (4x4x12)"),
    (RUN, dict(TOPOLOGY="v5q-8"), "error: unknown topology 'v5q-8'; nearest: v5p-256"),
    (RUN, dict(TOPOLOGY="h100-8"), "error: h100 is no TPU: for GPUs launch/sky.sh or launch/slurm"),
    (RUN, {}, "error: TOPOLOGY is not set: "),
    (RUN, dict(TOPOLOGY="v5p-8", IMAGE=""), "error: IMAGE is not set: "),
    (["--workdir=runs/x"], dict(TOPOLOGY="v5p-8"), "error: --workdir=runs/x: workers do not see this machine"),
    (["--workdir", "runs/x"], dict(TOPOLOGY="v5p-8"), "error: --workdir=runs/x: workers do not see this"),
    (["--workdir=/data2/x"], dict(TOPOLOGY="v5p-8", SHARED="/data"), "error: --workdir=/data2/x: workers"),
    ([*RUN, "--config.data.prepared=data/x"], dict(TOPOLOGY="v5p-8"), "error: --config.data.prepared=data/x: "),
    (["--config=x.py"], dict(TOPOLOGY="v5p-8", VERB=""), "error: train needs --workdir=gs://..."),
    (["--config=x.py"], dict(TOPOLOGY="v5p-8", VERB="prepare"), "error: prepare needs --config.data.prepared="),
    (RUN, dict(TOPOLOGY="v5p-8", VERB="trian"), "error: VERB=trian is no verb: train, prepare"),
    (RUN, dict(TOPOLOGY="v5p-8", GRACE="10m"), "error: GRACE=10m is no whole number"),
    (RUN, dict(TOPOLOGY="v5p-8", RESTARTS="many"), "error: RESTARTS=many is no whole number"),
    (RUN, dict(TOPOLOGY="v5p-8", RESTARTS="08"), "error: RESTARTS=08 is no whole number"),
    (RUN, dict(TOPOLOGY="v5p-8", VERSION="1.95.0"), "error: gcluster is 1.95.0: take the bundle of"),
    (RUN, dict(TOPOLOGY="v5p-8", VERSION=" of today"), "error: gcluster is of no known version: "),
    (["--sweep=sweeps/x"], {}, "error: --out=sweeps/x: workers do not see this machine's folders"),
])
def test_mistakes_are_found_before_anything_is_submitted(gke, args, given, message):
    error = one_line_error(gke.run("gke.sh", *args, **HERE | given))
    assert error.startswith(message), error
    assert not submitted(gke)


@pytest.mark.parametrize("flags, message", [
    (["--config.mesh.fsdp=64"], "error: mesh data=2 x fsdp=64"), 
    (["--config.no.such=1"], "error: unknown config key 'no'"),
    (["--nosuch=1"], "error: Unknown command line flag 'nosuch'"),
    (["--config=nosuch.py"], "error: nosuch.py not found: experiments/FILE.py")])
def test_a_config_that_cannot_run_is_not_submitted(gke, flags, message):
    error = one_line_error(gke.run("gke.sh", *TRAIN, *flags, TOPOLOGY="v5p-8", **HERE | {"VERB": ""}))
    assert error.startswith(message) and not submitted(gke)


def test_one_workdir_is_one_job(gke):
    for workdir in ("gs://b/runs/x", "gs://b/runs/x/"):
        gke.run("gke.sh", f"--workdir={workdir}", TOPOLOGY="v5p-8", **HERE)
    one, two = submitted(gke)
    assert one["--name"] == two["--name"] and "gs://b/runs/compilation_cache" in two["--command"]


def test_flags_of_the_engine_on_several_lines(gke):
    gke.run("gke.sh", *RUN, TOPOLOGY="v5p-8", ENGINE_FLAGS="--priority=high\n  --service-account=me", **HERE)
    (flags,) = submitted(gke)
    assert (flags["--priority"], flags["--service-account"]) == ("high", "me")


def test_a_point_without_a_slice_is_found_before_any_is_submitted(gke):
    gke.checkout([("a", "v5p-8"), ("b", "")])
    error = one_line_error(gke.run("gke.sh", "--sweep=gs://b/x", **HERE))
    assert error.startswith("error: point 'b' names no topology: TOPOLOGY=v5p-256") and not submitted(gke)
    done = gke.run("gke.sh", "--sweep=gs://b/x", TOPOLOGY="v5p-16", **HERE)
    assert done.returncode == 0 and [job["--topology"] for job in submitted(gke)] == ["2x2x1", "2x2x2"]


def test_no_gcluster(engines):
    error = one_line_error(engines.run("gke.sh", *RUN, TOPOLOGY="v5p-8", **HERE))
    assert error.startswith("error: gcluster not found: take the bundle of release 1.103.0 or newer")


def test_an_image_that_is_here_is_tried(gke):
    gke.answer("docker", '[[ "$1" == image ]]')  # it is here, and Python in it fails
    error = one_line_error(gke.run("gke.sh", *RUN, TOPOLOGY="v5p-8", **HERE))
    assert error == f"error: IMAGE={HERE['IMAGE']} cannot import tfusion: build it with the Dockerfile"
    gke.answer("docker", "exit 1")  # it is not here
    assert gke.run("gke.sh", *RUN, TOPOLOGY="v5p-8", **HERE).returncode == 0
