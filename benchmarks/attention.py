"""Interval attention on this machine's CPU against the dense form: time and memory, forward and backward.

  python benchmarks/attention.py                                              # a table
  python benchmarks/attention.py --out benchmarks/results/attention_cpu.json  # and a file

Rows are packed documents of about 1,000 tokens with images of 256 patches; batch 1, 8 heads of 64, float32.
Every measurement is a process of its own, so that its peak memory is its own. `growth` is peak memory over
the peak with the inputs in place. Times are the least of several repetitions; compare them
within a run, not between machines. Dense is left out where its arrays would not fit.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import machine
from tfusion.kernels import interval_attention_cpu as cpu
from tfusion.kernels.block_map import block_map
from tfusion.models.masks import key_intervals

B, H, E = 1, 8, 64
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
DENSE_ARRAYS = 5  # of (H, T, T) in float32, alive at once in the dense backward


def packed_intervals(T: int, seed: int = 0):
    """Documents of 500 to 1,500 positions, each with an image of 256 patches."""
    rng, segments, images, at, number = np.random.default_rng(seed), np.zeros((1, T)), np.zeros((1, T)), 0, 0
    while at < T:
        length, number = int(rng.integers(500, 1500)), number + 1
        segments[:, at : at + length] = number
        images[:, at + 100 : min(at + 356, at + length)] = number
        at += length
    return key_intervals(jnp.asarray(segments, jnp.int32), jnp.asarray(images, jnp.int32))


def forward(dense: bool, q, k, v, k_start, k_end, dout):
    return cpu.forward(q, k, v, k_start, k_end, dense=dense)


def forward_and_backward(dense: bool, q, k, v, k_start, k_end, dout):
    out, lse = forward(dense, q, k, v, k_start, k_end, dout)
    return out, cpu.backward(q, k, v, k_start, k_end, out, lse, dout, dense=dense)


def peak_mib() -> float:
    """Linux's VmHWM, because ru_maxrss starts at the peak of the process that started this one."""
    status = Path("/proc/self/status")
    if not status.exists():  # macOS counts bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return int(next(line.split()[1] for line in status.read_text().splitlines() if "VmHWM" in line)) / 1024


def measure(form: str, T: int, seconds: float) -> dict:
    """Runs in the child process."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (jnp.asarray(rng.standard_normal((B, T, H, E), np.float32)) for _ in range(4))
    k_start, k_end = packed_intervals(T)
    arguments = jax.block_until_ready((q, k, v, k_start, k_end, dout))
    result = {"form": form, "T": T, "inputs_mib": round(peak_mib(), 1)}
    for name, fn in (("forward", forward), ("forward_backward", forward_and_backward)):
        run = jax.jit(partial(fn, form == "dense")).lower(*arguments).compile()
        times, end = [], time.perf_counter() + seconds
        while len(times) < 2 or (time.perf_counter() < end and len(times) < 20):
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            times.append(time.perf_counter() - start)
        result[f"{name}_s"] = round(min(times), 5)
        result[f"{name}_peak_mib"] = round(peak_mib(), 1)
    result["growth_mib"] = round(result["forward_backward_peak_mib"] - result["inputs_mib"], 1)
    return result


def available_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def run_child(form: str, T: int, seconds: float) -> dict:
    command = [sys.executable, __file__, "--child", form, str(T), "--seconds", str(seconds)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def compare(lengths, seconds: float) -> dict:
    results, started = [], time.time()
    cases = [(T, form) for T in lengths for form in ("interval", "dense")]
    for n, (T, form) in enumerate(cases):
        print(f"\r{n + 1}/{len(cases)}: {form} T={T}, {time.time() - started:.0f} s so far    ", end="",
              file=sys.stderr, flush=True)
        if form == "dense" and available_bytes() / 2 < DENSE_ARRAYS * 4 * B * H * T * T:
            results.append({"form": form, "T": T, "left_out": "does not fit"})
        else:
            results.append(run_child(form, T, seconds))
    print(file=sys.stderr)
    return {"machine": machine(), "shape": {"B": B, "H": H, "K": H, "E": E, "dtype": "float32"},
            "results": results, "ratios": [ratios(T, results) for T in lengths]}


def ratios(T: int, results) -> dict:
    """Dense over interval within this run, and how many of the blocks are run."""
    blocks = block_map(*map(np.asarray, packed_intervals(T)), cpu.BLOCK_Q, cpu.BLOCK_K)
    row = {"T": T, "blocks_run": int(blocks.run), "blocks_ideal": int(blocks.ideal),
           "blocks_all": blocks.kind_Bij.size}
    ours, dense = ({r["form"]: r for r in results if r["T"] == T}[form] for form in ("interval", "dense"))
    if "left_out" not in dense:
        for key in ("forward_s", "forward_backward_s", "growth_mib"):
            row[f"dense_over_interval_{key}"] = round(dense[key] / max(ours[key], 1e-9), 2)
    return row


def print_table(report: dict) -> None:
    print(f"{'T':>6} {'form':>9} {'forward':>10} {'+ backward':>11} {'growth':>11} {'peak':>11}")
    for r in report["results"]:
        if "left_out" in r:
            print(f"{r['T']:>6} {r['form']:>9} {r['left_out']}")
            continue
        milliseconds = f"{r['forward_s'] * 1e3:>7.1f} ms {r['forward_backward_s'] * 1e3:>8.1f} ms"
        memory = f"{r['growth_mib']:>7.0f} MiB {r['forward_backward_peak_mib']:>7.0f} MiB"
        print(f"{r['T']:>6} {r['form']:>9} {milliseconds} {memory}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=2.0, help="repeat each measurement this long")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child[0], int(args.child[1]), args.seconds)))
        return
    report = compare(args.lengths, args.seconds)
    print_table(report)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
