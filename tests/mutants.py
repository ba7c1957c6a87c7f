"""Proves the tests: puts each fault of tests/mutants.txt into a copy of the tree, one at a time, and runs the
tests named beside it. A test that still passes lets the fault survive, and the exit status is 1.

  make mutants                 (python -m tests.mutants [--jobs N] [WORD ...]: only lines that hold a WORD)
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("tfusion", "experiments", "tests", "launch", "docs", "pytest.ini", "ruff.toml",
          "requirements.txt", "Dockerfile")
TIMEOUT = 900
FAILED = 1  # pytest's status where tests ran and some failed; errors in collection are another


class Mutant(NamedTuple):
    line: int
    path: str
    original: str
    replacement: str
    tests: list[str]

    @property
    def name(self) -> str:
        return f"{self.path}:{self.original.strip().splitlines()[0]}"


def parse(text: str) -> list[Mutant]:
    """Lines of four fields; \\n in a fragment is a line's end."""
    out = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = [field.strip().replace("\\n", "\n") for field in line.replace("| |", "|  |").split(" | ")]
        if len(fields) != 4:
            sys.exit(f"error: mutants.txt, line {number}: four fields are needed, there are {len(fields)}")
        out.append(Mutant(number, *fields[:3], fields[3].split()))
    return out


def copy_tree(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, folder / name)
    return folder


def run_tests(tree: Path, tests: list[str], cache: Path) -> int:
    """pytest's exit status. Programs that a fault leaves as they are come from the shared cache."""
    path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1",
           "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
               f"--basetemp={tree / 'pytest'}", *tests]
    try:
        return subprocess.run(command, cwd=tree, env=env, capture_output=True, timeout=TIMEOUT).returncode
    except subprocess.TimeoutExpired:
        return FAILED  # a fault that hangs is noticed


def judge(mutant: Mutant, cache: Path) -> str:
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder))
        file = tree / mutant.path
        source = file.read_text() if file.exists() else ""
        if source.count(mutant.original) != 1:
            return f"STALE: the fragment occurs {source.count(mutant.original)} times"
        file.write_text(source.replace(mutant.original, mutant.replacement))
        status = run_tests(tree, mutant.tests, cache)
    if status == FAILED:
        return "killed"
    return "SURVIVED" if status == 0 else f"BROKEN: pytest ended with status {status}"


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Each fault of tests/mutants.txt must make its test fail.")
    parser.add_argument("words", nargs="*", help="only lines that hold one of these")
    parser.add_argument("--jobs", type=int, default=1, help="faults tried at once")
    args = parser.parse_args()
    text = (ROOT / "tests" / "mutants.txt").read_text()
    lines, mutants = text.splitlines(), parse(text)
    if args.words:
        mutants = [m for m in mutants if any(word in lines[m.line - 1] for word in args.words)]
    if not mutants:
        sys.exit("error: no such mutant in tests/mutants.txt")
    began, verdicts = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        cache = Path(folder) / "xla"
        tree = copy_tree(Path(folder) / "tree")
        tests = sorted({test for m in mutants for test in m.tests})
        print(f"without a fault: {len(tests)} tests must pass", flush=True)
        status = run_tests(tree, tests, cache)
        if status:
            sys.exit(f"error: they do not (pytest ended with status {status}); mend them first")
        start = time.monotonic()
        futures = {pool.submit(judge, m, cache): m for m in mutants}
        for done, future in enumerate(as_completed(futures), start=1):
            mutant, verdict = futures[future], future.result()
            verdicts[mutant.line] = verdict
            left = (time.monotonic() - start) / done * (len(mutants) - done)
            print(f"[{done}/{len(mutants)}] ETA {clock(left):>5}  {verdict:10s} {mutant.name}", flush=True)
    bad = [m for m in mutants if verdicts[m.line] != "killed"]
    print(f"\n{len(mutants) - len(bad)} of {len(mutants)} faults killed in {clock(time.monotonic() - began)}")
    for mutant in bad:
        print(f"line {mutant.line}: {verdicts[mutant.line]}\n  {mutant.path}: {mutant.original!r} -> "
              f"{mutant.replacement!r}\n  {' '.join(mutant.tests)}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
