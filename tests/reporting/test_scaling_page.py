"""The page of a scaling study: it says what was fitted, whatever that is; tables and pictures lie beside."""

import csv
import io
import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure
from PIL import Image

from tests.conftest import import_verb
from tests.reporting.fake_run import metric, write_json, write_lines
from tests.reporting.test_run_page import section
from tests.scaling.fake_sweep import lose_runs, write_point, write_sweep
from tfusion.errors import UserError
from tfusion.reporting import page, scaling_page, scaling_plots
from tfusion.scaling import study

ABOUT = {"command": "python -m tfusion.report --scaling x", "commit": "abc123"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    write_sweep(root)
    (root / "chameleon-s1-seed1/summary.json").unlink()
    return root


@pytest.fixture(scope="module")
def found(root):
    return study.read(root)


@pytest.fixture
def text(found):
    return page.document("x", scaling_page.body(found, ABOUT))


def test_page_is_whole_and_self_contained(found, charts):
    found = found._replace(panels=[found.panels[i] for i in (0, 4)])
    text = page.document("x", scaling_page.body(found, ABOUT))
    assert "http:" not in text and "https:" not in text and "<script" not in text
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids)), "two plots share an id"
    figure = section(text, "figure")
    assert figure.count("<svg") == 2 * len(found.panels) == 4
    first = figure.partition("</svg>")[0]
    assert ">transfusion</text>" in first and ">chameleon</text>" in first and "10¹³" in first
    assert f"× {found.panels[0].ratios['six_nd'].value:.2f}" in first
    assert ">codec, chameleon</text>" in figure and "real against real" in figure


def test_table_three_is_ours_beside_the_papers(text, found):
    parity = section(text, "parity")
    cider = next(x for x in found.panels if x.metric.name == "cider")
    row = parity[parity.index("CIDEr ↑") :].partition("</tr>")[0]
    ratio = cider.ratios["six_nd"]
    assert page.number(ratio.value) in row and f"{page.number(ratio.low)} to {page.number(ratio.high)}" in row
    largest = [value for run, value in cider.values["chameleon"] if run.size == "s4"]
    assert page.number(sum(largest) / 2) in row and len(largest) == 2
    row = parity[parity.index("Diffusion loss ↓") :].partition("</tr>")[0]
    assert row.count("the baseline has no run to match") == 2 and scaling_page.ABSENT in row
    theirs = parity[parity.index("What the paper reports") :]
    assert re.findall(r">([\d.]+)<", theirs[theirs.index("C4 perplexity") :])[:3] == ["7.72", "8.41", "0.489"]


def test_what_was_varied_stands_beside_the_ladder(text):
    rates = section(text, "learning-rate")
    assert rates.count("<tr>") == 1 + 4 * 3 and rates.count("(ladder)") == 4
    rows = re.findall(r"<tr>(.*?)</tr>", rates)[1:4]
    assert [re.sub("<.*?>", " ", row).split()[2] for row in rows] == ["0.0005", "0.001", "0.002"]
    assert [row.count("<b>") for row in rows] == [0, 8, 0]  # the others need twice the compute
    process = section(text, "process")
    assert [word in process for word in (">eps<", ">flow<", ">v (ladder)<")] == [True] * 3


def test_missing_runs_drops_and_refusals_are_said(text, root):
    assert "chameleon-s1-seed1<small>stopped or under way at step 100 of 100<" in section(text, "missing")
    data = section(text, "data")
    assert "2.00 %" in data and "2.40 %" in data and "no more than half a percent" in data
    assert section(text, "size-and-budget").count("needs 6 pairs of at least 3 sizes and 3 budgets") == 2
    assert "abc123" in section(text, "how")


def test_drops_that_differ_are_said(found):
    runs = [run._replace(drops={"scenes": 0.03}) if run.recipe == "chameleon" else run for run in found.runs]
    assert "up to 1.00 %: more than half a percent" in scaling_page.drops(found._replace(runs=runs))
    assert scaling_page.drops(found._replace(runs=[run._replace(drops={}) for run in found.runs])) == ""


