"""Ends a process in which nothing moves any more, so that a launcher starts it again."""

import collections
import faulthandler
import os
import sys
import threading

import jax

from tfusion.errors import HUNG

START_MINUTES = 60.0  # until steps are under way: a model may compile for long, here or on another host


class Watchdog:
    """Where for so many minutes no step ends, every thread's stack goes to stderr and the process ends with
    HUNG; before the first step, where nothing ends for START_MINUTES. minutes: 0 = never.

    A step has ended when the devices have done it, not when it is under way: the loop runs ahead of them. Time
    in which the process is suspended does not count.
    """

    def __init__(self, minutes: float):
        self._minutes, self._limit = minutes, max(minutes, START_MINUTES)
        self._under_way, self._beaten, self._closed = collections.deque(), threading.Event(), threading.Event()
        if minutes:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def start(self) -> None:
        """Steps are under way from here on."""
        self._limit = self._minutes
        self.beat()

    def watch(self, results) -> None:
        """results: a tree of arrays, of which the first is there once a step or an evaluation's batch has
        ended; it must not be donated."""
        if self._minutes:
            self._under_way.append(jax.tree.leaves(results)[0])

    def beat(self) -> None:
        """Something else has ended."""
        self._beaten.set()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        tick, quiet = min(1.0, 6 * self._minutes), 0.0
        while not self._closed.wait(tick):
            quiet = 0.0 if self._moved() else quiet + tick
            if quiet >= 60 * self._limit:
                self._end()

    def _moved(self) -> bool:
        moved = self._beaten.is_set()
        self._beaten.clear()
        while self._under_way and self._under_way[0].is_ready():
            self._under_way.popleft()
            moved = True
        return moved

    def _end(self) -> None:
        print(f"error: no step has ended for {self._limit:g} minutes (train.watchdog_minutes); every thread's "
              "stack:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        os._exit(HUNG)
