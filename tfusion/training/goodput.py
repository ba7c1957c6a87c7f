"""Where the wall time of a run goes, over all its attempts: each second belongs to one part.

`<workdir>/goodput.json`: {"seconds": {part: s} of the whole run, "attempts": [{"began": Unix seconds,
"seconds": {part: s}}]}. It is written every ten seconds, so that an attempt that is killed leaves what it took.
"""

import contextlib
import json
import os
import threading
import time
from pathlib import Path

from tfusion.paths import replace_text

PARTS = ("init", "compile", "data", "step", "save", "eval", "lost")
FILE, BEAT_S = "goodput.json", 10.0


class Goodput:
    """Counts from `began` on, as `init` until another part is entered.

    What an attempt did after the checkpoint that the next one goes on from is `lost`, apart from saving.
    """

    def __init__(self, workdir: Path, began: float | None = None):
        now = time.time()
        self._path, self._attempts = workdir / FILE, _attempts(workdir / FILE)
        self._began = now if began is None else began
        self._now = {**dict.fromkeys(PARTS, 0.0), "init": max(now - self._began, 0.0)}  # this attempt's
        self._part, self._since, self._base = "init", time.perf_counter(), dict.fromkeys(PARTS, 0.0)
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="goodput", daemon=True)

    def resume(self, saved: dict, writing: bool) -> None:
        """saved: `seconds` as of the checkpoint that this attempt goes on from; {} where there is none.
        writing: goodput.json is kept from here on."""
        spent = {part: sum(attempt["seconds"].get(part, 0.0) for attempt in self._attempts) for part in PARTS}
        base = {part: saved.get(part, 0.0) for part in PARTS}
        whole = max(sum(spent.values()), sum(base.values()))
        base["save"] = max(base["save"], spent["save"])
        base["lost"] = max(whole - sum(base[part] for part in PARTS if part != "lost"), 0.0)
        self._base = base
        if writing:
            self._write()
            self._thread.start()

    def enter(self, part: str) -> str:
        """From now on the time is this part's. Returns the one that it was until now."""
        with self._lock:
            now = time.perf_counter()
            self._now[self._part] += now - self._since
            before, self._part, self._since = self._part, part, now
        return before

    @contextlib.contextmanager
    def part(self, part: str):
        before = self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    def seconds(self) -> dict:
        """{part: seconds} of the whole run until now."""
        now = self._attempt()
        return {part: self._base[part] + now[part] for part in PARTS}

    def values(self) -> dict:
        """For a line of metrics: seconds of each part, and the share that steps have of the whole."""
        seconds = self.seconds()
        share = seconds["step"] / max(sum(seconds.values()), 1e-9)
        return {**{f"goodput/{part}_s": value for part, value in seconds.items()}, "goodput/share": share}

    def _attempt(self) -> dict:
        with self._lock:
            running = time.perf_counter() - self._since
            return {part: value + running * (part == self._part) for part, value in self._now.items()}

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            self._write()

    def _write(self) -> None:
        this = {"began": round(self._began, 1), "seconds": _rounded(self._attempt())}
        made = {"seconds": _rounded(self.seconds()), "attempts": [*self._attempts, this]}
        with contextlib.suppress(Exception):  # a full disk costs these figures, not the run
            replace_text(self._path, json.dumps(made, indent=1) + "\n")

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
            self._write()


def of_run(folder) -> tuple[float, int] | None:
    """(the share of a run's wall time that went into its steps, how often it was begun again), as its workdir
    says; None where that says nothing."""
    path = folder / FILE
    if not (attempts := _attempts(path)):
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        seconds = json.loads(path.read_text())["seconds"]
        return seconds["step"] / sum(seconds.values()), len(attempts) - 1
    return None


def _rounded(seconds: dict) -> dict:
    return {part: round(value, 2) for part, value in seconds.items()}


def _attempts(path: Path) -> list[dict]:
    """Those of a goodput.json; none where it is absent or broken: it stops no run."""
    try:
        found = json.loads(path.read_text())["attempts"]
        return [x for x in found if all(isinstance(s, int | float) for s in x["seconds"].values())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def process_began() -> float:
    """The Unix time at which this process started; the present one where the system does not tell."""
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        return booted + int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):  # not Linux
        return time.time()