def test_runs_that_are_rows_of_the_papers_tables_stand_beside_them(tmp_path, text):
    assert '"tables"' not in text
    write_lines(tmp_path / "points.jsonl", [
        write_point(tmp_path, name, "transfusion", "s1", 0, "tables", tables=rows)
        for name, rows in (("full", {"5": "bidirectional", "6": "2"}), ("causal", {"5": "causal"}))])
    found = study.read(tmp_path)
    text = section(page.document("x", scaling_page.body(found, ABOUT)), "tables")
    five, six = re.findall(r"<h3>Table (\d): .*?</h3>(.*?)</table>", text, re.S)
    assert (five[0], six[0]) == ("5", "6")
    rows = {words[0]: words[1:] for row in re.findall(r"<tr>(.*?)</tr>", six[1])[1:]
            if (words := re.sub("<.*?>", " ", row).split())}
    reached = page.number(found.runs[0].figures["cider"]["value"])
    assert rows["2"][:6] == ["10.4", "6.00", "51.7", "16.0", "20.3", "24.0"] and reached in rows["2"]
    assert set(rows["8"][6:]) == {"–"} and len(rows["8"]) == len(rows["2"])
    assert five[1].count("<tr>") == 3 and reached in five[1]


def test_lines_that_do_not_improve_are_no_ratio(found):
    ratio = found.panels[0].ratios["six_nd"]
    assert "does not improve" in scaling_page.ratio_cell(ratio._replace(value=math.inf))
    assert "∞ · beyond its runs" in scaling_page.ratio_cell(ratio._replace(high=math.inf, beyond=True))


def test_three_sizes_have_lines_and_ratios_without_intervals(tmp_path, charts):
    write_lines(tmp_path / "points.jsonl", [
        write_point(tmp_path, f"{recipe}-{size}", recipe, size, 0)
        for recipe in ("transfusion", "chameleon") for size in ("s1", "s2", "s3")])
    files = scaling_page.write(study.read(tmp_path), tmp_path / "out", ABOUT)
    rows = list(csv.DictReader(io.StringIO(files[2].read_text())))
    assert {row["low"] for row in rows} == {row["parity_low"] for row in rows} == {""}
    text = files[0].read_text()
    assert "too few sizes for an interval" in section(text, "parity") and "nan" not in section(text, "fits")
    assert "transfusion, s3" in section(text, "parity")


def test_losses_of_other_targets_are_not_ranked(text):
    assert "Diffusion loss" not in section(text, "process")
    assert "Diffusion loss" in section(text, "learning-rate")


def test_what_the_paper_measures_and_we_do_not_is_named(text):
    key = section(text, "parity").partition("Not measured here: ")[2].partition(".</p>")[0]
    assert key == "C4 perplexity, Wikipedia perplexity, Llama accuracy (%), FID, CLIP score"


def test_the_way_to_parity_is_in_the_picture(found):
    """Also where it ends beyond the runs, by less than ten times."""
    panel = found.panels[1]
    last = max(run.six_nd for run, _ in panel.values["chameleon"])
    for value, inside in ((3.0, True), (30.0, False)):
        ratio = panel.ratios["six_nd"]._replace(value=value)
        ax = Figure().subplots()
        scaling_plots.panel(ax, panel._replace(ratios={"six_nd": ratio}), "six_nd", "6ND")
        assert (ax.get_xlim()[1] > value * last) == inside


def test_of_one_recipe_nothing_is_compared(tmp_path, found, charts):
    """A sweep of learning rates, untagged or all of it tagged; half a ladder of two is one of two."""
    for part, gone in (("ladder", set()), ("lr", {"figure", "fits"})):
        root = tmp_path / part
        write_lines(root / "points.jsonl", [write_point(root, f"a{rate:g}", "transfusion", "s1", 0, part, rate)
                                            for rate in (5e-4, 1e-3)])
        files = scaling_page.write(study.read(root), root / "out", ABOUT)
        text = files[0].read_text()
        sections = set(re.findall(r'<section id="([^"]*)">', text))
        assert {"figure", "fits", "runs", "how"} - gone <= sections
        assert not sections & (gone | {"parity", "data", "size-and-budget", "tables"})
        assert "chameleon" not in text and "Two ways" not in text and scaling_page.ABSENT not in text.replace(
            section(text, "runs"), "")
        assert "CIDEr" in section(text, "runs") and ("learning-rate" in sections) == (part == "lr")
    assert "None: a line needs two sizes, here is one." in (
        tmp_path / "ladder/out/index.html").read_text()
    one = [run for run in found.runs if run.recipe == "transfusion"]
    assert found.compared and 'id="parity"' in scaling_page.body(found._replace(runs=one), ABOUT)


def test_a_recipe_whose_runs_are_to_come_is_compared(tmp_path):
    points = [write_point(tmp_path, recipe, recipe, "s1", 0) for recipe in ("transfusion", "chameleon")]
    write_lines(tmp_path / "points.jsonl", points)
    (tmp_path / "chameleon/summary.json").unlink()
    assert study.read(tmp_path).compared
    write_lines(tmp_path / "points.jsonl", points[:1])
    assert not study.read(tmp_path).compared


