"""Where the wall time went: parts that add up, over attempts that ended in any way."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tfusion.training import goodput
from tfusion.training.goodput import PARTS, Goodput

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clock(monkeypatch):
    """Its `now` is the second that it is, by either clock."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(goodput, "time", SimpleNamespace(
        time=lambda: 1.7e9 + clock.now, perf_counter=lambda: clock.now))
    return clock


def parts(**seconds):
    return {part: pytest.approx(seconds.get(part, 0.0), abs=0.011) for part in PARTS}


def attempt(workdir, clock, saved, init, *spent):
    """Seconds of parts, one after the other; what was known at the last save."""
    run, known = Goodput(workdir, 1.7e9 + clock.now - init), None
    run.resume(saved, writing=True)
    for part, seconds in spent:
        with run.part(part):
            clock.now += seconds
            if part == "save":
                known = run.seconds()
    seconds = run.seconds()
    run._closed.set()
    run._thread.join()
    run._write()  # as the last beat before a kill, or as `close`
    clock.now += 1000.0  # until the next one starts
    return seconds, known


def test_every_second_belongs_to_one_part(tmp_path, clock):
    run = Goodput(tmp_path, 1.7e9 + clock.now - 5)
    run.resume({}, writing=False)
    clock.now += 2
    with run.part("compile"):
        clock.now += 10
    run.enter("step")
    for _ in range(4):
        with run.part("data"):
            clock.now += 1
        clock.now += 7
    with pytest.raises(ZeroDivisionError), run.part("eval"):
        clock.now += 3
        raise ZeroDivisionError
    clock.now += 1
    assert run.seconds() == parts(init=7, compile=10, data=4, step=29, eval=3)
    assert run.values()["goodput/share"] == pytest.approx(29 / 53) and run.values()["goodput/step_s"] == 29
    run.close()
    assert list(tmp_path.iterdir()) == []  # it does not write


def test_what_a_killed_attempt_did_after_its_checkpoint_is_lost(tmp_path, clock):
    first = [("compile", 20), ("step", 100), ("save", 4), ("step", 50), ("data", 5)]
    _, known = attempt(tmp_path, clock, {}, 10, *first)
    assert known == parts(init=10, compile=20, step=100, save=4)
    seconds, _ = attempt(tmp_path, clock, known, 8, ("compile", 3), ("step", 30))
    assert seconds == parts(init=18, compile=23, step=130, save=4, lost=55)
    seconds, _ = attempt(tmp_path, clock, known, 1)  # the same checkpoint again: the second one is lost as well
    assert seconds == parts(init=11, compile=20, step=100, save=4, lost=55 + 41)
    made = json.loads((tmp_path / "goodput.json").read_text())
    assert len(made["attempts"]) == 3 and made["seconds"] == seconds
    assert sum(seconds.values()) == pytest.approx(189 + 41 + 1)


def test_an_attempt_without_a_checkpoint_is_lost(tmp_path, clock):
    attempt(tmp_path, clock, {}, 10, ("compile", 20), ("step", 5))
    assert attempt(tmp_path, clock, {}, 10, ("step", 5))[0] == parts(init=10, step=5, lost=35)


def test_saving_is_never_lost(tmp_path, clock):
    """A preempted run waits for its last save after the figures that are saved in it."""
    run = Goodput(tmp_path)
    run.resume({}, writing=True)
    with run.part("step"):
        clock.now += 50
    with run.part("save"):
        known = run.seconds()
        clock.now += 9
    run.close()
    assert attempt(tmp_path, clock, known, 0)[0] == parts(step=50, save=9)


@pytest.mark.parametrize("left", ["", "{", "[]", "null", '{"attempts": 3}',
                                  '{"attempts": [{"seconds": {"step": null}}]}'])
def test_a_broken_file_stops_no_run(tmp_path, clock, left):
    (tmp_path / "goodput.json").write_text(left)
    saved = {"step": 40.0, "lost": 2.0}
    assert attempt(tmp_path, clock, saved, 3, ("step", 10))[0] == parts(init=3, step=50, lost=2)


def test_a_full_disk_stops_no_run(tmp_path, clock, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(goodput, "replace_text", full)
    attempt(tmp_path, clock, {}, 0, ("step", 1))


def test_it_is_written_while_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(goodput, "BEAT_S", 0.02)
    run = Goodput(tmp_path)
    run.resume({}, writing=True)
    first = (tmp_path / "goodput.json").read_text()
    run._thread.join(0.5)
    assert (tmp_path / "goodput.json").read_text() != first
    run.close()


def test_a_process_knows_when_it_began():
    script = ("import time; now = time.time(); time.sleep(1)\n"
              "from tfusion.training.goodput import process_began; print(process_began() - now)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert -30 < float(done.stdout) < 0.1
