"""What `evaluate` does with runs that lack something: what it can, and a line for what it cannot."""

import dataclasses
import json

import pytest

from tests.conftest import tiny_config
from tfusion.errors import UserError
from tfusion.evals import measure as evaluate
from tfusion.inference.trained import Trained


@pytest.fixture
def parts(monkeypatch):
    """What was measured: each part stands in for itself and leaves its name."""
    done = []

    def part(name, result):
        return lambda *args: done.append(name) or result

    monkeypatch.setattr(evaluate, "both_ways", part("scenes", ({"drawn": 1}, {"two": 2})))
    monkeypatch.setattr(evaluate.losses, "report", part("losses", ({"loss": 3}, {"ngrams": {}})))
    monkeypatch.setattr(evaluate, "write_mask", part("mask", None))
    monkeypatch.setattr(evaluate, "write_documents", part("documents", None))
    monkeypatch.setattr(evaluate.trained, "check_data", part("check", None))
    return done


def with_data(cfg, **changes):
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **changes))


CASES = {  # has a codec, changes of cfg.data: what is measured, what is said of the rest
    "all": (True, {}, ["check", "scenes", "losses", "mask", "documents"], []),
    "text": (False, {"mixture": {"glosses": 1.0}}, ["check", "losses", "mask"],
             ["left out: drawing and describing (the run has no codec", "left out: whole documents"]),
    "photos": (True, {"mixture": {"photos": 1.0}}, ["check", "losses", "mask", "documents"],
               ["left out: drawing and describing (data.mixture has no 'scenes'"]),
    "no share": (True, {"mixture": {"photos": 1.0, "scenes": 0.0}}, ["check", "losses", "mask", "documents"],
                 ["left out: drawing and describing"]),
    "data gone": (True, {"prepared": "/nowhere/data"}, ["scenes", "documents"],
                  ["left out: held-out losses (/nowhere/data is gone: --config.data.prepared=DIR"]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_is_there_is_measured(parts, case, prepared_root, tmp_path, capsys):
    codec, changes, measured, said = case
    cfg = with_data(tiny_config(prepared_root), **changes)
    run = Trained(cfg, None, "codec" if codec else None, None, 1, {})
    result = evaluate.measure(run, cfg, tmp_path, 16, 0, needs_data=False)
    assert parts == measured
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(said) and all(line.startswith(start) for line, start in zip(lines, said))
    assert ("classes" in result) == ("scenes" in measured) and ("ngrams" in result) == ("losses" in measured)
    figures = {"scenes": "drawn", "losses": "loss"}
    assert set(result["metrics"]) == {figures[name] for name in measured if name in figures}
    json.dumps(result)


def test_a_folder_that_is_asked_for_must_be_there(prepared_root, tmp_path, monkeypatch):
    """Data that are gone are left out; a folder named by flag is not passed over."""
    monkeypatch.setattr(evaluate, "both_ways", lambda *args: ({}, {}))
    cfg = with_data(tiny_config(prepared_root), prepared="/nowhere/data")
    with pytest.raises(UserError, match=r"/nowhere/data/meta\.json not found"):
        evaluate.measure(Trained(cfg, None, "codec", None, 1, {}), cfg, tmp_path, 16, 0, needs_data=True)
