"""Jobs on GKE by xpk: the same points and the same command; what the real one makes of it without a cluster."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.launch.stubs import flags_of, one_line_error, run_remotely, tool
from tfusion.accelerators import CHIPS, names
from tfusion.errors import RESTARTED

HERE = dict(IMAGE="us-docker.pkg.dev/p/r/tfusion:1", CLUSTER="c", ZONE="us-east5-a", PROJECT="p",
            VERB="evaluate")
RUN = ["--workdir=gs://b/runs/my run"]
GOLDEN = Path(__file__).parents[1] / "testdata/launch"
# xpk's table, after its own lines, for one status.
LIST = """if [[ "$2" == list ]]; then
  echo '[XPK] Starting workload list'; echo 'Jobset Name    Created Time'
  case "$*" in *EVERYTHING*) echo "$LISTED";; *FAILED*) echo "$BAD";; *SUCCESSFUL*) echo "$WELL";; esac
fi"""


def test_a_job(engines):
    engines.answer("xpk", LIST)
    done = engines.run("xpk.sh", *RUN, TOPOLOGY="2xv5p-256", **HERE)
    assert done.returncode == 0, done.stderr
    (flags,) = map(flags_of, engines.calls("xpk", "workload", "create"))
    command = flags.pop("--command")
    assert flags == {
        "--cluster": "c", "--zone": "us-east5-a", "--project": "p", "--workload": flags["--workload"],
        "--docker-image": HERE["IMAGE"], "--tpu-type": "v5p-256", "--num-slices": "2", "--max-restarts": "20",
        "--restart-on-exit-codes": ",".join(map(str, RESTARTED)), "-tgps": "600"}
    words, _, status = run_remotely(engines, command, status=134)
    assert (words[1:], status) == (["-m", "tfusion.evaluate", *RUN], 134)


@pytest.mark.parametrize("where, again", [
    ({}, ["create"]), (dict(LISTED="{}  t"), []), (dict(LISTED="{}  t", BAD="{}  t"), ["delete", "create"]),
    (dict(LISTED="{}  t", WELL="{}  t"), ["delete", "create"]), (dict(LISTED="{}2  t"), ["create"])])
def test_submitting_twice(engines, where, again):
    engines.answer("xpk", LIST)
    engines.run("xpk.sh", *RUN, TOPOLOGY="v5p-8", **HERE)
    (flags,) = map(flags_of, engines.calls("xpk", "workload", "create"))
    before = len(engines.calls())
    where = {key: value.format(flags["--workload"]) for key, value in where.items()}
    assert engines.run("xpk.sh", *RUN, TOPOLOGY="v5p-8", **HERE, **where).returncode == 0
    assert [call[2] for call in engines.calls()[before:] if call[2] != "list"] == again


def test_no_xpk_and_no_cluster(engines):
    error = one_line_error(engines.run("xpk.sh", *RUN, TOPOLOGY="v5p-8", **HERE))
    assert error == "error: xpk not found: pip install xpk==1.16.0, in an environment of its own"
    engines.answer("xpk", LIST)
    error = one_line_error(engines.run("xpk.sh", *RUN, TOPOLOGY="v5p-8", **HERE | {"CLUSTER": ""}))
    assert error == "error: CLUSTER is not set: the GKE cluster"


@pytest.fixture
def manifest(engines, tmp_path):
    """What the real xpk makes of a job of ours: its manifest, and the Python that can read it."""
    xpk = tool("xpk")
    made = tmp_path / "manifest.yaml"
    engines.answer("xpk", f"""if [[ "$2" == create ]]; then
  exec {xpk} "$@" --project-number=1 --dry-run --skip-validation --output-manifest-file={made}
fi""")
    train = ["--config=experiments/transfusion.py:7b", "--config.mesh.data=2", "--workdir=gs://b/runs/my run"]
    done = engines.run("xpk.sh", *train, TOPOLOGY="2xv5p-256", HOME=str(tmp_path), **HERE | {"VERB": "train"})
    assert done.returncode == 0, done.stdout + done.stderr
    return made, os.path.join(os.path.dirname(xpk), "python")


@pytest.mark.cluster
def test_the_manifest_is_the_one_that_was_read(manifest):
    assert manifest[0].read_text() == (GOLDEN / "xpk.yaml").read_text()


@pytest.mark.slow
def test_sigterm_reaches_python_through_the_shell_that_xpk_puts_around_it(engines, tmp_path):
    (replicas,) = yaml.safe_load((GOLDEN / "xpk.yaml").read_text())["spec"]["replicatedJobs"]
    (container,) = replicas["template"]["spec"]["template"]["spec"]["containers"]
    engines.answer("python", f"""[[ "$1" != -c ]] || exit 0
trap 'touch {tmp_path}/saved; exit 42' TERM
touch {tmp_path}/runs; while :; do sleep .05; done""")
    shell = subprocess.Popen(container["command"], env=engines.environment(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (tmp_path / "runs").exists():
        assert time.monotonic() < deadline and shell.poll() is None
        time.sleep(0.05)
    shell.terminate()
    assert shell.wait(30) == 42 and (tmp_path / "saved").exists()


SHAPES = """
import json, sys
from xpk.core.system_characteristics import UserFacingNameToSystemCharacteristics as known
print(json.dumps({name: known[name].topology for name in sys.argv[1:] if name in known}))
"""


@pytest.mark.cluster
def test_xpk_means_the_same_slices():
    """But for the two smallest of v5e, which it lacks and refuses, and the two largest of v4, of which it has
    another shape."""
    ours = {f"{chip.prefixes[0]}{count}": shape for chip in CHIPS.values() if chip.is_tpu
            for count, shape in names(chip).items()}
    python = os.path.join(os.path.dirname(tool("xpk")), "python")
    done = subprocess.run([python, "-c", SHAPES, *ours], check=True, capture_output=True, text=True)
    known = json.loads(done.stdout)
    assert ours.keys() - known.keys() == {"v5litepod-1", "v5litepod-4"}
    assert {name for name in known if known[name] != ours[name]} == {"v4-6144", "v4-8192"}


VALIDATE = """
import json, sys, jsonschema, yaml
def strict(node):  # a field that the API does not know is an error here, and not dropped
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else []:
        strict(value)
    if isinstance(node, dict) and node.get("properties"):
        node.setdefault("additionalProperties", False)
schema, manifest = json.load(open(sys.argv[1])), yaml.safe_load(open(sys.argv[2]))
strict(schema)
schema["properties"]["metadata"] = {"type": "object"}
errors = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
print(json.dumps(sorted(["/".join(map(str, e.absolute_path)), e.message] for e in errors)))
"""


@pytest.mark.cluster
def test_the_manifest_fits_the_schema_of_jobsets(manifest):
    """But for what is xpk's own: three fields that it leaves empty, and a rule without a name (which several of
    JobSet's own examples lack)."""
    made, python = manifest
    done = subprocess.run([python, "-c", VALIDATE, GOLDEN / "jobset_schema.json", made], check=True,
                          capture_output=True, text=True)
    pod = "spec/replicatedJobs/0/template/spec/template"
    assert json.loads(done.stdout) == [
        ["spec/failurePolicy/rules/0", "'name' is a required property"],
        [f"{pod}/metadata/annotations", "None is not of type 'object'"],
        [f"{pod}/spec/containers/0/env", "None is not of type 'array'"],
        [f"{pod}/spec/serviceAccountName", "None is not of type 'string'"]]
