"""How a process starts: what must be set before the first computation."""

import os
from pathlib import Path

import jax


def start_process() -> None:
    """Compiled programs are kept between runs, in $JAX_COMPILATION_CACHE_DIR or ~/.cache/tfusion."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "tfusion" / "compilations"))
