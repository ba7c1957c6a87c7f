"""metrics.jsonl and the writers beside it: what a line holds, and what is left of a broken one."""

import json
import math
import time

import numpy as np
import pytest

from tfusion.training import writers


def lines(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_line_is_one_flat_object(tmp_path):
    writer, before = writers.JsonLines(tmp_path / "metrics.jsonl", 0), time.time()
    writer.write(1, {"train/lm_loss": 1.23456789, "train/empty": None, "total/tokens": 12345678901,
                     "total/flops": 1.23456789e21, "grad_norm/lm_loss": math.inf, "eval/x": np.float64(0.5)})
    (row,) = lines(tmp_path)  # there at once
    assert before - 1 <= row.pop("time") <= time.time() + 1  # Unix seconds, to the millisecond
    assert row == {"step": 1, "train/lm_loss": 1.234568, "train/empty": None, "total/tokens": 12345678901,
                   "total/flops": 1.234568e21, "grad_norm/lm_loss": None, "eval/x": 0.5}
    writer.close()


def test_tensorboard_gets_what_a_curve_can_show(tmp_path):
    writer = writers.open_writers(tmp_path, 0)
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
    writer = writers.JsonLines(path, 0)
    for step in (2, 4, 6):
        writer.write(step, {"x": float(step)})
    writer.close()
    whole = path.read_bytes()
    cut = whole.index(b'{"step": 4')
    path.write_bytes(whole[:cut] + broken + (b"\n" if broken and not broken.endswith(b"\n") else b"")
                     + whole[cut:] + broken)
    writer = writers.JsonLines(path, 4)
    assert [(row["step"], row["x"]) for row in lines(tmp_path)] == [(2, 2.0), (4, 4.0)]
    writer.write(6, {"x": 60.0})
    writer.close()
    assert [(row["step"], row["x"]) for row in lines(tmp_path)] == [(2, 2.0), (4, 4.0), (6, 60.0)]
