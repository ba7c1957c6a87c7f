"""Runs side by side: what they share is drawn on each axis, what differs is listed; any kinds of runs."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from tests.conftest import import_verb
from tests.reporting.fake_run import write_autoencoder, write_evaluation, write_json, write_training
from tests.reporting.test_run_page import section, verb
from tests.scaling import fake_sweep
from tfusion.errors import UserError
from tfusion.reporting import compare
from tfusion.reporting.compare import write_comparison
from tfusion.reporting.records import ReportError, RunFiles, series_of


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_training(root / "a/run", 240, 4, None)
    write_training(root / "b/run", 240, 4, None, factor=1.25)
    write_evaluation(root / "a/run/evaluation")
    write_autoencoder(root / "autoencoder")
    return root


@pytest.fixture
def page(whole, tmp_path):
    """Its charts are empty."""
    write_comparison([whole / "a/run", whole / "b/run", whole / "autoencoder"], tmp_path / "c.html")
    return (tmp_path / "c.html").read_text()


def test_page_is_self_contained(whole, tmp_path, charts):
    write_comparison([whole / "a/run", whole / "b/run", whole / "autoencoder"], tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text()
    assert "http:" not in page and "https:" not in page and "<script" not in page
    assert all(s.startswith(("data:", "#")) for s in re.findall(r'(?:src|href)="([^"]*)"', page))
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids)), "two plots share an id"


def test_a_sweep_stands_for_its_finished_points(tmp_path, monkeypatch, capsys):
    report, compared = import_verb("report"), []
    points = fake_sweep.write_sweep(tmp_path / "x", seeds=1)
    (tmp_path / "x" / points[0]["name"] / "evaluation/metrics.json").unlink()
    for name in ("WORKDIR", "COMPARE", "OUT", "SCALING", "RESULTS"):
        monkeypatch.setattr(report, name, SimpleNamespace(value=[] if name == "COMPARE" else None))
    monkeypatch.setattr(report, "COMPARE", SimpleNamespace(value=[str(tmp_path / "x")]))
    monkeypatch.setattr(report, "OUT", SimpleNamespace(value=str(tmp_path / "c.html")))
    monkeypatch.setattr(report, "write_comparison",
                        lambda roots, out: compared.extend(map(str, roots)) or out.write_text(""))
    report.main(["runs/another"])
    assert compared == [*(f"{tmp_path}/x/{point['name']}" for point in points[1:]), "runs/another"]
    assert f"left out: {points[0]['name']} (trained, not evaluated)" in capsys.readouterr().out


def test_runs_are_told_apart_by_as_much_of_their_paths_as_it_takes(page):
    heads = re.findall(r'<th class="num">([^<]*)</th>', section(page, "runs"))
    assert heads[:2] == ["a/run", "b/run"] and heads[2].endswith("/autoencoder")
    overview = section(page, "runs")
    assert "953 k" in overview or "0.953 M" in overview
    assert "autoencoder" in overview and "94.1 k" in overview


def test_shared_losses_are_drawn_over_every_axis(page):
    losses = section(page, "losses")
    for title in ("LM loss", "Diffusion loss"):
        for axis in ("steps", "tokens", "compute", "time"):
            assert f"<b>{title} over {axis}</b>" in losses
    assert "Reconstruction" not in losses and losses.count("<svg") == 8


def test_a_chart_shows_the_runs_that_have_it(whole, tmp_path, charts):
    write_comparison([whole / "a/run", whole / "b/run", whole / "autoencoder"], tmp_path / "c.html")
    first = section((tmp_path / "c.html").read_text(), "losses").partition("</svg>")[0]
    assert ">a/run</text>" in first and ">b/run</text>" in first and "autoencoder" not in first


def test_axes_are_what_each_run_had_used_by_then(whole):
    run = RunFiles(whole / "b/run")
    axes = {title: read(run) for title, _, read in compare.AXES}
    series = series_of([4, 120, 240, 999], [4.0, 3.0, 2.0, 1.0])
    np.testing.assert_allclose(compare.on(axes["steps"], series).steps, [4, 120, 240, 999])
    np.testing.assert_allclose(compare.on(axes["tokens"], series).steps, [512 * x for x in (4, 120, 240)])
    np.testing.assert_allclose(compare.on(axes["compute"], series).steps, [3.75e9 * x for x in (4, 120, 240)])
    np.testing.assert_allclose(compare.on(axes["time"], series).steps,
                               [29.3e-3 * 1.25 * x / 60 for x in (4, 120, 240)])
    assert compare.on(axes["tokens"], series).values.tolist() == [4.0, 3.0, 2.0]  # none beyond what was logged


def test_a_rate_holds_for_the_steps_since_the_line_before(tmp_path):
    """Lines are not equally far apart, and a run that stood still for a day did not train for it."""
    lines = [{"step": step, "time": time, "perf/step_ms": each}
             for step, time, each in ((10, 0.0, 100.0), (12, 1.0, 1000.0), (22, 86400.0, 100.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert compare.time_axis(RunFiles(tmp_path)).values.tolist() == pytest.approx([1.0, 3.0, 4.0])


def test_figures_stand_side_by_side(page):
    figures = section(page, "figures")
    row = figures[figures.index("painted: exactly the right objects") :].partition("</tr>")[0]
    assert "0.984" in row and "0.945 to 0.996" in row and row.count("✓") == 1 and row.count(compare.ABSENT) == 2
    assert "exact, two" in figures and "Not evaluated: b/run, " in figures
    assert "Painted by the model." in section(page, "pictures")


def test_keys_that_differ_are_listed_and_no_others(page, whole, tmp_path):
    config = section(page, "config")
    rows = re.findall(r"<code>([\w.]+)</code></td>", config)
    assert {"objective", "model.d_model", "autoencoder.width"} <= set(rows) and "seed" not in rows
    row = config[config.index("model.d_model") :].partition("</tr>")[0]
    assert "<code>128</code>" in row and "<code>160</code>" in row and row.count(compare.ABSENT) == 1
    copy = shutil.copytree(whole / "a/run", tmp_path / "copy")
    write_comparison([whole / "a/run", copy], tmp_path / "same.html")
    assert "Their configurations are the same." in (tmp_path / "same.html").read_text()


def test_runs_with_nothing_in_common(whole, tmp_path):
    write_comparison([whole / "a/run", whole / "autoencoder"], tmp_path / "c.html")
    assert "No two of these runs have a loss in common." in (tmp_path / "c.html").read_text()


def test_a_run_under_way_is_compared_by_what_it_logged(whole, tmp_path):
    copy = shutil.copytree(whole / "a/run", tmp_path / "copy")
    (copy / "summary.json").unlink()
    write_comparison([whole / "b/run", copy], tmp_path / "c.html")
    overview = section((tmp_path / "c.html").read_text(), "runs")
    assert overview.count("123 k") == 2  # tokens: 240 steps of 512


@pytest.mark.parametrize(("names", "line"), [
    (["a/run"], "two runs at least"), (["a/run", "a/run"], "names a run twice"),
    (["a/run", "none"], "none/config.json is missing")])
def test_mistakes_are_one_line(whole, tmp_path, names, line):
    with pytest.raises(ReportError, match=line):
        write_comparison([whole / name for name in names], tmp_path / "c.html")
    assert not (tmp_path / "c.html").exists()


def test_damage_is_one_line(whole, tmp_path):
    copy = shutil.copytree(whole / "a/run", tmp_path / "copy")
    write_json(copy / "evaluation/metrics.json", {"metrics": {"a": {}}})
    with pytest.raises(ReportError, match="evaluate --workdir=RUN`"):
        write_comparison([whole / "b/run", copy], tmp_path / "c.html")


def test_the_verb_takes_runs_as_words_or_as_a_list(whole, tmp_path):
    a, b, c = (str(whole / name) for name in ("a/run", "b/run", "autoencoder"))
    for args, out in ((["--compare", a, b, c, "--out=1.html"], "1.html"),
                      ([f"--compare={a},{b}"], "compare.html")):
        done = verb(*args, cwd=tmp_path)
        assert done.returncode == 0 and f"wrote {out} (" in done.stdout, done.stderr
        assert (tmp_path / out).read_text().count("<svg") >= 8


@pytest.mark.parametrize(("flags", "words", "line"), [
    ({}, ["a", "b"], "unexpected argument 'a'"), ({"WORKDIR": "a"}, ["b"], "unexpected argument 'b'"),
    ({}, [], "one of --workdir=RUN, --compare RUN RUN ... and --scaling SWEEP is needed"),
    ({"COMPARE": ["a"]}, [], "two runs"),
    ({"WORKDIR": "a", "COMPARE": ["a"]}, ["b"], "one of --workdir=RUN, --compare RUN RUN"),
    ({"WORKDIR": "a", "SCALING": "a"}, [], "one of --workdir=RUN, --compare RUN RUN"),
    ({"COMPARE": ["a"]}, ["file://b/run"], "a local path is needed, or one that begins")])
def test_what_the_verb_does_not_take(monkeypatch, flags, words, line):
    report = import_verb("report")
    for name in ("WORKDIR", "COMPARE", "SCALING", "OUT"):
        monkeypatch.setattr(report, name, SimpleNamespace(value=flags.get(name)))
    with pytest.raises(UserError, match=line):
        report.main(words)
