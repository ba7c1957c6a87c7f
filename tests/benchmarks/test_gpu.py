"""The GPU benchmark without a GPU: its rehearsal, and that one broken part costs no other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SECTIONS = ("numerics", "attention", "launch", "step")

FAULTS = """
import sys
sys.path.insert(0, "benchmarks")
import gpu

def numerics(state, out):
    process = {"crash": "import os; os.abort()", "fail": "raise ValueError('why')",
               "hang": "import time; time.sleep(60)"}
    for name, code in process.items():
        worker = gpu.Process([sys.executable, "-c", code])
        try:
            worker.ask(1.0 if name == "hang" else 30.0, run="it")
        except OSError as e:
            out[name] = str(e)
        worker.close()
    raise ValueError("first line\\nsecond line")

def step(state, out):
    out["device"] = gpu.worker("device").read(60.0)

gpu.numerics, gpu.step = numerics, step
gpu.run(gpu.main)
"""


def call(*command, **environment):
    return subprocess.run(
        [sys.executable, *command], cwd=REPO, text=True, capture_output=True,
        env={**os.environ, "XLA_FLAGS": "", **environment})


def strict(path) -> dict:
    """What json.loads takes beside JSON (NaN) is refused."""
    return json.loads(path.read_text(), parse_constant=pytest.fail)


@pytest.mark.slow
def test_rehearsal_runs_every_part(tmp_path):
    out = tmp_path / "gpu.json"
    done = call("benchmarks/gpu.py", "--rehearse", f"--out={out}", JAX_COMPILATION_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = strict(out)
    assert report["rehearsal"] and report["seconds"] < report["budget_seconds"]
    assert not [name for name in SECTIONS if "error" in report[name]]
    assert report["numerics"]["ok"] and len(report["numerics"]["cases"]) == 2
    (case,) = report["attention"]["cases"]
    for direction in ("forward", "forward_backward"):
        assert {"ours", "xla_dense", "cudnn_dense", "cudnn_causal", "cudnn_documents"} <= set(case[direction])
        assert case[direction]["ours"]["over_ours"]["median"] == 1.0
    assert all(name.startswith(("flex", "tokamax")) for name in report["attention"]["errors"])  # not required
    (case,) = report["launch"]["cases"]
    for kernel in ("forward", "dq", "dkv"):
        assert len(case[kernel]["launches"]) == 2 and case[kernel]["best"]
    (run,) = report["step"]["runs"]
    assert run["tokens_per_second"] > 0 and run["model_flops"] > 0
    assert run["first_lm_loss"] == pytest.approx(5.57, abs=0.1)  # log of the 262 ids


def test_a_broken_part_costs_no_other(tmp_path):
    """An exception in a section; a worker that crashes, raises, or hangs."""
    out = tmp_path / "gpu.json"
    done = call("-c", FAULTS, "--rehearse", "--sections=numerics,step", f"--out={out}")
    assert done.returncode == 0, done.stderr
    report = strict(out)
    broken = report["numerics"]
    assert broken["error"] == "ValueError: first line"
    assert broken["crash"].startswith("worker ended with status -6")
    assert broken["fail"] == "worker ended with status 1: ValueError: why"
    assert broken["hang"].startswith("no answer in 1 s; worker ended with status -9")
    assert report["step"]["device"]["platform"] == "cpu" and "error" not in report["step"]


def test_without_a_gpu_it_says_so(tmp_path):
    done = call("benchmarks/gpu.py", f"--out={tmp_path / 'gpu.json'}", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and not (tmp_path / "gpu.json").exists()
    assert done.stderr.startswith("error: no NVIDIA GPU that jax can use") and done.stderr.count("\n") == 1
