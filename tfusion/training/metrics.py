"""Numbers out of a run, accumulated on the host; writers.py writes them."""

import json
import platform
import resource
import time
from pathlib import Path

import jax
import numpy as np

from tfusion import accelerators
from tfusion.config import Config, replace_text
from tfusion.errors import UserError
from tfusion.training.flops import training_flops
from tfusion.training.optimizer import CLIP_NORM
from tfusion.types import Batch


class Losses:
    """Sums (sum, count) pairs; `means` divides once, at the end."""

    def __init__(self):
        self._pending, self._sums = [], {}

    def add(self, step: int, losses) -> None:
        """losses: {name: (sum, count)}, still on the device; not waited for here."""
        self._pending.append((step, losses))

    def flush(self) -> None:
        """Fetches what is pending. Raises UserError at the first step with a NaN or infinite loss."""
        for step, losses in jax.device_get(self._pending):
            bad = [name for name, (total, _) in losses.items() if not np.isfinite(total)]
            if bad:
                raise UserError(f"step {step}: {', '.join(bad)} is not finite; the last checkpoint is "
                                "untouched: lower optimizer.learning_rate, or look at that step's batch")
            if "grad_norm" in losses:  # in training: the share of steps whose gradient was clipped
                losses = losses | {"clip_rate": (losses["grad_norm"][0] > CLIP_NORM, 1)}
            for name, (total, count) in losses.items():
                a, b = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = (a + float(total), b + float(count))
        self._pending = []

    def means(self, prefix: str) -> dict:
        """{prefix + name: mean, None where nothing was counted}; starts over."""
        self.flush()
        out = {prefix + name: total / count if count else None
               for name, (total, count) in self._sums.items()}
        self._sums = {}
        return out


class Throughput:
    """Rates over the steps since the last report, of the whole run: this process's share times processes."""

    def __init__(self, cfg: Config, totals: dict | None = None):
        self.cfg, self.peak = cfg, accelerators.peak_flops_per_sec(jax.devices()[0].device_kind)
        self.total = totals or {"tokens": 0, "patches": 0, "images": 0, "flops": 0.0}
        self.begin()

    def begin(self) -> None:
        """Rates are measured from here on."""
        self._since, self._steps, self._waited, self._positions = time.perf_counter(), 0, 0.0, 0
        self._start = dict(self.total)

    def pause(self, seconds: float) -> None:
        """Leaves out time spent on evaluation and checkpoints."""
        self._since += seconds

    def add(self, batch, waited: float) -> None:
        """Counts one host batch; waited: seconds the step waited for it."""
        self._steps, self._waited, n = self._steps + 1, self._waited + waited, jax.process_count()
        if isinstance(batch, Batch):
            self._positions += n * batch.tokens_BT.size
            self.total["tokens"] += n * int((batch.segment_ids_BT > 0).sum())
            self.total["patches"] += n * int((batch.image_ids_BT > 0).sum())
            self.total["images"] += n * int((batch.max_t_BI > 0).sum())
            self.total["flops"] += n * training_flops(self.cfg, batch)
        else:
            self.total["images"] += n * len(batch.row_ids_B)

    def report(self) -> dict:
        """Rates since the last report, and totals since the run's first step, resumed or not."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        did = {name: self.total[name] - self._start[name] for name in self.total}
        out = {"perf/step_ms": 1e3 * seconds / max(self._steps, 1),
               "perf/images_per_sec": did["images"] / seconds,
               "data/wait_fraction": self._waited / seconds, "total/images": self.total["images"]}
        if self._positions:
            out |= {f"total/{name}": total for name, total in self.total.items()}
            out |= {"perf/tokens_per_sec": did["tokens"] / seconds,
                    "perf/patches_per_sec": did["patches"] / seconds,
                    "perf/model_flops_per_sec": did["flops"] / seconds,
                    "data/fill": did["tokens"] / self._positions}
            if self.peak:
                out["perf/mfu"] = did["flops"] / seconds / (self.peak * jax.device_count())
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
