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
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
