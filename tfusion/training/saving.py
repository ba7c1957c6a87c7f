"""Saving in the loop: when, by the clock, and with all that it takes to go on from there."""

import contextlib
import time

import jax

from tfusion import checksum, config, distributed
from tfusion.checkpoint import Checkpoints
from tfusion.errors import Interrupted, Stopped, UserError
from tfusion.training import state as states


class Timer:
    """Whether the last save is as many minutes ago; 0 = never. All processes get the first one's answer."""

    def __init__(self, minutes: float):
        self._seconds, self._since = 60 * minutes, time.perf_counter()

    def restart(self) -> None:
        self._since = time.perf_counter()

    def due(self) -> bool:
        late = 0 < self._seconds <= time.perf_counter() - self._since
        return distributed.broadcast(late) if self._seconds else False


class Saver:
    """Saves a state with all that it takes to go on from there."""

    def __init__(self, cfg: config.RunConfig, checkpoints: Checkpoints, rows, frozen, log):
        self.checkpoints, self.log = checkpoints, log
        self.timer = Timer(cfg.train.checkpoint_minutes)
        self.frozen, self.same = frozen, {"identity": rows.identity, "config": cfg.to_dict()}

    def save(self, state, done: int, next_row: int, unwritten: dict | None, measured: dict) -> None:
        """unwritten: the step's line where its evaluation was abandoned; the next attempt has to write it.
        measured: figures of this state."""
        with self.log.pause("time/save_s", "save"):
            self.log.writer.flush()  # lines of steps that no attempt will do again
            self.checkpoints.save(done, states.items(state), {
                **self.same, "next_row": next_row, "totals": dict(self.log.speed.total), "unwritten": unwritten,
                "goodput": self.log.goodput.seconds()}, frozen=self.frozen, measured=measured)
        self.timer.restart()

    def stopped(self, done: int, by_user: bool) -> Stopped:
        """Waits until the last save is whole, or has failed."""
        with contextlib.suppress(UserError), self.log.goodput.part("save"):
            self.checkpoints.wait()
        saved = max(self.checkpoints.steps(), default=0)
        state = "it is saved" if saved == done else (
            f"it could not be saved, the last checkpoint is of step {saved}" if saved else
            "it could not be saved, there is no checkpoint")
        how, kind = ("stopped", Interrupted) if by_user else ("preempted", Stopped)
        return kind(f"{how} at step {done}: {state}; the same command goes on from there")

    def compile(self, state) -> None:
        """All that a save will run on the devices."""
        for name, tree in {**states.items(state), "frozen": self.frozen}.items():
            checksum.leaves(name, tree)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """The last save is whole, or has failed. An error is perhaps this process's alone."""
        together = jax.process_count() == 1 or error is None or isinstance(error, Stopped)
        with self.log.goodput.part("save"):
            self.checkpoints.close() if together else self.checkpoints.abandon()