def test_one_run_alone_makes_a_page(tmp_path, charts):
    write_lines(tmp_path / "points.jsonl", [write_point(tmp_path, "a", "transfusion", "s1", 0)])
    path = tmp_path / "a/evaluation/metrics.json"
    figures = {"cider": metric("cider", 0.0, 9, None, None, None, None),
               "fd_pack": metric("fd", 2.0, 9, None, None, None, None, "lower")}
    write_json(path, json.loads(path.read_text()) | {"metrics": figures})
    files = scaling_page.write(study.read(tmp_path), tmp_path / "out", ABOUT)
    text = files[0].read_text()
    assert "a line needs two sizes, here is one" in text and "No run has a value that can be drawn." in text
    assert "a is left out: 0 has no logarithm." in text


def test_tables_and_pictures_are_files(found, tmp_path, charts):
    few = found._replace(panels=found.panels[:2])
    files = scaling_page.write(few, tmp_path / "out", ABOUT)
    assert [path.name for path in files] == [
        "index.html", "points.csv", "fits.csv", "figure_six_nd.png", "figure_flops.png"]
    points, fits = (list(csv.DictReader(io.StringIO(path.read_text()))) for path in files[1:3])
    assert len(points) == 25 and float(points[0]["six_nd"]) == pytest.approx(6 * 20 * 0.2e6**2)
    assert {row["part"] for row in points} == {"ladder", "lr", "process"}
    ratio = found.panels[1].ratios["flops"]
    row = next(row for row in fits if (row["metric"], row["axis"], row["recipe"]) == (
        found.panels[1].metric.title, "flops", "transfusion"))
    assert float(row["parity"]) == ratio.value
    assert float(row["low"]) < float(row["exponent"]) < float(row["high"])
    assert all(Image.open(io.BytesIO(path.read_bytes())).size[0] > 1000 for path in files[3:])


@pytest.mark.parametrize(("x", "text"), [
    (1e13, "10¹³"), (2e12, "2·10¹²"), (1.08e15, "1.08·10¹⁵"), (0.5, "5·10⁻¹")])
def test_powers_of_ten(x, text):
    assert scaling_plots.power(x) == text


def test_a_sweep_in_a_bucket_is_read_and_kept_like_another(root, tmp_path, bucket, monkeypatch, capsys):
    report = import_verb("report")
    for path in (path for path in root.rglob("*") if path.is_file()):
        (bucket / "x" / path.relative_to(root)).write_bytes(path.read_bytes())
    found = {}
    for sweep, kept in ((root, "local"), (bucket / "x", "remote")):
        values = {"SCALING": str(sweep), "RESULTS": str(tmp_path / kept), "OUT": str(tmp_path / f"{kept}.out")}
        for name in ("WORKDIR", "COMPARE", "OUT", "SCALING", "RESULTS"):
            monkeypatch.setattr(report, name, SimpleNamespace(value=values.get(name)))
        monkeypatch.setattr(scaling_plots, "sheet", lambda *args: None)
        report.main([])
        found[kept] = {path.relative_to(tmp_path / kept): path.read_bytes()
                       for path in (tmp_path / kept).rglob("*") if path.is_file()}
        found[kept]["points"] = (tmp_path / f"{kept}.out" / "points.csv").read_bytes()
    assert found["local"] == found["remote"] and len(found["local"]) > 100


def test_the_verb_keeps_what_is_finished_and_reads_it_elsewhere(root, tmp_path, monkeypatch, capsys):
    report = import_verb("report")
    sweep = shutil.copytree(root, tmp_path / "x")
    values = {"SCALING": str(sweep), "RESULTS": str(tmp_path / "kept")}
    for name in ("WORKDIR", "COMPARE", "OUT", "SCALING", "RESULTS"):
        monkeypatch.setattr(report, name, SimpleNamespace(value=values.get(name)))
    monkeypatch.setattr(scaling_plots, "sheet", lambda *args: None)
    report.main([])
    out = capsys.readouterr().out
    assert out.count("kept ") == 25 and "missing: chameleon-s1-seed1 (stopped" in out
    before = (sweep / "report/points.csv").read_text()
    lose_runs(sweep)
    report.main([])
    out = capsys.readouterr().out
    assert "kept " not in out.replace("/kept", "") and "missing: chameleon-s1-seed1 (not begun)" in out
    assert (sweep / "report/points.csv").read_text() == before
    monkeypatch.setattr(report, "RESULTS", SimpleNamespace(value=None))
    with pytest.raises(UserError, match=r"no run of .* is finished"):
        report.main([])
