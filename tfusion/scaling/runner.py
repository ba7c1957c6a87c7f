"""Runs what is missing of a sweep on this machine: its points' verbs, each a process of its own.

A point begins when those that it names are finished, in the order of the file; at most so many at a time. A
point that another process is at is left alone: its lock goes on to the verb's process, and outlives a runner
that is killed. A verb that was preempted or killed is started again, where it goes on; one that failed ends its
point, which waits for --retry.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from tfusion import workdir
from tfusion.errors import PREEMPTED, RESTARTED, Stopped, UserError
from tfusion.scaling import progress
from tfusion.scaling.points import Point, place, resolve
from tfusion.scaling.results import kept_codec, other_config

RESTARTS = 3  # of one point
POLL_S = 1.0
PACED_S = 10.0  # between two looks at how far the running ones are
TAIL = 10_000  # bytes of what a verb said that are looked at


def command(point: Point, verb: str, points: dict[str, Point], results: Path | None = None) -> list[str]:
    """What is typed to run a verb of a point. results: where an image tokenizer may be kept to prepare with."""
    named = {key: place(value, points) for key, value in point.overrides.items()}
    flags = {key: place(value, points) for key, value in point.flags.get(verb, {}).items()}
    if verb == "prepare" and results and (codec := kept_codec(results, point.name, point.config_hash)):
        flags["codec"] = codec
    if verb != "prepare":
        flags = {"workdir": point.folder} | flags
    config = [f"--config={point.config}", *(f"--config.{key}={value}" for key, value in named.items())]
    return [sys.executable, "-m", f"tfusion.{verb}", *(config if verb != "evaluate" else []),
            *(f"--{key}={value}" for key, value in flags.items())]


def check_frozen(point: Point) -> None:
    """Raises UserError where its experiment says something else by now, for the verb would train that; or its
    workdir holds a run of another configuration, for that would go on."""
    if resolve(point.config, point.overrides).to_dict() != point.resolved:
        raise UserError(f"'{point.name}' is no longer what was frozen in {point.folder.parent}: {point.config} "
                        "was changed; put it back, or freeze another sweep")
    if other := other_config(point.folder, point._asdict()):
        raise UserError(f"{point.folder} holds another run than '{point.name}' ({other}): move it away")


class Running(NamedTuple):
    point: Point
    verb: str
    process: subprocess.Popen
    lock: object  # held as long as the point's verbs run


class Runner:
    def __init__(self, out: Path, points: list[Point], parallel: int, retry: bool, results: Path | None = None):
        self.out, self.points, self.parallel = out, {point.name: point for point in points}, parallel
        self.results, self.running = results, []
        self.restarts = dict.fromkeys(self.points, 0)
        self.stopping, self.paced = False, 0.0
        states = {point.name: self.state(point) for point in points}
        self.failed = {name for name, state in states.items() if state.what == progress.FAILED and not retry}
        self.finished = {name for name, state in states.items() if state.what == progress.FINISHED}
        self.told = set()
        self.bar = tqdm(desc=out.name, total=sum(point.flops for point in points), unit="FLOP", unit_scale=True,
                        dynamic_ncols=True, initial=sum(self.points[name].flops for name in self.finished))

    def state(self, point: Point) -> progress.State:
        return progress.state(point, self.points, self.results)

    def run(self) -> None:
        """Until nothing is left that can be run. Raises Stopped after SIGTERM or Ctrl-C, when all have saved,
        and UserError where points failed."""
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while self._more():
                time.sleep(POLL_S)
                self._show()
        finally:
            self.bar.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.stopping:
            raise Stopped("stopped; the same command goes on")
        if self.failed:
            raise UserError(f"{len(self.failed)} of {len(self.points)} points failed "
                            f"({', '.join(sorted(self.failed))}): their {progress.LOG} says why; --retry runs "
                            "them again")
        print(f"{len(self.finished)} of {len(self.points)} points are finished")

    def _more(self) -> bool:
        """Sees who has ended and begins others; False when none runs and none can be begun."""
        for one in [one for one in self.running if one.process.poll() is not None]:
            self.running.remove(one)
            self._ended(one)
        waits = self._begin_others() if not self.stopping else False
        return bool(self.running) or waits

    def _begin_others(self) -> bool:
        """Begins as many as there is room for. Returns whether something waits for another process's point."""
        elsewhere, busy, waits = set(), {one.point.name for one in self.running}, False
        for name, point in self.points.items():
            if name in busy | self.finished | self.failed:
                continue
            if not self.finished.issuperset(point.needs):
                waits |= bool(elsewhere.intersection(point.needs))
                continue
            if len(self.running) == self.parallel:
                break
            if not self._begin(point):
                elsewhere.add(name)
        return waits

    def _begin(self, point: Point) -> bool:
        """False where another process is at it, or finished it meanwhile."""
        folder = point.folder
        check_frozen(point)
        if self.state(point).what == progress.RUNNING:
            self._tell(point.name, "is run by another process: left alone")
            return False
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = workdir.hold(folder / progress.LOCK)
        except UserError:
            return False
        self._next(point, lock)
        return True

    def _next(self, point: Point, lock) -> None:
        """Starts the point's next verb; or it is finished, and lets its lock go."""
        verb = progress.next_verb(point, self.points)
        if not verb:
            lock.close()
            self.finished.add(point.name)
            return self._tell(point.name, "finished")
        self._tell(point.name, verb)
        process = start(command(point, verb, self.points, self.results), point.folder / progress.LOG, lock)
        self.running.append(Running(point, verb, process, lock))

    def _ended(self, one: Running) -> None:
        point, folder, status = one.point, one.point.folder, one.process.returncode
        why = why_ended(status, _tail(folder / progress.LOG))
        status = as_shell(status)
        if status == 0 and progress.DONE[one.verb](point, self.points):
            progress.note(folder, one.verb, 0, "")
            if not self.stopping:
                return self._next(point, one.lock)
        elif status in RESTARTED and not self.stopping and self.restarts[point.name] < RESTARTS:
            self.restarts[point.name] += 1
            self._tell(point.name, f"{one.verb} ended with status {status}: started again")
            return self._next(point, one.lock)
        elif self.stopping and status in RESTARTED:
            progress.note(folder, one.verb, PREEMPTED, why)
        else:
            progress.note(folder, one.verb, status or 1, why)
            self.failed.add(point.name)
            self._tell(point.name, f"{one.verb} failed with status {status}: {why}")
        one.lock.close()

    def _stop(self, *_) -> None:
        """Has all that runs save and end."""
        self.stopping = True
        for one in self.running:
            one.process.terminate()

    def _tell(self, name: str, what: str) -> None:
        if (name, what) not in self.told:
            self.told.add((name, what))
            self.bar.write(f"{time.strftime('%H:%M:%S')}  {name}: {what}")

    def _show(self) -> None:
        """The one bar: FLOPs of all points that are done."""
        if time.monotonic() - self.paced < PACED_S:
            return
        self.paced = time.monotonic()
        states = {one.point.name: self.state(one.point) for one in self.running}
        done = sum(self.points[name].flops for name in self.finished)
        done += sum(self.points[name].flops * s.step / s.steps for name, s in states.items() if s.steps)
        self.bar.n = max(self.bar.n, min(done, self.bar.total))
        self.bar.set_postfix_str(f"{len(self.finished)}/{len(self.points)} points; " + ", ".join(
            f"{one.point.name} {one.verb}" + (f" {states[one.point.name].step}/{states[one.point.name].steps}"
                                              if one.verb == "train" else "") for one in self.running))


def start(words: list[str], log: Path, lock) -> subprocess.Popen:
    """In a session of its own: Ctrl-C reaches the runner alone, which has it save."""
    kept = (lock.fileno(),) if hasattr(lock, "fileno") else ()  # else it is a lease, which is the runner's
    with log.open("a") as file:
        file.write(f"\n$ {' '.join(words)}\n")
        file.flush()
        return subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                                pass_fds=kept)


def _tail(log: Path) -> bytes:
    return log.read_bytes()[-TAIL:] if log.is_file() else b""


def as_shell(returncode: int) -> int:
    """The exit status as a shell has it: 128 + the signal that ended the process."""
    return 128 - returncode if returncode < 0 else returncode


def why_ended(returncode: int, said: bytes) -> str:
    """The error that a verb ended in, the signal that ended it, or what it said last."""
    lines = said.decode(errors="replace").replace("\r", "\n").split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    if returncode < 0 and not errors:
        return f"ended by {signal.Signals(-returncode).name}" + (
            ": memory ran out, or somebody did it" if returncode == -signal.SIGKILL else "")
    return (errors or lines or [""])[-1]
