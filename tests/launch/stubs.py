"""Stubs of the engines' command lines, first on PATH: they record what they are called with, answer what a test
says, and every flag is held against what the real ones document.
"""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OF_JOBS = {"--cluster", "--location", "--project"}
OF_XPK = {"--cluster", "--zone", "--project"}
OF_GCLOUD = {"--zone", "--project", "--format", "--quiet"}
SSH = {"--node", "--worker", "--batch-size", "--command"}
SWITCHES = {"--gke-disable-parallel-containers", "--quiet", "--force", "--spot", "--detach-run", "--yes",
            "--all", "-r", "--version", "--uniform-bucket-level-access", "--enable-hierarchical-namespace"}
# {(tool, words): the flags that it has and we may use}. gcluster: cmd/job/*.go of cluster-toolkit 1.95.0, and
# the mapping from xpk in docs/migration/xpk_to_clustertoolkit.md as of release 1.103.0; of the others
# the --help: xpk 1.16.0, gcloud 528.0.0, sky 0.14.1.
FLAGS = {
    ("gcluster", "job", "submit"): OF_JOBS | {
        "--name", "--image", "--command", "--compute-type", "--topology", "--num-slices", "--restarts",
        "--restart-on-exit-codes", "--grace-period", "--gke-disable-parallel-containers", "--mount",
        "--priority", "--service-account", "--gke-nap-provisioning"},
    ("gcluster",): {"--version"},
    ("gcluster", "job", "list"): OF_JOBS,
    ("gcluster", "job", "cancel"): OF_JOBS,
    ("gcluster", "job", "config", "set"): set(),
    ("xpk", "workload", "create"): OF_XPK | {
        "--workload", "--docker-image", "--command", "--tpu-type", "--num-slices", "--max-restarts",
        "--restart-on-exit-codes", "-tgps", "--priority", "--storage", "--spot"},
    ("xpk", "workload", "list"): OF_XPK | {"--filter-by-status"},
    ("xpk", "workload", "delete"): OF_XPK | {"--workload"},
    ("gcloud", "compute", "tpus", "queued-resources", "create"): OF_GCLOUD | {
        "--accelerator-type", "--runtime-version", "--node-id", "--node-count", "--node-prefix", "--spot",
        "--valid-until-duration", "--service-account"},
    ("gcloud", "compute", "tpus", "queued-resources", "describe"): OF_GCLOUD,
    ("gcloud", "compute", "tpus", "queued-resources", "list"): OF_GCLOUD,
    ("gcloud", "compute", "tpus", "queued-resources", "delete"): OF_GCLOUD | {"--force"},
    ("gcloud", "compute", "tpus", "queued-resources", "ssh"): OF_GCLOUD | SSH,
    ("gcloud", "compute", "tpus", "queued-resources", "scp"): OF_GCLOUD | SSH - {"--command"},
    ("gcloud", "compute", "instances", "create"): OF_GCLOUD | {
        "--machine-type", "--maintenance-policy", "--scopes", "--provisioning-model", "--image-family",
        "--image-project", "--instance-termination-action"},
    ("gcloud", "compute", "instances", "describe"): OF_GCLOUD,
    ("gcloud", "compute", "instances", "delete"): OF_GCLOUD,
    ("gcloud", "compute", "ssh"): OF_GCLOUD | {"--command"},
    ("gcloud", "compute", "scp"): OF_GCLOUD,
    ("gcloud", "auth", "login"): set(),
    ("gcloud", "services", "enable"): OF_GCLOUD,
    ("gcloud", "storage", "buckets", "create"): OF_GCLOUD | {
        "--location", "--soft-delete-duration", "--uniform-bucket-level-access",
        "--enable-hierarchical-namespace"},
    ("gcloud", "storage", "cp"): OF_GCLOUD | {"-r"},
    ("gcloud", "storage", "rsync"): OF_GCLOUD | {"-r"},
    ("sky", "jobs", "launch"): {"--name", "--detach-run", "--yes", "--env", "--infra"},
    ("sky", "jobs", "queue"): {"--all", "--output"},
}
SLURM = ("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")  # test_slurm.py asks the real ones
NOT_LISTED = {"docker", "make", "python", "sleep", *SLURM}  # stubs that no table is for
# A checkout's Python: the sweep's points that are ready, and else only recorded, but for scripts of ours.
PYTHON = r"""#!/usr/bin/env bash
if [[ "$1" != -m ]]; then exec %s "$@"; fi
{ printf '%%s\x1f' python "$@"; printf '\x1e'; } >>"$CALLS"
if [[ " $*" == *" --jobs"* ]]; then printf '%s'; fi
"""
NO_PACKAGE = ("gcluster", "gcloud")  # CI has them not: the scripts and guides hold their rows, test_scripts.py
RECORD = """#!/usr/bin/env bash
{ printf '%s\\x1f' "${0##*/}" "$@"; printf '\\x1e'; } >>"$CALLS"
"""


