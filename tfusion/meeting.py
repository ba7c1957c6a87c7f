"""Where the processes of a job meet while they save, and how one that fails lets the others go."""

import collections
import itertools
import time

import jax

from tfusion import distributed


class Left(Exception):
    """Another process has given a save up."""


class Meeting:
    """Where the threads of a save wait for those of the other processes, in place of Orbax's barriers, in which
    a process that cannot write its part leaves the others until a timeout. A save begins and ends with all at
    ENDS, and who fails goes straight to its end. No two places have one name, whatever an Orbax calls them: one
    without ENDS has plain barriers."""

    ENDS = "ThreadSaveMultiHostValueHolder:set_value_start"
    _made = itertools.count()  # of one that a failed save left nobody knows where all are

    def __init__(self):
        self._name, self._ends, self._here = next(self._made), 0, collections.Counter()

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        if key == self.ENDS:
            self._ends += 1
            self._here.clear()
        self._here[key] += 1
        here = f"{self._name}/{self._ends}/{self._here[key]}/{key}"
        end = f"{self._name}/{self._ends + 1}/1/{self.ENDS}"
        deadline, pause = time.monotonic() + timeout_ms / 1000, 0.001
        distributed.arrive(here)
        while True:
            gone = distributed.arrived(end)  # asked first: who has passed this place may be there too
            if distributed.arrived(here) == jax.process_count():
                return
            if gone:
                raise Left
            if time.monotonic() > deadline:
                raise TimeoutError("another process has not written its part")
            time.sleep(pause := min(2 * pause, 0.5))
