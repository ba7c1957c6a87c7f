"""Real processes that share a run on this machine: CPU devices, joined by gloo over loopback."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENDS = ("error:", "preempted", "stopped")  # how the line begins that says why a process ended


class Process:
    """One that was started; what it says is kept in files, which are read while it runs or later."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.folder = Path(tempfile.mkdtemp())
        with (self.folder / "out").open("w") as out, (self.folder / "err").open("w") as err:
            self.popen = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err)

    def kill(self, with_signal: int = signal.SIGKILL) -> None:
        self.popen.send_signal(with_signal)

    def wait(self, seconds: float = 600) -> int:
        """Its exit status, as a shell has it: 128 + the signal that ended it."""
        status = self.popen.wait(seconds)
        return status if status >= 0 else 128 - status

    def stdout(self) -> str:
        return (self.folder / "out").read_text()

    def stderr(self) -> str:
        return (self.folder / "err").read_text()

    def errors(self) -> list[str]:
        """Its lines that say why it ended."""
        return [line for line in re.split(r"[\r\n]+", self.stderr()) if line.startswith(ENDS)]


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """That of a process that has so many CPU devices and knows of no others."""
    clean = {name: value for name, value in os.environ.items()
             if not name.startswith(("JAX_COORDINATOR", "JAX_NUM_PROC", "JAX_PROCESS"))}
    return clean | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
                    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"} | more


def start(n: int, module: str, *flags: str, devices_per_process: int = 1, **more: str) -> list[Process]:
    """`python -m module flags` in n processes, process 0 first; {process} in a flag is its number. more: of
    their environment."""
    address = f"127.0.0.1:{free_port()}"
    return [Process([sys.executable, "-m", module, *(flag.replace("{process}", str(k)) for flag in flags)],
                    environment(devices_per_process, JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=str(n),
                                JAX_PROCESS_ID=str(k), **more)) for k in range(n)]


@contextlib.contextmanager
def running(*arguments, **options):
    """`start`, and none is left behind."""
    processes = start(*arguments, **options)
    try:
        yield processes
    finally:
        for process in processes:
            process.popen.kill()
            process.popen.wait()


def succeed(processes: list[Process], seconds: float = 600) -> None:
    """Waits until all have ended as they should."""
    deadline = time.monotonic() + seconds
    statuses = [process.wait(max(1, deadline - time.monotonic())) for process in processes]
    assert not any(statuses), f"{statuses}\n" + "\n".join(process.stderr() for process in processes)


def wait_for(condition, processes: list[Process], seconds: float = 600) -> None:
    """Until condition() holds; none of the processes may end before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be in time"
        assert all(process.popen.poll() is None for process in processes), "\n".join(
            process.stderr() for process in processes)
        time.sleep(0.05)
