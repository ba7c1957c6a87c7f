"""A run's folder: what stands in it, and that one process at a time writes there.

    config.json            the resolved config; config_changes.jsonl   what resumes changed in it
    tokenizer.json, tokenizer.model, codec.npz       copied from the data, so that the run stands alone
    checkpoints/<step>/    metrics.jsonl    tensorboard/    summary.json    timing.json
                           (in a bucket metrics.<first step>.jsonl, in parts: nothing is appended to there)
    frozen/                trees that training reads and never changes, where it has any
    evaluation/            metrics.json, written last; <evaluator>/card.json, card.npz; steps/<step>/ (--follow)
"""

import contextlib
import fcntl
import json
import os
import platform
import secrets
import sys
import threading
import time
from pathlib import Path

from tfusion import paths
from tfusion.errors import HUNG, UserError
from tfusion.paths import replace_bytes, replace_text

CODEC = "codec.npz"  # pictures <-> latents (models/codecs)
LOCK, CHANGES = ".lock", "config_changes.jsonl"
BEAT_S, TAKEN_OVER_S, SETTLE_S = 30.0, 120.0, 2.0  # of a lease; the last: until a write is seen everywhere
LOOKED_S = 0.2  # `is_held` has a lock for less
OLD_S = 1200.0  # from then on no clock is so wrong


def hold(lock):
    """Locks a file (a path of pathlib or epath) until what is returned is closed, or this process ends, however
    it does. Where the file system has no locks, and in a bucket, by a `Lease`.

    Raises UserError where another process holds it.
    """
    if paths.in_bucket(lock):
        return Lease(lock)
    file = open(lock, "a+")  # noqa: SIM115 (it is the lock: who holds it closes it)
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _signed(file)
        time.sleep(LOOKED_S)  # was it only looked at?
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise _held(lock, lock.read_text().strip()) from None
    except OSError:
        file.close()
        return Lease(lock)
    return _signed(file)


def _signed(file):
    file.truncate(0)
    file.write(f"{_me()}\n")
    file.flush()
    return file


def is_held(lock) -> bool:
    """Whether some process has it, as far as can be seen without taking it: of a lease, whether it is fresh."""
    if not lock.exists():
        return False
    if not paths.in_bucket(lock):
        with open(lock) as file, contextlib.suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return _lease_is_fresh(lock)
            except BlockingIOError:
                return True
    return _lease_is_fresh(lock)


def _lease_is_fresh(lock) -> bool:
    return time.time() - _read_lease(lock).get("time", 0.0) < TAKEN_OVER_S


def _read_lease(lock) -> dict:
    """What stands in it; {} where it is absent, empty, no lease or being written."""
    try:
        found = json.loads(lock.read_text())
        return found if {"who", "token", "time"} <= found.keys() else {}
    except Exception:  # a bucket's client has many kinds
        return {}


def _me() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def _held(lock, who: str) -> UserError:
    return UserError(f"{lock.parent} is being written by another process ({who}): wait for it or stop it, or "
                     "name another folder")


class Lease(contextlib.AbstractContextManager):
    """A file that its holder writes anew every 30 s: who finds it unchanged for two minutes takes it over.

    A process that was just killed leaves a fresh one: its successor waits until it is old, and is refused only
    where it changes meanwhile. A holder that finds another's name in it was taken for dead: it ends.
    """

    def __init__(self, lock):
        self._lock, self._token, self._closed = lock, secrets.token_hex(8), threading.Event()
        self._wait_for_holder()
        self._write()
        time.sleep(SETTLE_S)
        now = _read_lease(self._lock)
        if now.get("token") != self._token:  # of two who start at once the later has it
            raise _held(lock, now.get("who", "unknown"))
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        self._lock.write_text(json.dumps({"who": _me(), "token": self._token, "time": time.time()}))

    def _wait_for_holder(self) -> None:
        found = _read_lease(self._lock)
        age = max(time.time() - found.get("time", 0.0), 0.0)
        if age >= OLD_S:
            return
        wait = max(TAKEN_OVER_S - age, 2 * BEAT_S)  # its host's clock may be another than this one's
        print(f"{self._lock} was written {age:.0f} s ago by {found['who']}: waiting up to {wait:.0f} s to see "
              "whether it lives", file=sys.stderr)
        until = time.monotonic() + wait
        while time.monotonic() < until:
            time.sleep(BEAT_S / 10)
            if not self._lock.exists():
                return
            if (now := _read_lease(self._lock)) and now != found:
                raise _held(self._lock, now["who"])

    def _beat(self) -> None:
        renewed = time.monotonic()
        while not self._closed.wait(BEAT_S):
            now = _read_lease(self._lock)  # {}: a file system that is away for a moment
            if now and now["token"] != self._token:
                print(f"error: {self._lock} was taken over by {now['who']}, which took this process for dead: "
                      "two must not write here", file=sys.stderr, flush=True)
                os._exit(UserError.status)
            elif now:
                with contextlib.suppress(Exception):
                    self._write()
                    renewed = time.monotonic()
            if time.monotonic() - renewed > TAKEN_OVER_S:
                print(f"error: {self._lock} could not be written for {TAKEN_OVER_S:.0f} s: another may have "
                      "taken it over, and two must not write here", file=sys.stderr, flush=True)
                os._exit(HUNG)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        if _read_lease(self._lock).get("token") == self._token:
            self._lock.unlink()

    def __exit__(self, *_) -> None:
        self.close()


def copy_in(files: list[Path], workdir: Path) -> None:
    """Copies files into a run's folder, each in one move."""
    for path in files:
        replace_bytes(workdir / path.name, path.read_bytes())


def note_changes(workdir: Path, step: int, changed: dict) -> None:
    """Adds a line to config_changes.jsonl. changed: {key: [old, new]}."""
    path = workdir / CHANGES
    old = path.read_bytes().decode(errors="replace") if path.exists() else ""
    line = {"time": round(time.time()), "step": step, "changed": changed}
    replace_text(path, old + json.dumps(line) + "\n")
