"""What holds of all launch scripts, of the flags that they set, and of the image."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.launch.stubs import FLAGS, NO_PACKAGE, ROOT, tool
from tfusion.accelerators import CHIPS
from tfusion.planning import topology

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path for path in LAUNCH.rglob("*") if path.suffix in (".sh", ".sbatch"))
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def bash(script: str, **variables: str) -> subprocess.CompletedProcess:
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")} | variables
    return subprocess.run(["bash", "-c", script], env=env, cwd=ROOT, capture_output=True, text=True)


def job_names(*pairs: tuple[str, str]) -> list[str]:
    calls = "; ".join(f"job_name '{text}' '{key}'; echo" for text, key in pairs)
    done = bash(f". launch/jobs.sh; {calls}")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_names_of_jobs():
    texts = ["transfusion-0.76b-seed0", "Chameleon_7B.seed=1", "0.16b", "__x__", "a" * 60, "a" * 59 + "b", "-",
             "é"]
    names = job_names(*((text, f"gs://b/x {text}") for text in texts))
    assert len(names) == len(texts)
    assert all(re.fullmatch("[a-z]([a-z0-9-]{0,26}[a-z0-9])?", name) for name in names), names
    assert names[0].startswith("transfusion-0-76b-s") and names[2].startswith("p0-16b-")
    assert names[4] != names[5]  # cut to the same text
    one, two = ("x", "gs://a x"), ("x", "gs://b x")
    a, b, again = job_names(one, two, one)
    assert a == again != b and job_names(one) == [a]


def test_every_script_ends_in_the_verb():
    """And restarts what tfusion/errors.py lists, by name and not by a copy."""
    assert {path.name for path in SCRIPTS} >= {"gke.sh", "xpk.sh", "tpu_vm.sh", "sky.sh", "local.sh", "jobs.sh"}
    assert (LAUNCH / "sky/task.yaml").read_text().count('python -m "tfusion.${VERB:-train}" "$@"') == 1
    for name in ("gke.sh", "xpk.sh", "tpu_vm.sh"):
        text = (LAUNCH / name).read_text()
        assert "$RESTARTED" in text and "$(remote " in text and not re.search(r"\b137\b", text)


@pytest.mark.cluster
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(path):
    done = subprocess.run([tool("shellcheck"), "-x", path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.cluster
def test_hadolint():
    done = subprocess.run([tool("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.cluster
@pytest.mark.parametrize("words", [words for words in FLAGS
                                   if words[0] not in NO_PACKAGE or shutil.which(words[0])], ids=" ".join)
def test_the_tables_hold_only_flags_that_the_tools_have(words, tmp_path):
    done = subprocess.run([tool(words[0]), *words[1:], "--help"], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"HOME": str(tmp_path), "COLUMNS": "200"})
    text = re.sub(r"\x1b\[[0-9;]*m|.\x08", "", done.stdout)
    missing = [flag for flag in FLAGS[words] - {"--quiet", "--project", "--format", "--zone"}
               if not re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text)]
    assert not missing, f"{' '.join(words)}: {missing}"


@pytest.mark.parametrize("words", [words for words in FLAGS if words[0] in NO_PACKAGE], ids=" ".join)
def test_the_tables_of_tools_without_a_package_hold_only_what_is_used(words):
    """And what scripts and guides call is in them: the stubs see to that. What stays is whether a tool has a
    flag: its source or its --help was read for that, once."""
    paths = [*SCRIPTS, LAUNCH / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(path.read_text() for path in paths)
    text = re.sub(r"#.*", "", text).replace("\\\n", " ")
    assert re.search(r"\b" + r"\s+".join(words), text), f"nothing calls {' '.join(words)}"
    missing = [flag for flag in FLAGS[words] if not re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text)]
    assert not missing, f"nothing gives {' '.join(words)} {missing}"


def test_ci_gives_a_machine_without_a_name_one(tmp_path):
    """SLURM's daemons look for it."""
    (function,) = re.findall(r"^slurm\(\) {.*?^}", (ROOT / ".ci/run").read_text(), re.M | re.S)
    for name, script in {"sudo": 'shift; "$@"', "apt-get": "", "getent": 'exit "$KNOWN"', "hostname": "echo me",
                         "tee": f'echo "$@" >>{tmp_path}/said; cat >>{tmp_path}/said'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert bash(f"set -euo pipefail; {function}; slurm", PATH=path, KNOWN="0").returncode == 0
    assert not (tmp_path / "said").exists()
    done = bash(f"set -euo pipefail; {function}; slurm", PATH=path, KNOWN="2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "said").read_text() == "-a /etc/hosts\n127.0.0.1 me\n"


def told(chip: str, name: str, **variables: str) -> list[str]:
    done = bash(f'set -eu; . launch/flags.sh {chip}; printf %s "${name}"', **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_tpus_are_told_of_flags_of_this_libtpu(chip):
    flags = told(chip, "LIBTPU_INIT_ARGS")
    assert flags and len(set(flags)) == len(flags)
    assert flags == told("v5p", "LIBTPU_INIT_ARGS")


@pytest.mark.slow
def test_libtpu_takes_them():
    """It ends a process that names a flag it does not know; no TPU is needed for that."""
    if not topology.have_libtpu():
        pytest.skip("no libtpu here")
    script = ("from tfusion.planning import topology\ntopology.use_host_only()\n"
              "from tfusion.accelerators import parse_accelerator as parse\n"
              "print(len(topology.devices(parse('v5litepod-4'))))")
    flags = " ".join(told("v5e", "LIBTPU_INIT_ARGS"))
    for given, wanted in ((flags, "4\n"), (flags + " --xla_tpu_no_such_flag=true", "")):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT,
                              env=os.environ | {"LIBTPU_INIT_ARGS": given, "JAX_PLATFORMS": "cpu"})
        assert done.stdout == wanted, done.stderr


def test_gpus_are_told_of_flags_of_this_xla():
    """XLA ends a process that names a flag it does not know."""
    flags = " ".join(told("gpu", "XLA_FLAGS"))
    assert flags
    for given, status in ((flags, 0), (flags + " --xla_gpu_no_such_flag=true", None)):
        done = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], capture_output=True,
                              env=os.environ | {"XLA_FLAGS": given, "JAX_PLATFORMS": "cpu"})
        assert (done.returncode == 0) == (status == 0), done.stderr