class Engines:
    def __init__(self, folder: Path):
        self.bin, self.record, self.root = folder / "bin", folder / "calls", ROOT
        self.bin.mkdir()
        self.record.touch()

    def answer(self, tool: str, script: str = "") -> None:
        """A stub of that name: bash, with the call in $*."""
        path = self.bin / tool
        path.write_text(RECORD + script + "\n")
        path.chmod(0o755)

    def checkout(self, points: list[tuple[str, str]]) -> Path:
        """From now on scripts are run in a checkout whose Python only records. points: (name, topology) of a
        sweep's that are ready."""
        place = self.record.parent / "checkout"
        (place / ".venv/bin").mkdir(parents=True)
        for name in ("tfusion", "experiments", "requirements.txt"):
            (place / name).symlink_to(ROOT / name)
        # Scripts go to the folder above theirs: they must find this checkout, and not where a link leads.
        shutil.copytree(ROOT / "launch", place / "launch")
        lines = "".join(f"{number}\\t{name}\\t{topology}\\n"
                        for number, (name, topology) in enumerate(points))
        for path in (place / ".venv/bin/python", self.bin / "python"):
            path.write_text(PYTHON % (sys.executable, lines))
            path.chmod(0o755)
        self.root = place
        return place

    def environment(self, **variables: str) -> dict[str, str]:
        """What a script is run with: nothing of the caller's that it reads."""
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        path = [self.bin, Path(sys.executable).parent, "/usr/local/bin", "/usr/bin", "/bin"]
        return kept | {"PATH": os.pathsep.join(map(str, path)), "CALLS": str(self.record),
                       "XDG_CACHE_HOME": str(self.record.parent / "cache")} | variables

    def run(self, script: str, *args: str, **variables: str) -> subprocess.CompletedProcess:
        """launch/SCRIPT with its settings; what it called is checked."""
        done = subprocess.run([self.root / "launch" / script, *args], env=self.environment(**variables),
                              text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=120)
        self.check()
        return done

    def calls(self, *words: str) -> list[list[str]]:
        """All calls that begin with these words, in their order."""
        calls = [call.split("\x1f")[:-1] for call in self.record.read_text().split("\x1e")[:-1]]
        return [call for call in calls if call[:len(words)] == list(words)]

    def check(self) -> None:
        for call in self.calls():
            if call[0] not in NOT_LISTED:
                flags_of(call)


def flags_of(call: list[str]) -> dict[str, str]:
    """{flag: value} of a call; a switch has "". Fails where the tool has no such command or flag."""
    words = max((words for words in FLAGS if tuple(call[:len(words)]) == words), key=len, default=None)
    assert words, f"{call[0]} has no {call[1:4]} that the scripts may use"
    found = {}
    for word in call[len(words):]:
        if word.startswith("-"):
            name, equals, value = word.partition("=")
            assert name in FLAGS[words], f"{' '.join(words)} has no {name}"
            assert bool(equals) != (name in SWITCHES), f"{word}: a switch takes no value, another flag does"
            assert name not in found or name in ("--env", "--mount"), f"{name} twice"
            found[name] = value if name not in found else found[name] + "\n" + value
    return found


def tool(name: str) -> str:
    """The path of a real one, from .venv-launch or this machine. A missing one is an error in CI; elsewhere its
    tests are skipped, and that is said aloud."""
    path = shutil.which(name, path=f"{ROOT / '.venv-launch/bin'}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        if os.environ.get("TFUSION_CI"):
            pytest.fail(f"{name} is missing: make .venv-launch/.installed")
        warnings.warn(f"{name} is missing, and what is held against it was NOT tested: make "
                      ".venv-launch/.installed", stacklevel=2)
        pytest.skip(f"no {name}")
    return path


def one_line_error(done: subprocess.CompletedProcess) -> str:
    """The one line that a mistake ends in; status 1."""
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def run_remotely(engines: Engines, command: str, status: int = 0) -> tuple[list[str], dict[str, str], int]:
    """What a job's command does where there is an image: the words of the Python that it becomes, the variables
    that this was given, and its status."""
    engines.answer("python", f"""if [[ "$1" == -c ]]; then exit "${{IMPORTS:-0}}"; fi
env -0 >"$CALLS.env"; exit {status}""")
    done = subprocess.run(["bash", "-c", command], env=engines.environment(), capture_output=True, text=True)
    (engines.bin / "python").unlink()
    return engines.calls("python", "-m")[-1], given(engines), done.returncode


def given(engines: Engines) -> dict[str, str]:
    """The variables that the last Python was given."""
    return dict(line.partition("=")[::2] for line in Path(f"{engines.record}.env").read_text().split("\0"))


def sweep(out: Path, points: str) -> None:
    """Freezes a sweep whose get_sweep returns `points`, Python."""
    experiment = out.parent / "few.py"
    experiment.write_text(f"def get_sweep(arg=None):\n    return {points}\n")
    subprocess.run([sys.executable, "-m", "tfusion.sweep", f"--config={experiment}", f"--out={out}"], cwd=ROOT,
                   check=True, capture_output=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
