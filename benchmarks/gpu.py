"""One NVIDIA GPU, one call of a few minutes: is the attention kernel right, how fast, what MFU has a step?

  python benchmarks/gpu.py --out=benchmarks/results/gpu_h100.json
  python benchmarks/gpu.py --rehearse --out=gpu.json      tiny shapes on a CPU, kernels interpreted
  ... --torch_python=/path/to/python                      where PyTorch has an environment of its own
  ... --sections=step                                     one of those below

  numerics   out, dq, dk, dv of interval attention against the float32 definition, computed on the CPU
  attention  packed rows in bfloat16: ours, dense masks, cuDNN, tokamax where installed, FlexAttention
  launch     our three kernels under other tile sizes than those of `interval_attention_gpu.launch`
  step       the training step of the paper's sizes: tokens/s, MFU, peak memory

Only worker processes touch the GPU, so that one that crashes, hangs or runs out of memory takes nothing else
along: its error is one line of the result. The result is written again after every part, and what no longer
fits `--budget_seconds` is skipped and named.

Contenders compile at the same time and are then timed in turn, round after round; a ratio, another's time over
ours, is taken within one round. In every call ours finds its blocks and the dense ones make their mask;
FlexAttention's block mask is made outside. cudnn_causal (whole rows) and cudnn_documents (equal documents,
about our pairs) have another mask: bounds, not contenders. TFLOP/s count pairs that the mask shows, 4 E a head
forward, 12 E with the backward.
"""

import contextlib
import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from absl import flags
from gpu_worker import ATTENTIONS, CASES, DOCUMENT, KERNELS, LIMITS, TINY, intervals, one_line

from tfusion import paths
from tfusion.errors import UserError, run

HERE = Path(__file__).resolve().parent
OUT = flags.DEFINE_string("out", None, "write the result here, as JSON")
BUDGET = flags.DEFINE_float("budget_seconds", 450.0, "it ends by then, whatever is done")
REHEARSE = flags.DEFINE_bool("rehearse", False, "every part at tiny shapes on a CPU; no number means anything")
TORCH_PYTHON = flags.DEFINE_string("torch_python", sys.executable, "interpreter that has PyTorch")
SECTIONS = flags.DEFINE_list("sections", "numerics,attention,launch,step", "which to run")

ROUNDS, BLOCK_SECONDS = 10, 0.06
OTHER_MASK = ("cudnn_causal", "cudnn_documents")
DIRECTIONS = {"forward": 4, "forward_backward": 12}  # and model FLOPs per pair, head and head dimension
LAUNCH_CASES = (0, 2)  # one of each head dimension
# The likeliest remat policy first, so that a short budget still has one number for every size.
STEPS = [(size, remat) for remat in ("attention", "dots", "full") for size in ("0.16b", "0.76b", "1.4b")]
BATCH_SIZES = {"0.16b": 16, "0.76b": 8, "1.4b": 8}  # halved where memory runs out
STEP_NEEDS = 45.0  # seconds that must be left to start one, until longer ones were seen
TIMING_NEEDS = 10.0  # and to time one case
PATIENCE = {"start": 150.0, "timing": 30.0, "step": 200.0}  # seconds; longer, and a worker is taken to hang
# Of the device's memory, what a worker may have while others are there.
MEMORY = {"xla_dense": 0.45, "step": 0.92}
MEMORY_OF_OTHERS = 0.08


class Process:
    """A worker, killed where an answer takes too long. Raises OSError once it has ended otherwise than well."""

    def __init__(self, command: list[str], memory: float = MEMORY_OF_OTHERS):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=os.environ | {
                "JAX_PLATFORMS": "cpu" if REHEARSE.value else "cuda,cpu",  # cpu: computes the definition
                "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
                "XLA_PYTHON_CLIENT_PREALLOCATE": str(memory == MEMORY["step"]).lower(),
                "XLA_CLIENT_MEM_FRACTION": str(memory),
                "XLA_PYTHON_CLIENT_MEM_FRACTION": ""})  # its old name; jax refuses both

    def read(self, seconds: float):
        """The next answer, or None after the last one."""
        seconds, late = max(seconds, 1.0), threading.Event()

        def kill():
            late.set()
            self.process.kill()

        killer = threading.Timer(seconds, kill)
        killer.start()
        line = self.process.stdout.readline()
        killer.cancel()
        if line:
            return json.loads(line)
        status = self.process.wait()
        if status == 0:
            return None
        self.errors.seek(0)
        said = [line.strip() for line in self.errors if line.strip()] or [""]
        reason = next((line for line in reversed(said) if "rror" in line or "Check fail" in line), said[-1])
        why = f"no answer in {seconds:.0f} s; " if late.is_set() else ""
        raise OSError(f"{why}worker ended with status {status}: {reason[:300]}")

    def answer(self, seconds: float):
        """The next answer; that there is none is an error too."""
        answer = self.read(seconds)
        if answer is None:
            raise OSError("worker ended without an answer")
        return answer

    def ask(self, seconds: float, **question):
        with contextlib.suppress(BrokenPipeError):  # `read` says why
            print(json.dumps(question), file=self.process.stdin, flush=True)
        return self.answer(seconds)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it may be dead
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()