def test_a_users_own_flags_come_last():
    assert told("v5p", "LIBTPU_INIT_ARGS", LIBTPU_INIT_ARGS="--mine=1")[-1] == "--mine=1"
    assert told("gpu", "XLA_FLAGS", XLA_FLAGS="--mine=1")[-1] == "--mine=1"
    assert told("gpu", "XLA_PYTHON_CLIENT_MEM_FRACTION", XLA_PYTHON_CLIENT_MEM_FRACTION=".5") == [".5"]
    done = bash(". launch/flags.sh v9")
    assert done.returncode == 1 and done.stderr.startswith("error: launch/flags.sh knows v4, v5e")


def test_every_chip_has_its_flags():
    for chip in CHIPS:
        assert bash(f". launch/flags.sh {chip}").returncode == 0


@pytest.mark.parametrize("device, wanted", [
    ("tpu", "jax[tpu]"), ("gpu", "jax[cuda13]"), ("cuda12", "jax[cuda12]"), ("cpu", "jax"), ("amd", None)])
def test_what_the_image_installs(tmp_path, device, wanted):
    """The one step of the Dockerfile that decides something, run with pip and Python that only say so."""
    (step,) = re.findall(r"^RUN (case .*?)^\n", DOCKERFILE, re.M | re.S)
    for name in ("pip", "python"):
        (tmp_path / name).write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
        (tmp_path / name).chmod(0o755)
    step = step.replace("\\\n", "").replace("/tmp/requirements/requirements.txt", "requirements.txt")
    done = bash(step, DEVICE=device, PATH=f"{tmp_path}:{os.environ['PATH']}")
    if wanted is None:
        assert done.returncode == 1 and done.stderr.startswith("error: DEVICE=amd; choices")
    else:
        (version,) = re.findall("^jax==(.*)$", (ROOT / "requirements.txt").read_text(), re.M)
        assert f"{wanted}=={version}" in done.stdout.splitlines() and done.returncode == 0, done.stderr


def test_the_image():
    lines = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
    assert re.fullmatch(r"FROM python:3\.1[1-4]\.\d+-slim-\w+", lines[0])  # a release, not what is newest
    users = [number for number, line in enumerate(lines) if line.startswith("USER ")]
    assert lines[users[-1]] == "USER $UID" and "ARG UID=1000" in lines
    assert not any(line.startswith("RUN pip") for line in lines[users[-1]:])
    copied = [line.split()[1] for line in lines if line.startswith("COPY") and not line.endswith(" . .")]
    assert len(copied) == 2 and all((ROOT / name).is_file() for name in copied)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv*", "runs", "sweeps", "data"} <= set(ignored)
    assert not {"tfusion", "experiments", "launch", "requirements.txt"} & set(ignored)


def test_install(tmp_path):
    """What a fresh machine is told to install, by Pythons that only record it."""
    (tmp_path / "launch").mkdir()
    shutil.copy(LAUNCH / "install.sh", tmp_path / "launch")
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text(f'#!/bin/bash\necho "$@" >>{tmp_path}/said\n')
    (tmp_path / "bin/python3").chmod(0o755)
    for device, status in (("tpu", 0), ("cuda13", 0), ("gpu", 1), ("", 1)):
        (tmp_path / "said").write_text("")
        done = subprocess.run([tmp_path / "launch/install.sh", device], capture_output=True, text=True,
                              env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"})
        assert done.returncode == status
        if status == 0:
            last = (tmp_path / "said").read_text().splitlines()[-1]
            assert re.search(rf"-m uv pip install .* -r launch/requirements.txt jax\[{device}\]==[\d.]+$", last)
        else:
            assert done.stderr == "error: launch/install.sh tpu|cuda13|cuda12\n"
