"""The verb: what it prints, and what it wants."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import import_verb
from tfusion.errors import UserError

ROOT = Path(__file__).parents[2]
verb = import_verb("sweep")


def test_freezing_shows_every_point_and_the_next_command(sweep, capsys):
    verb.freeze(str(sweep.path), sweep.out)
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["point", "data", "a", "b", "3"]
    assert said[1].split()[1:] == ["-", "-", "-", "-", "prepare"] and said[2].endswith("train, evaluate")
    assert said[-1] == (f"3 points frozen in {sweep.out}/points.jsonl; "
                        f"launch/local.sh --sweep={sweep.out} runs them")
    verb.freeze(str(sweep.path), sweep.out)
    assert "3 points are frozen already" in capsys.readouterr().out


def test_the_status_has_a_line_a_point_and_a_sum(sweep, capsys):
    sweep.freeze()
    (sweep.out / "a").mkdir()
    for name, tree in (("metrics.jsonl", {"step": 20, "time": 1.0, "train/lm_loss": 2.5}),
                       ("sweep.json", {"verb": "train", "status": 1, "why": "error: no room"}),
                       ("goodput.json", {"seconds": {"init": 1.0, "step": 3.0}, "attempts": [
                           {"seconds": {"init": 0.5}}, {"seconds": {"init": 0.5, "step": 3.0}}]})):
        (sweep.out / "a" / name).write_text(json.dumps(tree) + "\n")
    verb.show(sweep.out, None)
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert said == [["point", "is", "verb", "step", "ETA", "goodput", "restarts"],
                    ["data", "waiting", "prepare"],
                    ["a", "failed", "train", "20/60", "75%", "1", "error:", "no", "room"],
                    ["b", "waiting", "train", "0/60"], ["1", "failed,", "2", "waiting"]]


def test_jobs_are_lines_for_a_script_and_a_sum_for_its_user(sweep, capsys):
    sweep.freeze()
    (sweep.out / "data" / "made").mkdir(parents=True)
    (sweep.out / "data" / "made" / "meta.json").write_text("{}")
    verb.show_jobs(sweep.out, None)
    said = capsys.readouterr()
    assert said.out == "1\ta\t\n2\tb\t\n"
    assert said.err == f"{sweep.out}: 1 finished, 2 ready\n"


@pytest.mark.parametrize("given", [{}, {"STATUS": True, "RUN": True}, {"CONFIG": "x.py", "STATUS": True},
                                   {"JOBS": True, "POINT": "a"}])
def test_one_thing_is_asked_of_it(given, monkeypatch, tmp_path):
    for name, value in ({"OUT": str(tmp_path)} | given).items():
        monkeypatch.setattr(verb, name, SimpleNamespace(value=value))
    with pytest.raises(UserError, match=r"one of --config=experiments/FILE\.py, --status, --run, --jobs, --p"):
        verb.main()


def test_a_sweep_in_a_bucket_is_not_run_here(monkeypatch):
    for name, value in {"OUT": "gs://bucket/sweep", "RUN": True}.items():
        monkeypatch.setattr(verb, name, SimpleNamespace(value=value))
    with pytest.raises(UserError, match="--run works in a local folder, not in gs://bucket/sweep: submit jobs"):
        verb.main()


@pytest.mark.slow
def test_the_launcher_runs_a_sweep_and_passes_its_flags_on(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "points.jsonl").write_text("")
    run = subprocess.run([ROOT / "launch" / "local.sh", f"--sweep={tmp_path}/x", "--parallel=2", "--retry"],
                         env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "0 of 0 points are finished" in run.stdout, run.stderr
