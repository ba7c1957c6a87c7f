"""Contenders of a benchmark in processes of their own, timed in turn. Standard library only, so that a
contender may live in another interpreter than the benchmark.

A worker is asked one line of JSON at a time and answers with one:
  {"run": NAME, "times": N} -> {"seconds": wall time of all N, "cpu_seconds": of this process}
  {"memory": true}          -> {"peak_mib": the process's largest resident size so far}
"""

import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path


def peak_mib() -> float:
    """Linux's VmHWM, because ru_maxrss starts at the peak of the process that started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def serve(about: dict, functions: dict, finish) -> None:
    """The worker's side: says `about`, then answers until stdin closes.

    functions: {name: function without arguments}. finish: waits for the work that they started.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer

    def answer(**values):
        print(json.dumps(values), file=answers, flush=True)

    answer(**about)
    for line in sys.stdin:
        question = json.loads(line)
        if "memory" in question:
            answer(peak_mib=peak_mib())
            continue
        function = functions[question["run"]]
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(question["times"]):
            function()
        finish()
        answer(seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu)


class Worker:
    """The benchmark's side. `about` is what the contender said of itself."""

    def __init__(self, command: list[str], threads: int):
        def pin():  # XLA takes as many threads as the process has cores
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])

        self.command = command
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=pin,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(threads)})
        self.about = self._read()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise OSError(f"a contender ended with status {self.process.wait()}, its error is above: "
                          f"{' '.join(self.command)}")
        return json.loads(line)

    def ask(self, **question) -> dict:
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
