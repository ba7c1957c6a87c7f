"""Numbers out of a run, accumulated on the host; writers.py writes them."""

import json
import platform
import resource
import time
from pathlib import Path

import jax
import numpy as np

from tfusion import accelerators
from tfusion.errors import UserError
from tfusion.paths import replace_text
from tfusion.training.optimizer import CLIP_NORM

COMPARED = ("data/wait_fraction", "memory/peak_gib")  # over processes: who waits is waited for
MOST_SKIPPED = 20  # steps in a row: then it is not one batch that is bad


class Losses:
    """Sums (sum, count) pairs; `means` divides once, at the end. Of `skipped_steps` it gives the number."""

    def __init__(self):
        self._pending, self._sums, self._skipped = [], {}, 0

    def add(self, step: int, losses) -> None:
        """losses: {name: (sum, count)}, still on the device; not waited for here."""
        self._pending.append((step, losses))

    def flush(self) -> None:
        """Fetches what is pending. Raises UserError at the first step with a NaN or infinite loss, or where too
        many in a row were skipped for one."""
        for step, losses in jax.device_get(self._pending):
            bad = [name for name, (total, _) in losses.items() if not np.isfinite(total)]
            if bad:
                raise UserError(f"step {step}: {', '.join(bad)} is not finite; the last checkpoint is "
                                "untouched: lower optimizer.learning_rate, or look at that step's batch")
            if "grad_norm" in losses:  # in training: the share of steps whose gradient was clipped
                norm, counted = losses["grad_norm"]
                losses = losses | {"clip_rate": (norm > CLIP_NORM, counted)}
            self._count_skipped(step, losses.get("skipped_steps", (0, 1))[0])
            for name, (total, count) in losses.items():
                a, b = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = (a + float(total), b + float(count))
        self._pending = []

    def means(self, prefix: str) -> dict:
        """{prefix + name: mean, None where nothing was counted}; starts over."""
        self.flush()
        skipped = self._sums.pop("skipped_steps", None)
        out = {prefix + name: total / count if count else None
               for name, (total, count) in self._sums.items()}
        self._sums = {}
        return out if skipped is None else out | {f"{prefix}skipped_steps": int(skipped[0])}

    def _count_skipped(self, step: int, skipped) -> None:
        self._skipped = self._skipped + 1 if skipped else 0
        if self._skipped == MOST_SKIPPED:
            raise UserError(f"step {step}: losses or gradient are not finite for the {MOST_SKIPPED}th step in "
                            "a row, none of which changed the model: lower optimizer.learning_rate, or look at "
                            "those steps' batches")


class Throughput:
    """Totals of the whole run, and rates over the steps since the last report."""

    def __init__(self, totals: dict | None = None):
        self.peak = accelerators.peak_flops_per_sec(jax.devices()[0].device_kind)
        self.total, self._pending = dict(totals or {}), []
        self.begin()

    def begin(self) -> None:
        """Rates are measured from here on."""
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0
        self._start = dict(self.total)

    def pause(self, seconds: float) -> None:
        """Leaves out time spent on evaluation and checkpoints."""
        self._since += seconds

    def add(self, totals: dict, waited: float) -> None:
        """totals: of one global batch, still on the device; not waited for here. waited: seconds that the step
        waited for the batch."""
        self._steps, self._waited = self._steps + 1, self._waited + waited
        self._pending.append(totals)

    def flush(self) -> None:
        """Fetches what is pending. Whole numbers stay whole."""
        for totals in jax.device_get(self._pending):
            for name, value in totals.items():
                self.total[name] = self.total.get(name, 0) + np.asarray(value).item()
        self._pending = []

    def report(self) -> dict:
        """Rates since the last report, and totals since the run's first step, resumed or not."""
        self.flush()
        seconds = max(time.perf_counter() - self._since, 1e-9)
        rates = {name: (total - self._start.get(name, 0)) / seconds for name, total in self.total.items()}
        flops = rates.pop("flops", None)
        out = {"perf/step_ms": 1e3 * seconds / max(self._steps, 1),
               "data/wait_fraction": self._waited / seconds,
               **{f"total/{name}": total for name, total in self.total.items()},
               **{f"perf/{name}_per_sec": rate for name, rate in rates.items()}}
        if flops is not None:
            out["perf/model_flops_per_sec"] = flops
            if self.peak:
                out["perf/mfu"] = flops / (self.peak * jax.device_count())
        self.begin()
        return out


def device_memory(devices) -> dict:
    """GiB in use, and the most so far, on the fullest device; {} where the platform does not tell (CPU)."""
    stats = [stats for device in devices if (stats := device.memory_stats())]
    names = {"memory/in_use_gib": "bytes_in_use", "memory/peak_gib": "peak_bytes_in_use"}
    return {name: max(s[key] for s in stats) / accelerators.GIB for name, key in names.items()
            if stats and all(key in s for s in stats)}


def write_timing(folder: Path, name: str, seconds: float) -> None:
    """Adds a stage to `<folder>/timing.json`: seconds and this process's peak memory."""
    path = folder / "timing.json"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    stage = {"name": name, "seconds": round(seconds, 1), "peak_memory_mb": round(peak)}
    devices = jax.devices()
    replace_text(path, json.dumps({
        "stages": [s for s in _stages(path) if s["name"] != name] + [stage],
        "machine": f"{len(devices)} x {devices[0].device_kind}, {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__}}, indent=2) + "\n")


def _stages(path: Path) -> list[dict]:
    """The stages of a timing.json; none where it is absent, empty or broken: it stops no run."""
    try:
        stages = json.loads(path.read_text())["stages"]
        return [s for s in stages if isinstance(s, dict) and {"name", "seconds", "peak_memory_mb"} <= s.keys()]
    except (OSError, ValueError, KeyError, TypeError):
        return []
