"""The real training step, traced and compiled ahead of time for a mesh that is not there.

Nothing is allocated and no data is read: the state is training/state.py's shapes, the batch has the shapes that
the config gives every packed row.
"""

import re
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from tfusion import sharding
from tfusion.config import MeshConfig, RunConfig
from tfusion.errors import UserError
from tfusion.objectives import kind_of, make_objective
from tfusion.training import state as states
from tfusion.training import step as steps
from tfusion.training.optimizer import make_optimizer
from tfusion.training.state import TrainState


class Compiled(NamedTuple):
    """What the compiler said; bytes per chip."""

    fits: bool
    argument_bytes: int  # state and batch, padded to tiles
    code_bytes: int
    hbm_bytes: int  # what the program occupies: arguments, temporaries as laid out, code
    peak_bytes: int  # XLA's peak_memory_in_bytes: the most that is live at one time, fragmentation left out
    needed_bytes: float  # where it does not fit: what the compiler asked for, and of what
    available_bytes: float
    what: str
    seconds: float


def abstract_batch(cfg: RunConfig, mesh: Mesh | AbstractMesh):
    """The shapes of one global batch, sharded over rows."""
    place = sharding.batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                        kind_of(cfg).abstract_batch(cfg))


def abstract_frozen(cfg: RunConfig, mesh: Mesh | AbstractMesh):
    """The shapes of what training reads and never changes."""
    return sharding.whole(jax.eval_shape(make_objective(cfg).frozen), mesh)


def host_mesh() -> Mesh:
    """One CPU device: where shapes are worked out."""
    return sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices("cpu")[:1])


def abstract_state(cfg: RunConfig) -> TrainState:
    """The training state's shapes, boxed with logical axes."""
    tx = make_optimizer(cfg.optimizer, cfg.train.num_steps)
    with jax.set_mesh(host_mesh()):  # it makes a key, which needs a device that exists
        return states.abstract_state(make_objective(cfg), tx, cfg.optimizer.ema_decay > 0)


@contextmanager
def entered(mesh: Mesh | AbstractMesh):
    """The current mesh, whatever mesh the caller may have entered."""
    if isinstance(mesh, Mesh):
        with jax.set_mesh(mesh):
            yield
    else:  # only an empty mesh may be changed for one of another size
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())), jax.sharding.use_abstract_mesh(mesh):
            yield


def trace(cfg: RunConfig, boxed_state: TrainState, mesh: Mesh | AbstractMesh):
    """Traces training's own step on the mesh (about a second): jax.stages.Traced, with .jaxpr and .lower()."""
    objective, tx = make_objective(cfg), make_optimizer(cfg.optimizer, cfg.train.num_steps)
    state = sharding.placed(boxed_state, mesh)
    with entered(mesh):
        return steps.jit_train_step(objective, tx, cfg, state).trace(
            state, abstract_frozen(cfg, mesh), abstract_batch(cfg, mesh))


def compile_step(cfg: RunConfig, boxed_state: TrainState, mesh: Mesh, label: str,
                 left: Callable[[float], float | None] | None = None) -> Compiled:
    """Compiles for the mesh's devices. Does not raise where the program is too large: `fits` is False."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tfusion-plan-") as dump:
        try:
            with progress(label, left), jax.set_mesh(mesh):
                lowered = trace(cfg, boxed_state, mesh).lower()
                stats = lowered.compile(compiler_options={"xla_dump_to": dump}).memory_analysis()
        except jax.errors.JaxRuntimeError as e:
            needed, available, what = parse_out_of_memory(str(e))
            return Compiled(False, 0, 0, 0, 0, needed, available, what, time.perf_counter() - began)
        used = buffers_in_hbm(dump) or stats.argument_size_in_bytes + stats.temp_size_in_bytes
    code = stats.generated_code_size_in_bytes
    return Compiled(True, stats.argument_size_in_bytes, code, used + code,
                    stats.peak_memory_in_bytes, 0, 0, "", time.perf_counter() - began)


def buffers_in_hbm(dump: str) -> int | None:
    """Bytes of HBM that buffer assignment lays out, from the compiler's dump; None where it left no report.

    memory_analysis() does not say: its temp_size is larger (by 15 % where compared; arguments and temporaries
    of a program that fits can exceed the chip), its peak leaves fragmentation out.
    """
    totals = [int(n) for path in Path(dump).glob("*memory-usage-report.txt")
              for n in re.findall(r"\(color=0\)\nTotal bytes: (\d+)", path.read_text())]
    return max(totals, default=None)


_SIZE = r"([\d.]+)\s*([KMGT]?)i?B?"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TOO_LARGE = (  # libtpu 0.0.42, then 0.0.52 and earlier texts
    (re.compile(rf"required for ([\w ]+?)s? \({_SIZE}\) exceeds available HBM \({_SIZE}\)"), True),
    (re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"), False),
    (re.compile(rf"Used {_SIZE} of {_SIZE} hbm", re.I), False),
)


def parse_out_of_memory(text: str) -> tuple[float, float, str]:
    """(bytes needed, bytes available, of what) from the compiler's RESOURCE_EXHAUSTED error.

    Raises UserError with the error's first line where it is another error.
    """
    for pattern, names_part in _TOO_LARGE:
        match = pattern.search(text)
        if match:
            *what, needed, unit, available, unit_available = match.groups()
            return (float(needed) * _UNITS[unit], float(available) * _UNITS[unit_available],
                    "the compiler's count of temporaries" if names_part and "temporar" in what[0] else "in all")
    raise UserError(f"the compiler failed: {text.strip().splitlines()[0][:300]}")


@contextmanager
def progress(label: str, left: Callable[[float], float | None] | None = None):
    """A line with the elapsed time on stderr: rewritten every second on a terminal, every 30 s in a log.

    left: elapsed seconds -> seconds to go, None where nothing is known yet.
    """
    done, began, live = threading.Event(), time.perf_counter(), sys.stderr.isatty()

    def tick():
        while not done.wait(1 if live else 30):
            elapsed = time.perf_counter() - began
            to_go = left(elapsed) if left else None
            eta = "" if to_go is None else f", about {to_go:.0f} s left at most"
            print(f"{label}: {elapsed:4.0f} s{eta}  ", end="\r" if live else "\n", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        print(f"{label}: {time.perf_counter() - began:4.0f} s, done" + " " * 24, file=sys.stderr, flush=True)


def host_memory_bytes() -> int:
    """This process's peak resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
