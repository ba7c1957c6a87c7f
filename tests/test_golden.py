"""The tiny training's losses are those of tests/testdata/golden_losses.json (tests/golden.py)."""

import json

import numpy as np
import pytest

from tests import golden

RTOL = 1e-4


pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_losses_are_the_committed_ones(tmp_path):
    want, got = json.loads(golden.LOSSES.read_text()), golden.train_here(tmp_path)
    assert len(got) == len(want) == golden.STEPS
    for name in golden.COMPARED:
        curves = [[row[name] for row in rows] for rows in (got, want)]
        np.testing.assert_allclose(*curves, rtol=RTOL, err_msg=f"{name}: if the change is meant, run "
                                   "`python -m tests.update_golden` and say why in the commit")


def test_the_first_difference_is_named():
    rows = [{name: 1.0 for name in golden.COMPARED} for _ in range(3)]
    state = {"['w']": np.zeros(2, np.float32), "['b']": np.ones(1, np.float32)}
    base = (rows, state)
    assert golden.first_difference(base, base) is None
    changed = [dict(row) for row in rows]
    changed[1]["diffusion_loss"] = 1.0000001
    assert golden.first_difference(base, (changed, state)) == (
        "step 2: diffusion_loss was 1.0, is 1.0000001")
    assert golden.first_difference(base, (rows[:2], state)) == "there were 3 steps, there are 2"
    assert "['b']" in golden.first_difference(base, (rows, {"['w']": state["['w']"]}))
    minus = {**state, "['w']": -state["['w']"]}  # equal numbers, other bits
    assert "differs in ['w']" in golden.first_difference(base, (rows, minus))
