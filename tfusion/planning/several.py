"""Plans of many runs, each made by `python -m tfusion.plan` in a process of its own: what a compiler leaves in
memory ends with it, and one that crashes takes nothing along. As many at a time as there are cores and memory.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from typing import IO, NamedTuple

from tqdm import tqdm

from tfusion.accelerators import GIB, Accelerator
from tfusion.config import RunConfig
from tfusion.errors import UserError
from tfusion.objectives import check_mesh
from tfusion.planning import cache, topology

MEMORY_OF_ONE = 4 * GIB  # a 7B step takes 3
USUAL_S = 150.0  # until one is made: a step of the paper's smallest size, alone on a core
POLL_S = 0.2
ERROR = re.compile(r"error: |[A-Za-z_.]+(Error|Exception): ")  # or the end of a traceback


class Wanted(NamedTuple):
    cfg: RunConfig
    accelerator: Accelerator
    experiment: str  # FILE.py:words
    flags: list[str]  # that give cfg besides: --config.a.b=...


def check(cfg: RunConfig, accelerator: Accelerator) -> None:
    """What takes no compiler to see. Raises UserError where the mesh does not suit the slice, the batch or the
    model, and where libtpu is needed and not installed."""
    check_mesh(cfg, topology.abstract_mesh(cfg.mesh, accelerator))
    if accelerator.chip.is_tpu and not topology.have_libtpu():
        topology.devices(accelerator)  # raises


def make(wanted: dict[str, Wanted]) -> dict[str, dict]:
    """{name: its plan}, of the cache or made now. Raises UserError that names the first that cannot be made."""
    keys = {name: cache.key(one.cfg, one.accelerator) for name, one in wanted.items()}
    plans = {key: found for key in dict.fromkeys(keys.values()) if (found := cache.read(key)) is not None}
    missing = {}
    for name, key in keys.items():
        if key not in plans:
            missing.setdefault(key, name)  # points that differ in a seed are planned once
    if missing:
        with Making({name: wanted[name] for name in missing.values()}) as making:
            plans |= {keys[name]: plan for name, plan in making.all().items()}
    return {name: cache.for_run(plans[keys[name]], one.cfg, one.accelerator, one.experiment)
            for name, one in wanted.items()}


def at_a_time() -> int:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(os.cpu_count() or 1, memory // MEMORY_OF_ONE))


def command(one: Wanted) -> list[str]:
    return [sys.executable, "-m", "tfusion.plan", f"--config={one.experiment}", *one.flags,
            f"--topology={one.accelerator.name}", "--json"]


class Running(NamedTuple):
    process: subprocess.Popen
    out: IO[bytes]  # a file: a pipe that nobody reads would fill up
    said: IO[bytes]
    began: float

    def ended(self) -> tuple[str, str]:
        """What it wrote to stdout and stderr. Call it once, when the process has ended."""
        texts = []
        for file in (self.out, self.said):
            with file:
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        return tuple(texts)


class Making:
    """Runs the commands, with a bar on stderr; whoever leaves it early ends them."""

    def __init__(self, wanted: dict[str, Wanted]):
        self.waiting, self.running, self.plans, self.seconds = dict(wanted), {}, {}, []
        self.total, self.shown = len(wanted), 0.0
        self.bar = tqdm(total=self.total, desc="planning", dynamic_ncols=True,
                        bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}{postfix}")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.bar.leave = kind is None  # what is left of an error is the error
        for one in self.running.values():
            one.process.kill()
            one.process.wait()
            one.ended()
        self.bar.close()

    def all(self) -> dict[str, dict]:
        while self.waiting or self.running:
            while self.waiting and len(self.running) < at_a_time():
                self._begin(next(iter(self.waiting)))
            for name in [name for name, one in self.running.items() if one.process.poll() is not None]:
                self._end(name, self.running.pop(name))
            self._show()
            time.sleep(POLL_S)
        return self.plans

    def _begin(self, name: str) -> None:
        out, said = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        process = subprocess.Popen(command(self.waiting.pop(name)), stdout=out, stderr=said)
        self.running[name] = Running(process, out, said, time.monotonic())

    def _end(self, name: str, one: Running) -> None:
        out, said = one.ended()
        if one.process.returncode:
            lines = [line.strip() for line in said.splitlines() if line.strip()]
            why = next((line for line in reversed(lines) if ERROR.match(line)), (lines or [""])[-1])
            raise UserError(f"'{name}': planning ended with status {one.process.returncode}: "
                            f"{why.removeprefix('error: ')}")
        self.plans[name] = json.loads(out.splitlines()[-1])
        self.seconds.append(time.monotonic() - one.began)

    def _show(self) -> None:
        """A plan under way counts as far as its time is of the usual one, so that there is an ETA from the
        first second on."""
        now = time.monotonic()
        if now - self.shown < (1 if sys.stderr.isatty() else 30) and len(self.plans) < self.total:
            return
        self.shown, usual = now, sum(self.seconds) / len(self.seconds) if self.seconds else USUAL_S
        begun = sum(min((now - one.began) / usual, 0.95) for one in self.running.values())
        self.bar.n = max(self.bar.n, len(self.plans) + begun)
        left = tqdm.format_interval(usual * (self.total - len(self.plans) - begun) / at_a_time())
        self.bar.set_postfix_str("; ".join([f"{len(self.plans)} of {self.total}, about {left} left",
                                            ", ".join(self.running)][: 1 + bool(self.running)]))
