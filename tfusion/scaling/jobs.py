"""A sweep on a cluster: which of its points are to be submitted, and what the job of one does on its hosts.

An engine (SLURM, GKE, SkyPilot) is told of a point's name and place in the file, and runs
`python -m tfusion.sweep --point=NAME --out=DIR` as each process of the job. These know of each other only what
the launcher says (distributed.py): each decides by itself what is left to do, once, before it begins, when
nobody is at the point; the verbs then find each other. Process 0 holds the point's lock and leaves what its
verbs came to; another says in its place that it failed, for then the engine stops process 0, whose verb ends as
if it had been preempted.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

from tfusion import distributed, workdir
from tfusion.errors import PREEMPTED, RESTARTED, UserError
from tfusion.scaling import progress, runner
from tfusion.scaling.points import Point
from tfusion.scaling.results import kept

READY, NEEDY = "ready", "wait for points that they need"


class Due(NamedTuple):
    submit: list[tuple[int, Point]]  # those to be submitted now, each with its line in the file from 0
    counts: dict[str, int]  # {what: how many} of all


def due(points: list[Point], retry: bool, results: Path | None = None) -> Due:
    """What is neither finished, nor under way, nor (without retry) failed, and waits for no other point."""
    named = {point.name: point for point in points}
    states = {name: progress.state(point, named, results).what for name, point in named.items()}
    submit, counts = [], {}
    for index, point in enumerate(points):
        what = states[point.name]
        if what not in (progress.FINISHED, progress.RUNNING) and (retry or what != progress.FAILED):
            ready = all(states[name] == progress.FINISHED for name in point.needs)
            submit += [(index, point)] * ready
            what = READY if ready else NEEDY
        counts[what] = counts.get(what, 0) + 1
    return Due(submit, counts)


def find(out: Path, points: list[Point], which: str) -> Point:
    """By its name, or its line in the file from 0. Raises UserError where there is none."""
    for index, point in enumerate(points):
        if which in (point.name, str(index)):
            return point
    raise UserError(f"--point={which}: {out} has no such point, but {', '.join(x.name for x in points[:8])}"
                    + " ..." * (len(points) > 8))


def run(out: Path, points: list[Point], which: str, results: Path | None = None) -> int:
    """Runs the verbs of a point that are not done, one after the other, as this process of its job. Returns the
    exit status of the first that fails, PREEMPTED where SIGTERM came between two, 0 where all is done.

    Raises UserError where its experiment says something else than was frozen, it needs another point that is
    not finished, or another process is at it.
    """
    point, named = find(out, points, which), {point.name: point for point in points}
    runner.check_frozen(point)
    for name in point.needs:
        if progress.next_verb(named[name], named) and not (
                results and kept(results, name, named[name].config_hash)):
            raise UserError(f"'{point.name}' needs '{name}', which is not finished: run that first")
    left, place = progress.verbs_left(point, named), distributed.find_place()
    if place is not None and place.process > 0:
        return _run_all(point, left, named, results, first=False)
    point.folder.mkdir(parents=True, exist_ok=True)
    lock = workdir.hold(point.folder / progress.LOCK)
    try:
        status = _run_all(point, left, named, results, first=True)
    finally:
        lock.close()
    if not status:
        print(f"{point.name} is finished")
    return status


def _run_all(point: Point, left: list[str], named: dict[str, Point], results: Path | None, first: bool) -> int:
    stop, before = Stop(), progress.outcome(point)
    for verb in left:
        if first:
            print(f"{point.name}: {verb}", flush=True)
        returncode, said = stop.run(runner.command(point, verb, named, results))
        status, why = runner.as_shell(returncode), runner.why_ended(returncode, said)
        if first and not status and not progress.DONE[verb](point, named):
            status, why = UserError.status, f"{verb} ended well and left nothing: {why}"
        if status not in (0, *RESTARTED):
            with contextlib.nullcontext() if first else contextlib.suppress(OSError):
                progress.note(point.folder, verb, status, why)
        elif first and (not status or progress.outcome(point) == before):  # else another has failed
            told = PREEMPTED if stop.came and status else status
            progress.note(point.folder, verb, told, why if status else "")
            before = progress.outcome(point)
        if status or stop.came:
            return status or PREEMPTED
    return 0


class Stop:
    """Runs one process at a time, and passes SIGTERM on to it."""

    def __init__(self):
        self.came, self._process = False, None
        signal.signal(signal.SIGTERM, self._pass_on)

    def _pass_on(self, *_) -> None:
        self.came = True
        if self._process:
            self._process.terminate()

    def run(self, words: list[str]) -> tuple[int, bytes]:
        """Returns its return code, and the end of what it wrote to stderr, which goes on to this one's."""
        said = bytearray()
        with subprocess.Popen(words, stderr=subprocess.PIPE, bufsize=0) as self._process:
            if self.came:  # before there was a process to tell
                self._process.terminate()
            reader = threading.Thread(target=_pass_through, args=(self._process.stderr, said), daemon=True)
            reader.start()
            self._process.wait()
            reader.join(1.0)  # what the verb started may outlive it, and hold the pipe
        return self._process.returncode, bytes(said)


def _pass_through(pipe, said: bytearray) -> None:
    with contextlib.suppress(OSError, ValueError):  # closed
        while some := pipe.read(2**16):
            said += some
            del said[:-runner.TAIL]
            with contextlib.suppress(OSError):
                os.write(sys.stderr.fileno(), some)