def worker(*work) -> Process:
    """work: what gpu_worker.py is to do; its first or second word decides on its memory."""
    memory = MEMORY.get(work[0]) or MEMORY.get(work[-1], MEMORY_OF_OTHERS)
    return Process([sys.executable, str(HERE / "gpu_worker.py"), json.dumps(work)], memory)


def flex_worker(folder: str) -> Process:
    """PyTorch's process; the intervals go there by file."""
    path, cases = Path(folder) / "intervals.npz", TINY if REHEARSE.value else CASES
    np.savez(path, **{f"case{n}": np.stack(intervals(case)) for n, case in enumerate(cases)})
    return Process([TORCH_PYTHON.value, str(HERE / "flex_attention.py"), f"--intervals={path}",
                    f"--cases={json.dumps([case._asdict() for case in cases])}",
                    f"--device={'cpu' if REHEARSE.value else 'cuda'}"])


def launch_cases() -> tuple[int, ...]:
    return (0,) if REHEARSE.value else LAUNCH_CASES


class Run:
    """The result so far, the time left, and the contenders, which compile from the start."""

    def __init__(self):
        self.began, self.contenders, self.abouts = time.monotonic(), {}, {}
        self.report = {"rehearsal": REHEARSE.value, "budget_seconds": BUDGET.value, "machine": machine()}
        self.save()

    def left(self) -> float:
        return BUDGET.value - (time.monotonic() - self.began)

    def save(self) -> None:
        if OUT.value:
            paths.replace_text(Path(OUT.value), json.dumps(self.report, indent=1) + "\n")

    def start(self, folder: str) -> None:
        makers = {}
        if "attention" in SECTIONS.value:
            makers |= {name: functools.partial(worker, "attention", name) for name in ATTENTIONS}
            makers["flex"] = functools.partial(flex_worker, folder)
        if "launch" in SECTIONS.value:
            makers |= {f"launch {n}": functools.partial(worker, "launch", n) for n in launch_cases()}
        for name, make in makers.items():
            try:
                self.contenders[name] = make()
            except OSError as e:  # no such interpreter
                self.abouts[name] = {"functions": [], "errors": {"start": one_line(e)}}

    def wait(self) -> None:
        """Until all have compiled, for none may use the device while others are timed; half of the budget at
        most, and `abouts` says what each has."""
        until = time.monotonic() + max(self.left() - BUDGET.value / 2, TIMING_NEEDS)
        for name, process in self.contenders.items():
            if name not in self.abouts:
                try:
                    self.abouts[name] = process.answer(until - time.monotonic())
                except OSError as e:
                    self.abouts[name] = {"functions": [], "errors": {"compile": one_line(e)}}

    def close(self) -> None:
        for process in self.contenders.values():
            process.close()
        self.contenders = {}


def run_sections(sections: dict, report: dict, save) -> None:
    """section(out) fills report[name]; what it had before an exception stays, and the others go on."""
    for name, section in sections.items():
        print(f"\n{name}", flush=True)
        out, began = report.setdefault(name, {}), time.monotonic()
        try:
            section(out)
        except Exception as e:
            out["error"] = one_line(e)
            print(f"  {out['error']}", flush=True)
        out["seconds"] = round(time.monotonic() - began, 1)
        save()


def numerics(state: Run, out: dict) -> None:
    out |= {"ok": False, "limits": LIMITS, "cases": []}
    checks = worker("numerics")
    try:
        while (case := checks.read(min(PATIENCE["start"], state.left()))) is not None:
            if "ok" not in case:
                raise RuntimeError(case["error"])
            out["cases"].append(case)
            state.save()
            errors = " ".join(f"{key} {case[key]:.1e}" if case.get(key) is not None else f"{key} -"
                              for key in ("out", "dq", "dk", "dv"))
            print(f"  {'ok   ' if case['ok'] else 'WRONG'} {case['rows']:7s} T {case['T']:5d} H {case['H']} "
                  f"K {case['K']} E {case['E']:3d} {case['dtype']:8s} {case.get('error', errors)}", flush=True)
    finally:
        checks.close()
    out["ok"] = bool(out["cases"]) and all(case["ok"] for case in out["cases"])


