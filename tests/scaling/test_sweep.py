"""The verb: what it prints, and what it wants."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import import_verb
from tests.scaling.conftest import SWEEP
from tests.scaling.test_verdicts import plan
from tfusion.errors import UserError
from tfusion.planning import topology
from tfusion.scaling import verdicts

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


@pytest.fixture
def planned(monkeypatch):
    """planned(plan): what planning is asked for, name by name; each gets that plan."""
    asked = {}

    def begin(made=None):
        monkeypatch.setattr(verb.several, "make", lambda wanted: (
            asked.update(wanted), {name: made or plan() for name in wanted})[1])
        monkeypatch.setattr(verb.several, "check", lambda cfg, accelerator: None)
        return asked

    return begin


def test_a_dry_run_shows_each_plan_and_writes_nothing(sweep, planned, capsys):
    asked = planned()
    verb.freeze(str(sweep.path), sweep.out, "v5p-16", dry_run=True)
    said = capsys.readouterr().out.splitlines()
    assert list(asked) == ["a", "b"]  # data is prepared, not trained
    assert (asked["a"].experiment, asked["a"].accelerator.name) == (str(sweep.path), "v5p-16")
    assert asked["a"].flags == ["--config.data.prepared={data}/made", "--config.seed=1"]
    assert asked["a"].cfg.seed == 1 and asked["b"].cfg.model.d_model == 256
    assert [line.split()[:2] for line in said[5:7]] == [["a", "v5p-16"], ["b", "v5p-16"]]
    assert "2 points: 24 hours one after another" in said[7] and "$200" in said[7]
    assert said[8:] == ["3 points; nothing is frozen"] and not sweep.out.exists()


def test_what_is_frozen_has_the_slice_and_its_plan(sweep, planned, capsys):
    planned()
    verb.freeze(str(sweep.path), sweep.out, "v5p-16")
    frozen = [json.loads(line) for line in (sweep.out / "points.jsonl").read_text().splitlines()]
    assert [point["topology"] for point in frozen] == ["v5p-16"] * 3
    assert "plan" not in frozen[0] and frozen[1]["plan"] == verdicts.verdict(plan())._asdict()
    assert "3 points frozen in" in capsys.readouterr().out


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_point_that_does_not_fit_is_shown_and_refused(sweep, planned, capsys, dry_run):
    planned(plan(fits=False))
    with pytest.raises(UserError, match=r"2 of 3 points do not fit: 'a' on v5p-16 does not fit: 120\.00 of "
                                        r"95\.00 GiB \(in all\); would fit"):
        verb.freeze(str(sweep.path), sweep.out, "v5p-16", dry_run)
    assert capsys.readouterr().out.count("DOES NOT FIT") == 2 and not sweep.out.exists()


def test_a_sweep_without_slices_plans_nothing(sweep, monkeypatch, capsys):
    monkeypatch.setattr(verb.several, "check", lambda *_: pytest.fail("it was planned"))
    verb.freeze(str(sweep.path), sweep.out, dry_run=True)
    assert capsys.readouterr().out.splitlines()[-1] == "3 points; nothing is frozen"
    assert not sweep.out.exists()


def test_what_needs_no_compiler_is_seen_before_any_is_asked(sweep, monkeypatch):
    """A point too few chips for whose mesh there are, behind one that could be compiled."""
    monkeypatch.setattr(verb.several, "make", lambda wanted: pytest.fail("it was planned"))
    sweep.write(SWEEP.replace('"seed": 1', '"mesh.fsdp": 1').replace('name="b"', 'name="b", topology="h100-4"'))
    with pytest.raises(UserError, match=r"^'a' on h100-2: .*mesh data=1 x fsdp=1 .* does not fit 2 devices"):
        verb.freeze(str(sweep.path), sweep.out, "h100-2")


def test_another_sweep_is_refused_before_it_is_planned(sweep, monkeypatch):
    sweep.freeze()
    monkeypatch.setattr(verb.several, "make", lambda wanted: pytest.fail("it was planned"))
    sweep.write(SWEEP.replace('"seed": 1', '"seed": 2'))
    with pytest.raises(UserError, match="is another sweep: 'a': seed was 1, is 2"):
        verb.freeze(str(sweep.path), sweep.out, "v5p-16", dry_run=True)


@pytest.mark.parametrize("given", [{"TOPOLOGY": "v5p-16"}, {"DRY_RUN": True}])
def test_slices_are_said_when_points_are_frozen(given, monkeypatch, tmp_path):
    for name, value in ({"OUT": str(tmp_path), "STATUS": True} | given).items():
        monkeypatch.setattr(verb, name, SimpleNamespace(value=value))
    with pytest.raises(UserError, match=r"--topology and --dry_run go with --config"):
        verb.main()


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
@pytest.mark.skipif(not topology.have_libtpu(), reason="no libtpu: pip install '.[tpu]'")
def test_a_slice_that_is_not_here_is_compiled_for_once(sweep, tmp_path):
    """The command itself; two points that differ in a seed take one compile, the second time none."""
    sweep.write('[dict(name=f"seed{n}", config="FILE", overrides={"seed": n}) for n in (0, 1)]')
    words = [sys.executable, "-m", "tfusion.sweep", f"--config={sweep.path}", f"--out={sweep.out}", "--dry_run",
             "--topology=v5litepod-1"]
    first, second = [subprocess.run(words, cwd=ROOT, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
                                    capture_output=True, text=True, check=False) for _ in range(2)]
    assert first.returncode == second.returncode == 0, first.stderr
    assert first.stdout == second.stdout and first.stdout.count("of 15.75  compiled") == 2
    assert "1 of 1" in first.stderr and "planning" not in second.stderr
    assert len(list((tmp_path / "tfusion" / "plans").iterdir())) == 1 and not sweep.out.exists()


@pytest.mark.slow
def test_the_launcher_runs_a_sweep_and_passes_its_flags_on(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "points.jsonl").write_text("")
    run = subprocess.run([ROOT / "launch" / "local.sh", f"--sweep={tmp_path}/x", "--parallel=2", "--retry"],
                         env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "0 of 0 points are finished" in run.stdout, run.stderr
