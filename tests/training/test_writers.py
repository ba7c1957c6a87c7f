"""metrics.jsonl and the writers beside it: what a line holds, and what is left of a broken one."""

import json
import math
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from tfusion.errors import UserError
from tfusion.scaling import progress
from tfusion.training import loop, writers


def lines(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_line_is_one_flat_object(tmp_path):
    writer, before = writers.JsonLines(tmp_path, 0), time.time()
    writer.write(1, {"train/lm_loss": 1.23456789, "train/empty": None, "total/tokens": 12345678901,
                     "total/flops": 1.23456789e21, "grad_norm/lm_loss": math.inf, "eval/x": np.float64(0.5)})
    (row,) = lines(tmp_path)  # there at once
    assert before - 1 <= row.pop("time") <= time.time() + 1  # Unix seconds, to the millisecond
    assert row == {"step": 1, "train/lm_loss": 1.234568, "train/empty": None, "total/tokens": 12345678901,
                   "total/flops": 1.234568e21, "grad_norm/lm_loss": None, "eval/x": 0.5}
    writer.close()


def test_tensorboard_gets_what_a_curve_can_show(tmp_path, cfg):
    writer = writers.open_writers(tmp_path, 0, cfg)
    writer.write(1, {"train/lm_loss": 1.5, "train/empty": None, "train/endless": math.inf, "total/tokens": 3})
    writer.close()
    assert [row["step"] for row in lines(tmp_path)] == [1]
    (events,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    content = events.read_bytes()
    assert b"train/lm_loss" in content and b"total/tokens" in content
    assert b"train/empty" not in content and b"train/endless" not in content


@pytest.mark.parametrize("broken", [
    b'{"step": 8, "x"', b"", b"\n\n", b'"step"\n', b"7\n", b"[1]\n", b"null\n", b'{"x": 1.0}\n',
    b'{"step": null}\n', b'{"step": "two"}\n', b'{"step": Infinity}\n', b"\x00" * 4096,
    b'{"step": 2, "x": "\xff\xfe'], ids=lambda b: repr(b[:12]))
def test_a_resumed_run_drops_later_lines_and_broken_ones(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    writer = writers.JsonLines(path.parent, 0)
    for step in (2, 4, 6):
        writer.write(step, {"x": float(step)})
    writer.close()
    whole = path.read_bytes()
    cut = whole.index(b'{"step": 4')
    path.write_bytes(whole[:cut] + broken + (b"\n" if broken and not broken.endswith(b"\n") else b"")
                     + whole[cut:] + broken)
    writer = writers.JsonLines(path.parent, 4)
    assert [(row["step"], row["x"]) for row in lines(tmp_path)] == [(2, 2.0), (4, 4.0)]
    writer.write(6, {"x": 60.0})
    writer.close()
    assert [(row["step"], row["x"]) for row in lines(tmp_path)] == [(2, 2.0), (4, 4.0), (6, 60.0)]


class FakeWandb:
    """What the code calls of the package, recorded."""

    class Error(Exception):
        pass

    def __init__(self):
        self.runs, self.refusal = [], None
        self.Settings = lambda **settings: settings

    def init(self, **arguments):
        if self.refusal:
            raise self.refusal
        run = SimpleNamespace(arguments=arguments, logged=[], exit_codes=[])
        run.log = lambda values, step: run.logged.append((step, values))
        run.finish = lambda exit_code: run.exit_codes.append(exit_code)
        self.runs.append(run)
        return run


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_weights_and_biases_beside_the_files(tmp_path, cfg, wandb):
    writer = writers.open_writers(tmp_path, 0, cfg, "my-project")
    writer.write(1, {"train/lm_loss": 1.5, "train/empty": None})
    writer.close()
    (run,) = wandb.runs
    assert run.logged == [(1, {"train/lm_loss": 1.5})] and run.exit_codes == [0]
    assert [row["train/lm_loss"] for row in lines(tmp_path)] == [1.5]
    assert run.arguments["project"] == "my-project" and run.arguments["dir"] == str(tmp_path)
    assert run.arguments["config"] == cfg.to_dict() and run.arguments["resume"] == "allow"


@pytest.mark.parametrize("left", [None, b"", b"\xff\xfe", b"../x"])
def test_a_resumed_run_keeps_its_name(tmp_path, cfg, wandb, left):
    """And a broken file of the name stops nothing."""
    if left is not None:
        (tmp_path / "wandb_run_id").write_bytes(left)
    for first in (0, 4):
        writers.open_writers(tmp_path, first, cfg, "my-project").close()
    first, second = (run.arguments["id"] for run in wandb.runs)
    assert first == second and first.isalnum()


def test_a_failed_run_is_closed_as_failed(tmp_path, cfg, wandb):
    writer = writers.open_writers(tmp_path, 0, cfg, "my-project")
    with pytest.raises(ZeroDivisionError):
        try:
            raise ZeroDivisionError
        finally:
            writer.close()
    assert wandb.runs[0].exit_codes == [1]


def test_one_writer_that_fails_to_close_does_not_keep_the_others_open(tmp_path, cfg, wandb, capsys):
    writer = writers.open_writers(tmp_path, 0, cfg, "my-project")
    wandb.runs[0].finish = lambda exit_code: 1 / 0
    writer.write(1, {"x": 1.0})
    writer.close()
    assert "warning: WeightsAndBiases cannot be written (ZeroDivisionError: " in capsys.readouterr().err
    with pytest.raises(ValueError, match="closed file"):
        writer._writers[0].write(2, {"x": 1.0})


class FullDisk:
    """A file on a disk that takes so many bytes more."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = self.file.write(data[: self.room])
        self.room -= taken
        return taken


def test_a_full_disk_costs_no_line_and_stops_nothing(tmp_path, cfg, capsys, monkeypatch):
    """It is said once; what could not be written is there when there is room again."""
    writer = writers.open_writers(tmp_path, 0, cfg)
    text = writer._writers[0]
    real, text._file = text._file, FullDisk(text._file, 70)
    with monkeypatch.context() as patch:
        patch.setattr(writers.EventsWriter, "flush", lambda self: FullDisk(None, 0).write(b"x"))
        for step in range(1, 30):
            writer.write(step, {"train/x": float(step)})
    said = capsys.readouterr().err.splitlines()
    assert sorted(line.partition(" (")[0] for line in said) == [
        f"warning: {name} cannot be written" for name in ("JsonLines", "TensorBoard")]
    assert all(line.endswith("No space left on device); the run goes on") for line in said)
    text._file = real
    writer.write(30, {"train/x": 30.0})
    writer.close()
    assert [row["step"] for row in lines(tmp_path)] == list(range(1, 31)) and not capsys.readouterr().err
    events = [path.read_bytes() for path in (tmp_path / "tensorboard").iterdir()]
    assert len(events) == 2 and any(b"train/x" in event for event in events)  # half a record may end the first


@pytest.mark.parametrize("module", [None, SimpleNamespace()], ids=["missing", "a folder of that name"])
def test_a_missing_package_is_one_line_before_training(tmp_path, cfg, monkeypatch, module):
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(UserError, match=r"pip install '\.\[wandb\]'$"):
        loop.train(cfg, None, tmp_path, None, wandb="my-project")
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_of_the_service_is_one_line_and_nothing_is_dropped(tmp_path, cfg, wandb):
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    wandb.refusal = wandb.Error("api_key not configured (no-tty)")
    with pytest.raises(UserError, match=r"--wandb=p: api_key not configured .*WANDB_MODE=offline"):
        writers.open_writers(tmp_path, 0, cfg, "p")
    assert lines(tmp_path) == [{"step": 9}]


def logged_steps(folder) -> list[int]:
    return [json.loads(line)["step"] for line in (writers.logged(folder) or "").splitlines()]


def test_in_a_bucket_lines_come_in_parts_and_each_step_once(bucket, cfg):
    """Flushed as by saves after steps 4 and 6, and at the end; the next attempt goes on from step 4, where a
    part ends, and one more from step 5, in the middle of one."""
    first = writers.open_writers(bucket, 0, cfg)
    for step in range(1, 10):
        first.write(step, {"train/x": float(step)})
        if step in (4, 6):
            assert max(logged_steps(bucket), default=0) == (0 if step == 4 else 4), "nothing before its flush"
            first.flush()
            assert logged_steps(bucket) == list(range(1, step + 1))
    first.close()
    assert logged_steps(bucket) == list(range(1, 10))
    for begins in (4, 5):
        again = writers.open_writers(bucket, begins, cfg)
        assert logged_steps(bucket) == list(range(1, begins + 1)), "what comes again is gone"
        for step in (5, 6, 7)[begins - 4:]:
            again.write(step, {"train/x": float(step)})
        again.close()
        assert logged_steps(bucket) == list(range(1, 8)), "none lost, none twice"
    assert len(list((bucket / "tensorboard").iterdir())) >= 3, "a file per flush"
    assert not list(bucket.glob("metrics.jsonl"))


def test_the_last_lines_are_read_of_the_last_parts_alone(bucket, monkeypatch):
    for first in range(1, 40, 4):
        (bucket / writers.PART.format(step=first)).write_text(
            "".join(f'{{"step": {step}}}\n' for step in range(first, first + 4)))
    (bucket / writers.PART.format(step=41)).write_text('{"step": 41}\n{"half')
    read, real = [], type(bucket).read_bytes
    monkeypatch.setattr(type(bucket), "read_bytes", lambda path: read.append(path.name) or real(path))
    found = [json.loads(line)["step"] for line in writers.logged(bucket, 6).splitlines()]
    assert found == list(range(33, 42)) and len(read) == 3
    assert logged_steps(bucket) == list(range(1, 42))
    assert [line["step"] for line in progress._logged(bucket)] == []  # none has a time
    assert len(read) == 3 + 11 + 6
