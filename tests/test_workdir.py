"""One process at a time writes in a run's folder: by a lock, or by a lease where there are none."""

import fcntl
import json
import os
import threading
import time

import pytest

from tfusion import workdir
from tfusion.errors import UserError

BEAT, TAKEN_OVER = 0.1, 1.0


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, value in (("BEAT_S", BEAT), ("TAKEN_OVER_S", TAKEN_OVER), ("SETTLE_S", 0.02), ("OLD_S", 50.0)):
        monkeypatch.setattr(workdir, name, value)


@pytest.fixture(params=["a file system without locks", "a bucket"])
def lock(request, tmp_path, monkeypatch):
    """The path of a lock that only a lease can hold."""
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    if request.param != "a bucket":
        return tmp_path / workdir.LOCK
    return request.getfixturevalue("bucket") / workdir.LOCK


def kill(lease) -> None:
    """As kill -9: it beats no more, and its file stays."""
    lease._closed.set()
    lease._thread.join()


def test_a_locked_folder_is_refused_until_its_holder_is_gone(tmp_path):
    lock = tmp_path / workdir.LOCK
    held = workdir.hold(lock)
    with pytest.raises(UserError, match=rf"is being written by another process \(process {os.getpid()} on "):
        workdir.hold(lock)
    held.close()
    workdir.hold(lock).close()


def test_a_holder_that_lives_is_seen_to(lock):
    with workdir.hold(lock):
        began = time.monotonic()
        with pytest.raises(UserError, match=rf"being written by another process \(process {os.getpid()} on"):
            workdir.hold(lock)
        assert time.monotonic() - began < TAKEN_OVER
    assert not lock.exists()
    began = time.monotonic()
    workdir.hold(lock).close()  # given back: nobody waits
    assert time.monotonic() - began < TAKEN_OVER / 2


def test_what_a_killed_holder_left_is_taken_over_when_it_is_old(lock, capsys):
    kill(workdir.hold(lock))
    left, began = json.loads(lock.read_text()), time.time()
    with workdir.hold(lock):
        assert time.time() - left["time"] > TAKEN_OVER and time.time() - began < 3 * TAKEN_OVER
        assert json.loads(lock.read_text())["token"] != left["token"]
    assert "was written 0 s ago by process" in capsys.readouterr().err
    lock.write_text(json.dumps(left | {"time": left["time"] - 100}))  # long ago
    workdir.hold(lock).close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("left", ["", "{", "process 7 on a host\n", "[]", '{"token": "x"}'])
def test_what_is_no_lease_holds_nothing(lock, left):
    lock.write_text(left)
    workdir.hold(lock).close()


def test_of_two_who_start_at_once_one_is_refused(lock, monkeypatch):
    """Both have seen that nobody holds it."""
    monkeypatch.setattr(workdir, "SETTLE_S", 0.5)
    both = threading.Barrier(2)
    monkeypatch.setattr(workdir.Lease, "_wait_for_holder", lambda self: both.wait())
    got, refused = [], []

    def start():
        try:
            got.append(workdir.hold(lock))
        except UserError as e:
            refused.append(e)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == len(refused) == 1
    got[0].close()


def test_a_holder_that_was_taken_for_dead_ends(lock, monkeypatch, capfd):
    """Suspended for minutes, say, while another went on: two must not write."""
    ended = threading.Event()

    def end(status):
        assert status == 1
        ended.set()
        lease._closed.set()

    monkeypatch.setattr(workdir.os, "_exit", end)
    lease = workdir.hold(lock)
    now = json.loads(lock.read_text())
    time.sleep(3 * BEAT)
    assert json.loads(lock.read_text())["time"] > now["time"]  # it beats
    lock.write_text(json.dumps({**now, "token": "another", "who": "process 7 on b"}))
    assert ended.wait(10)
    assert "was taken over by process 7 on b" in capfd.readouterr().err
    lease.close()
    assert json.loads(lock.read_text())["token"] == "another"  # it is the other's


def test_a_clock_that_is_ahead_takes_nothing_over(lock, monkeypatch):
    """To it the holder's last beat seems to be old."""
    with workdir.hold(lock):
        real = time.time
        monkeypatch.setattr(workdir.time, "time", lambda: real() + 10 * TAKEN_OVER)
        with pytest.raises(UserError, match="being written by another process"):
            workdir.hold(lock)


def test_a_holder_that_cannot_renew_ends_before_another_takes_over(lock, monkeypatch, capfd):
    lease, ended = workdir.hold(lock), []

    def away(self, *_):
        raise RuntimeError("503")  # of a bucket's client: no OSError

    monkeypatch.setattr(workdir.os, "_exit", lambda status: ended.append(status) or lease._closed.set())
    with monkeypatch.context() as patch:
        patch.setattr(type(lock), "write_text", away)
        began = time.monotonic()
        lease._thread.join(20)
    assert ended == [134] and time.monotonic() - began > 0.8 * TAKEN_OVER
    assert "could not be written for 1 s: another may have taken it over" in capfd.readouterr().err


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("503")], ids=str)
def test_a_file_system_that_is_away_for_a_moment_ends_nothing(lock, monkeypatch, error):
    lease, real = workdir.hold(lock), type(lock).read_text

    def away(self, *_):
        raise error

    monkeypatch.setattr(type(lock), "read_text", away)
    time.sleep(3 * BEAT)
    monkeypatch.setattr(type(lock), "read_text", real)
    before = json.loads(lock.read_text())["time"]
    time.sleep(5 * BEAT)
    assert lease._thread.is_alive() and json.loads(lock.read_text())["time"] > before
    lease.close()
