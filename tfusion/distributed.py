"""How a process starts: what must be set before the first computation, and what is given back before it."""

import ctypes
import os
import sys
from pathlib import Path

import jax


def start_process() -> None:
    """Compiled programs are kept between runs, in $JAX_COMPILATION_CACHE_DIR or ~/.cache/tfusion."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "tfusion" / "compilations"))


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
