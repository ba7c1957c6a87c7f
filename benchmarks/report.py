"""What every benchmark's result file holds beside its figures: where and when they were taken."""

import datetime
import json
import os
import platform
from pathlib import Path

import jax
import numpy as np


def machine() -> dict:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in text.splitlines() if "model name" in line), None)
    return {"date": datetime.date.today().isoformat(), "device": jax.devices()[0].device_kind,
            "cpu": model or platform.processor(), "cores": os.cpu_count(), "system": platform.platform(),
            "load_average_at_start": os.getloadavg()[0], "python": platform.python_version(),
            "jax": jax.__version__, "numpy": np.__version__}


def save(out: Path | None, machine: dict, result: dict) -> None:
    """The result file; nothing where none is asked for."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine, "result": result}, indent=1) + "\n")
        print(f"wrote {out}")