def named_errors(state: Run, names: list[str]) -> dict[str, str]:
    return {f"{name}: {function}": error
            for name in names for function, error in state.abouts[name]["errors"].items()}


def alternate(state: Run, entries: dict, errors: dict) -> dict[str, list[float]]:
    """{name: seconds of a call, per round} of {name: (process, function)}, in turn; who dies is left out."""
    times, seconds, patience = {}, {name: [] for name in entries}, min(PATIENCE["timing"], state.left())
    for n in range(-1, ROUNDS):
        for name in [name for name in entries if name in seconds]:
            process, function = entries[name]
            try:
                if n < 0:
                    process.ask(patience, run=function, times=1)
                    took = process.ask(patience, run=function, times=1)["seconds"]
                    times[name] = min(max(1, round(BLOCK_SECONDS / took)), 1000)
                else:
                    answer = process.ask(patience, run=function, times=times[name])
                    seconds[name].append(answer["seconds"] / times[name])
            except OSError as e:
                errors[f"{name}: {function}"] = one_line(e)
                del seconds[name]
    return seconds


def spread(values: list, scale: float = 1.0) -> dict:
    return {"median": scale * statistics.median(values), "min": scale * min(values)}


def attention(state: Run, out: dict) -> None:
    names = [*ATTENTIONS, "flex"]
    state.wait()
    out |= {"cases": [], "errors": named_errors(state, names), "skipped": [],
            "flex": {key: state.abouts["flex"].get(key) for key in ("torch", "block_mask_ms")}}
    for case in TINY if REHEARSE.value else CASES:
        k_start, k_end = intervals(case)
        pairs = {"cudnn_causal": case.B * case.T * (case.T + 1) // 2,
                 "cudnn_documents": case.B * case.T * (min(DOCUMENT, case.T) + 1) // 2}
        visible = int((k_end - k_start).sum())
        row = {**case._asdict(), "visible_pairs": visible, "share_of_square": visible / case.B / case.T**2}
        for direction, per_pair in DIRECTIONS.items():
            label = f"{case.name} {direction}"
            if state.left() < TIMING_NEEDS:
                out["skipped"].append(label)
                continue
            entries = {name: (state.contenders[name], label) for name in names
                       if label in state.abouts[name]["functions"]}
            seconds = alternate(state, entries, out["errors"])
            row[direction] = {}
            for name, values in seconds.items():
                work = per_pair * pairs.get(name, visible) * case.H * case.E
                row[direction][name] = {"ms": spread(values, 1e3),
                                        "tflops": work / statistics.median(values) / 1e12,
                                        "other_mask": name in OTHER_MASK}
                if "ours" in seconds:
                    row[direction][name]["over_ours"] = spread([a / b for a, b in zip(values, seconds["ours"])])
            show_attention(label, row[direction])
        out["cases"].append(row)
        state.save()
    for name, error in out["errors"].items():
        print(f"  {name}: {error}")


def show_attention(label: str, results: dict) -> None:
    print(f"  {label:32s}{'ms':>9s}{'min':>9s}{'TFLOP/s':>9s}{'over ours':>11s}{'min':>7s}")
    for name, r in sorted(results.items(), key=lambda item: item[1]["ms"]["median"]):
        ratio = f"{r['over_ours']['median']:11.2f}{r['over_ours']['min']:7.2f}" if "over_ours" in r else ""
        name += " (other mask)" * r["other_mask"]
        print(f"    {name:30s}{r['ms']['median']:9.3f}{r['ms']['min']:9.3f}{r['tflops']:9.1f}{ratio}",
              flush=True)


def best_launch(seconds: dict, default: str, differs: dict) -> dict:
    """The default launch of a kernel, and the fastest of those that agree with it (None: none ran)."""
    launches = {label: {"ms": spread(values, 1e3), "differs": differs[label]}
                for label, values in seconds.items()}
    right = [label for label, r in launches.items()
             if r["differs"] is not None and r["differs"] <= LIMITS["bfloat16"]]
    best = min(right, key=lambda label: launches[label]["ms"]["median"], default=None)
    ratios = [a / b for a, b in zip(seconds.get(default, ()), seconds.get(best, ()))]
    return {"default": default, "best": best, "launches": launches,
            "default_over_best": statistics.median(ratios) if ratios else None}


def launch(state: Run, out: dict) -> None:
    """Forward, dq, and dk with dv, each by itself."""
    state.wait()
    out |= {"cases": [], "errors": named_errors(state, [f"launch {n}" for n in launch_cases()]), "skipped": []}
    for n in launch_cases():
        name, case = f"launch {n}", (TINY if REHEARSE.value else CASES)[n]
        about, row = state.abouts[name], case._asdict()
        for kernel in KERNELS:
            labels = [label for label in about["functions"] if label.split()[0] == kernel]
            if state.left() < TIMING_NEEDS or not labels:
                out["skipped"].append(f"{case.name} {kernel}")
                continue
            entries = {label: (state.contenders[name], label) for label in labels}
            seconds, default = alternate(state, entries, out["errors"]), about["defaults"][kernel]
            row[kernel] = best_launch(seconds, default, about["differs"])
            print(f"  {case.name}, default {default}")
            for label, r in row[kernel]["launches"].items():
                mark = "  best" if label == row[kernel]["best"] else ""
                print(f"    {label:24s}{r['ms']['median']:9.3f} ms   differs {r['differs']}{mark}", flush=True)
        out["cases"].append(row)
        state.save()
    for name, error in out["errors"].items():
        print(f"  {name}: {error}")


def step(state: Run, out: dict) -> None:
    out |= {"runs": [], "skipped": []}
    state.close()  # the whole memory is for the step now
    longest = 0.0 if REHEARSE.value else STEP_NEEDS
    for size, remat in STEPS[:1] if REHEARSE.value else STEPS:
        batch_size = 1 if REHEARSE.value else BATCH_SIZES[size]
        while batch_size:
            if state.left() < longest:
                out["skipped"].append(f"{size} {remat}, {batch_size} rows")
                break
            began, process = time.monotonic(), worker("step", size, remat, batch_size)
            try:
                result = process.answer(min(PATIENCE["step"], state.left()))
            except OSError as e:
                result = {"error": one_line(e)}
            finally:
                process.close()
            longest = max(longest, time.monotonic() - began)
            out["runs"].append({"size": size, "remat": remat, "batch_size": batch_size, **result})
            show_step(out["runs"][-1])
            state.save()
            if not any(text in result.get("error", "") for text in ("RESOURCE_EXHAUSTED", "ut of memory")):
                break
            batch_size //= 2


def show_step(r: dict) -> None:
    print(f"  {r['size']:6s}{r['remat']:10s}{r['batch_size']:3d} rows  ", end="")
    if "error" in r:
        print(r["error"], flush=True)
        return
    mfu = f"{100 * r['mfu']:.1f} %" if r["mfu"] else "not known"
    memory = f"{r['peak_bytes'] / 2**30:.1f} GiB" if r["peak_bytes"] else "not known"
    print(f"{r['step_ms']['median']:8.1f} ms  min {r['step_ms']['min']:.1f}  {r['tokens_per_second']:9.0f} "
          f"tokens/s  {r['tflops']:6.1f} TFLOP/s  MFU {mfu}  peak {memory}", flush=True)


def machine() -> dict:
    """Raises UserError where jax sees no GPU."""
    try:
        process = worker("device")
        about = process.answer(PATIENCE["start"])
        process.close()
    except OSError as e:
        raise UserError(f"no NVIDIA GPU that jax can use ({e}): install jax[cuda13], or --rehearse on a CPU"
                        ) from e
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        smi = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        smi = None
    return {**about, "nvidia_smi": smi, "cores": os.cpu_count(), "system": platform.platform(),
            "python": platform.python_version(),
            "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")}


def main() -> None:
    known = {section.__name__: section for section in (numerics, attention, launch, step)}
    unknown = set(SECTIONS.value) - set(known)
    if unknown:
        raise UserError(f"--sections: unknown '{min(unknown)}'; known: {', '.join(known)}")
    jax.config.update("jax_platforms", "cpu")  # the GPU belongs to the workers
    state = Run()
    print(", ".join(f"{key} {value}" for key, value in state.report["machine"].items()), flush=True)
    sections = {name: functools.partial(section, state) for name, section in known.items()
                if name in SECTIONS.value}
    with tempfile.TemporaryDirectory() as folder:
        try:
            state.start(folder)
            run_sections(sections, state.report, state.save)
        finally:
            state.close()
    state.report["seconds"] = round(time.monotonic() - state.began, 1)
    state.save()


if __name__ == "__main__":
    run(main)
