"""How a process starts: what must be set before the first computation, and what is given back before it."""

import ctypes
import os
import signal
import sys
import threading
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from tfusion.errors import UserError

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
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:  # the latter where there is a plugin and no GPU
        why = str(e).partition(" (set JAX_PLATFORMS")[0] or "there is none"
        raise UserError(f"JAX_PLATFORMS={jax.config.jax_platforms or ''} cannot be used here ({why}); unset "
                        "it, or install JAX for that device (README, Training at scale)") from e


def is_writer() -> bool:
    """Whether this process writes what a run leaves, and talks: process 0."""
    return jax.process_index() == 0


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("here")


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


class Sigterm:
    """Whether SIGTERM came since `listen`; a second one ends the process at once, as does one outside."""

    def __init__(self):
        self.came, self._before = False, None

    def listen(self) -> None:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            self._before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_) -> None:
        self.came = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def close(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


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
