"""Plans of many runs: who is planned, how many at a time, and what becomes of one that fails."""

import json
import sys
import time

import pytest

from tests.planning.plans import small_config
from tfusion.accelerators import parse_accelerator
from tfusion.errors import UserError
from tfusion.planning import cache, plan, search, several, topology
from tfusion.planning.several import Wanted

SLICE = parse_accelerator("h100-8")
SCRIPT = """
import json, pathlib, sys, time
folder, name, plan = pathlib.Path(sys.argv[1]), *sys.argv[2:]
(folder / f"{name}.began").touch()
at_once = len(list(folder.glob("*.began"))) - len(list(folder.glob("*.ended")))
with open(folder / "at_once", "a") as file: file.write(f"{at_once}\\n")
time.sleep(0.3)
CODE
(folder / f"{name}.ended").touch()
print("warnings of a library")
print(plan)
"""


@pytest.fixture
def planner(monkeypatch, tmp_path):
    """planner(code): planning is a script that runs the code, notes how many run at once, and prints a plan
    that it does not keep. Returns the names that were planned so far."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(several, "POLL_S", 0.02)
    made = json.dumps(plan.make_plan(small_config(), SLICE, "toy"))
    (tmp_path / "ran").mkdir()

    def begin(code: str = ""):
        script, folder = SCRIPT.replace("CODE", code), str(tmp_path / "ran")
        monkeypatch.setattr(several, "command",
                            lambda one: [sys.executable, "-S", "-c", script, folder, one.flags[0], made])
        return lambda: sorted(path.stem for path in (tmp_path / "ran").glob("*.began"))

    return begin


def wanted(name: str, accelerator=SLICE, **changes) -> Wanted:
    cfg = search.change(small_config(), **changes)
    return Wanted(cfg, accelerator, f"{name}.py", [name])


def test_what_has_one_plan_is_planned_once_and_each_has_its_own_length(planner):
    planned = planner()
    asked = {"a": wanted("a", train={"num_steps": 100}),
             "b": wanted("b", train={"num_steps": 300}, optimizer={"learning_rate": 1e-3}),
             "c": wanted("c", train={"batch_size": 16})}
    plans = several.make(asked)
    assert planned() == ["a", "c"] and list(plans) == ["a", "b", "c"]
    assert [plans[name]["run"]["steps"] for name in "ab"] == [100, 300]
    assert plans["b"]["experiment"] == "b.py"


def test_what_the_cache_has_is_not_planned(planner):
    planned = planner()
    one = wanted("a")
    cache.keep(cache.key(one.cfg, SLICE), plan.make_plan(one.cfg, SLICE, "before"))
    plans = several.make({"a": one, "b": wanted("b", train={"batch_size": 16})})
    assert planned() == ["b"] and plans["a"]["fits"] and plans["a"]["experiment"] == "a.py"


@pytest.mark.parametrize("at_a_time", [1, 2])
def test_so_many_at_a_time(planner, monkeypatch, tmp_path, at_a_time):
    planner()
    monkeypatch.setattr(several, "at_a_time", lambda: at_a_time)
    several.make({name: wanted(name, train={"batch_size": 8 * n}) for n, name in enumerate("abcd", 1)})
    counts = list(map(int, (tmp_path / "ran" / "at_once").read_text().split()))
    assert max(counts) == at_a_time and len(counts) == 4


@pytest.mark.parametrize(("code", "status", "why"), [
    ("sys.exit('noise\\nerror: mesh does not fit\\nmore noise')", 1, "mesh does not fit"),
    ("print('For simplicity, ...', file=sys.stderr); 1 // 0", 1, "ZeroDivisionError: .*"),
    ("sys.exit('Killed')", 1, "Killed"), ("import os; os.abort()", -6, "")],
    ids=["error", "traceback", "words", "crash"])
def test_one_that_fails_is_named_and_ends_the_others(planner, monkeypatch, tmp_path, code, status, why):
    planned = planner(f"if name == 'b': {code}\ntime.sleep(60)")
    monkeypatch.setattr(several, "at_a_time", lambda: 2)
    began = time.monotonic()
    with pytest.raises(UserError, match=f"^'b': planning ended with status {status}: {why}$"):
        several.make({name: wanted(name, train={"batch_size": 8 * n}) for n, name in enumerate("abc", 1)})
    assert time.monotonic() - began < 30 and planned() == ["a", "b"]
    assert not list((tmp_path / "ran").glob("*.ended"))


def test_there_is_an_eta_from_the_first_second_on(planner, monkeypatch, capsys):
    planner()
    monkeypatch.setattr(several, "at_a_time", lambda: 2)
    monkeypatch.setattr(several, "USUAL_S", 600.0)
    several.make({name: wanted(name, train={"batch_size": 8 * n}) for n, name in enumerate("abcd", 1)})
    shown = capsys.readouterr().err.split("\r")
    assert next(line for line in shown if "left" in line).rstrip().endswith(
        ("0 of 4, about 20:00 left; a, b", "0 of 4, about 19:59 left; a, b"))
    assert "4 of 4, about 00:00 left" in shown[-1] and "100%" in shown[-1]


def test_the_command_is_what_a_user_types():
    one = Wanted(small_config(), parse_accelerator("2xV5P-8"), "x.py:words", ["--config.seed=1"])
    assert several.command(one) == [sys.executable, "-m", "tfusion.plan", "--config=x.py:words",
                                    "--config.seed=1", "--topology=2xv5p-8", "--json"]


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("v5p-16", {"mesh": {"fsdp": 3}}, "fsdp=3 .* does not fit 8 devices"),
    ("v5p-256", {}, r"batch_size = 8 rows do not divide over 128"),
    ("2xv5p-8", {}, r"mesh\.data = 1 does not divide over 2 slices"),
    ("v5p-8", {}, r"compiling for a TPU needs libtpu: pip install '\.\[tpu\]'")])
def test_what_is_seen_without_a_compiler(monkeypatch, name, changes, message):
    monkeypatch.setattr(topology, "have_libtpu", lambda: False)
    with pytest.raises(UserError, match=message) as e:
        several.check(search.change(small_config(), **changes), parse_accelerator(name))
    assert "\n" not in str(e.value)
