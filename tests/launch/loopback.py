"""A SLURM cluster on this machine: munged, slurmctld and two slurmd, of this user, in a folder; nothing of the
system's own is touched.

Times are shortened where SLURM waits for people: a requeued job may begin again after `cred_expire` (else two
minutes), looked for every second (else up to a minute).
"""

import contextlib
import os
import platform
import pwd
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.processes import free_port

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
USER = pwd.getpwuid(os.getuid()).pw_name
CPUS = 4  # that each node says it has
GRACE_S = 20  # between a preempted job's SIGTERM and its end
CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=4000
NodeName={host}-2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory=4000
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime={grace}
PartitionName=abrupt Nodes=ALL MaxTime=INFINITE PriorityTier=1
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why there can be no cluster here; "" where there can."""
    names = [name for name in DAEMONS if not shutil.which(name, path=_path())]
    if names:
        return f"{', '.join(names)} not found: apt-get install slurm-wlm munge"
    with contextlib.suppress(OSError):
        socket.getaddrinfo(platform.node(), 80)
        return ""
    return f"the name of this machine, {platform.node()}, does not resolve: a line of /etc/hosts does that"


def absent(why: str) -> None:
    """A loud skip; in CI an error."""
    if os.environ.get("TFUSION_CI"):
        pytest.fail(why)
    pytest.skip(why)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Cluster:
    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, []
        self.environment = os.environ | {"PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Raises AssertionError where it is not up within a minute."""
        host = platform.node().split(".")[0]
        nodes = [host, f"{host}-2"]
        for name in ("state", *(f"spool-{node}" for node in nodes)):
            (self.folder / name).mkdir()
        (munge := self.folder / "munge").mkdir()
        (munge / "key").write_bytes(secrets.token_bytes(128))
        (munge / "key").chmod(0o600)
        (self.folder / "slurm.conf").write_text(CONF.format(
            host=host, user=USER, folder=self.folder, ports=[free_port() for _ in range(3)],
            cpus=CPUS, grace=GRACE_S))
        self._daemon("munged", "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key",
                     f"--pid-file={munge}/pid", f"--seed-file={munge}/seed", f"--log-file={munge}/log")
        self._wait(lambda: (munge / "socket").exists(), 10)
        self._daemon("slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
        for node in nodes:
            self._daemon("slurmd", "-D", "-N", node, "-f", self.environment["SLURM_CONF"])
        self._wait(lambda: self.run("sinfo", "--Node", "--noheader", "--format=%T").split() == ["idle"] * 6, 60)

    def _daemon(self, *words: str) -> None:
        with (self.folder / f"{words[0]}.out").open("a") as log:
            self.daemons.append(subprocess.Popen(words, env=self.environment, stdout=log, stderr=log))

    def _wait(self, condition, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, "\n".join(
                path.read_text() for path in self.folder.glob("*.*") if path.suffix in (".log", ".out"))
            time.sleep(0.2)

    def run(self, *words: str, cwd=None, **more: str) -> str:
        """Runs a command as a user of the cluster; returns its stdout, or "" where it fails."""
        return subprocess.run(words, env=self.environment | more, cwd=cwd, capture_output=True,
                              text=True).stdout

    def stop(self) -> None:
        """Ends what runs in it, then the cluster."""
        self.run("scancel", "--signal=KILL", f"--user={USER}")
        self.run("scancel", f"--user={USER}")
        with contextlib.suppress(AssertionError):
            self._wait(lambda: not self.run("squeue", "--noheader").strip(), 20)
        for process in reversed(self.daemons):
            process.terminate()
        for process in self.daemons:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def cluster(folder: Path):
    made = Cluster(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()
