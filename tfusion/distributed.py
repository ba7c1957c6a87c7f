"""How a process starts: what must be set before the first computation, and what is given back before it."""

import contextlib
import ctypes
import faulthandler
import itertools
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import jax
from jax._src import xla_bridge
from jax.experimental import multihost_utils

from tfusion.errors import PREEMPTED, UserError

ONE_NOTICE_S = 2.0  # launchers send SIGTERM to a process and to its group: that is one
# How launchers tell a process that it is one of several: JAX's own, srun, Open MPI, MPICH, torchrun.
NUM_PROCESSES = ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE")


def start_process() -> None:
    """Compiled programs are kept between runs, in $JAX_COMPILATION_CACHE_DIR or ~/.cache/tfusion.

    Raises UserError in one of several processes, before anything is written, and where the devices that JAX is
    told to use are not there.
    """
    refuse_several_processes()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR") and (folder := cache_folder()):
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if not (jax.distributed.is_initialized() or xla_bridge.backends_are_initialized()):  # as in tests
        _be_alone()
        watch_sigterm()
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:  # the latter where there is a plugin and no GPU
        why = str(e).partition(" (set JAX_PLATFORMS")[0] or "there is none"
        raise UserError(f"JAX_PLATFORMS={jax.config.jax_platforms or ''} cannot be used here ({why}); unset "
                        "it, or install JAX for that device (README, Training at scale)") from e


def _be_alone() -> None:
    """One process is a job of one, on a free port that is held until the coordinator has it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        jax.distributed.initialize(address, 1, 0, cluster_detection_method="deactivate",
                                   coordinator_bind_address=address)


def is_writer() -> bool:
    """Whether this process writes what a run leaves, and talks: process 0."""
    return jax.process_index() == 0


def cache_folder() -> Path | None:
    """Where compiled programs are kept; None where there is no home folder or it cannot be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "tfusion", "compilations")
    try:
        if folder.is_absolute():  # else `~` is still there
            folder.mkdir(parents=True, exist_ok=True)
            return folder if os.access(folder, os.W_OK) else None
    except OSError:
        pass
    return None


def refuse_several_processes() -> None:
    """Each would train alone in the same workdir. Raises UserError, naming what says that there are several."""
    said = [f"{name}={os.environ[name]}" for name in NUM_PROCESSES if os.environ.get(name, "1").strip() != "1"]
    if "JAX_COORDINATOR_ADDRESS" in os.environ and "JAX_NUM_PROCESSES" not in os.environ:
        said.append(f"JAX_COORDINATOR_ADDRESS={os.environ['JAX_COORDINATOR_ADDRESS']}")
    if len(hosts := os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1:
        said.append(f"TPU_WORKER_HOSTNAMES names {len(hosts)} hosts")
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        said.append(f"jax.process_count() = {jax.process_count()}")
    if said:
        raise UserError(f"{said[0]}: several processes cannot share a run yet; start one (it uses all devices "
                        "of its host), or unset that")


class Preemption:
    """Whether SIGTERM, or a notice of the platform's, came to any of a run's processes.

    Until `listen` and after `close` it ends its process at once: nothing is lost. Between them `due` says so,
    to all processes at the same call, and they save and end; a second SIGTERM ends one at once.
    """

    _listening = threading.Event()
    _calls = itertools.count(1)  # JAX wants them numbered, alike in all processes

    def __init__(self):
        self.came = False

    def listen(self) -> None:
        self._listening.set()

    def close(self) -> None:
        self._listening.clear()

    def due(self) -> bool:
        """Asked by all processes equally often; it stays true."""
        self.came = self.came or multihost_utils.reached_preemption_sync_point(next(self._calls))
        return self.came


def watch_sigterm() -> None:
    """Call after jax.distributed.initialize, whose handler of SIGTERM tells all processes: it stays in place.

    A thread learns of the signal too, even while the main thread is in a compiler: faulthandler's handler, the
    one that runs no Python and calls the handler before it, writes to a pipe.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    faulthandler.register(signal.SIGTERM, writing, all_threads=False, chain=True)
    threading.Thread(target=_end_on_sigterm, args=(reading,), name="SIGTERM", daemon=True).start()


def _end_on_sigterm(reading: int) -> None:
    os.read(reading, 2**16)
    if Preemption._listening.is_set():
        time.sleep(ONE_NOTICE_S)
        os.set_blocking(reading, False)
        with contextlib.suppress(BlockingIOError):
            os.read(reading, 2**16)  # what is left of the first, and what came with it
        os.set_blocking(reading, True)
        os.read(reading, 2**16)
        status = 128 + signal.SIGTERM
    else:
        status = PREEMPTED
    os.write(2, b"error: stopped by SIGTERM; the same command goes on\n")
    os._exit(status)


def return_freed_memory() -> None:
    """Gives the system what the allocator keeps of freed memory (glibc only): XLA's CPU compiler leaves behind
    several hundred MiB."""
    if trim := _libc("malloc_trim"):
        trim(0)


def limit_heaps() -> None:
    """Call before a compiler starts its threads, of which there are more than 30: glibc would give each a heap
    of its own, and keep in it what that thread freed; for the 7B step a tenth of the peak."""
    arena_max, mmap_threshold = -8, -3  # malloc.h: M_ARENA_MAX, M_MMAP_THRESHOLD
    if mallopt := _libc("mallopt"):
        mallopt(arena_max, 2)
        mallopt(mmap_threshold, 256 * 1024)  # else it grows to 32 MiB: large blocks would not be given back


def _libc(name: str):
    """A function of glibc; None where there is none."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
