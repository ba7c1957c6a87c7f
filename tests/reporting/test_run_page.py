"""The report of a run: self-contained, complete, forgiving about optional parts, of any kind of training."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reporting.fake_run import metric, write_autoencoder, write_fake_run, write_json, write_lines
from tfusion.reporting import figures, pictures
from tfusion.reporting.records import ReportError
from tfusion.reporting.run_page import TRAINING, write_report

REPOSITORY = Path(__file__).parents[2]
EVALUATED = {"figures": "What it can do", "classes": "By class", "pictures": "Held-out prompts, painted",
             "captions": "Held-out images, described", "interleaved": "Documents written by the model",
             "reconstructions": "What the autoencoder keeps", "mask": "Who sees whom",
             "baselines": "What simpler models reach"}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    return write_fake_run(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def run(whole_run, tmp_path) -> Path:
    """A copy that a test may damage; data and codec stay where they are."""
    return shutil.copytree(whole_run, tmp_path / "transfusion")


def report(root: Path) -> str:
    write_report(root, root / "out/report.html")
    return (root / "out/report.html").read_text()


def change(path: Path, **changes) -> None:
    found = json.loads(path.read_text())
    for key, value in changes.items():
        found["metrics"][key.replace("__", "/")] |= value
    path.write_text(json.dumps(found))


def section(text: str, name: str) -> str:
    return text[text.index(f'<section id="{name}">') :].partition("</section>")[0]


def test_page_is_whole_and_self_contained(run, charts):
    text = report(run)
    for name, title in (EVALUATED | {name: title for name, title, _ in TRAINING if name != "progress"}).items():
        assert f'<section id="{name}"><h2>{title}</h2>' in text, name
    assert 'id="left-out"' not in text and "Painted by the model." in text
    assert "http:" not in text and "https:" not in text and "<script" not in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources and all(s.startswith(("data:", "#")) for s in sources)
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text)
    assert len(text) < 4_000_000
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids)), "two plots share an id"
    assert [p.name for p in (run / "out").iterdir()] == ["report.html"]


def test_verdicts_are_shown(run):
    text = report(run)
    assert "Below what was wanted: 1 of 8, painted: objects in the right places" in text
    table = section(text, "figures")
    assert table.count('<span class="good">✓</span>') == 5 and table.count('<span class="bad">✗</span>') == 1
    assert "0.945 to 0.996 · n = 128" in table and "exact, one" not in table


def test_short_of_a_goal_that_the_interval_holds_is_no_failure(run):
    """Of few prompts it says nothing; said as such, with a mark of its own, and neither ticked nor crossed."""
    path = run / "evaluation/metrics.json"
    change(path, relation={"want": 0.86}, exact__two={"value": 0.85})
    text = report(run)
    assert "✓ As good as wanted: 6 of 8 figures, and 2 within the interval (≈)" in text
    row = text[text.index("<td>painted: objects in the right places") :].partition("</tr>")[0]
    assert ">≈</span>" in row and "✓" not in row and "✗" not in row and "#b04a35" not in row
    change(path, relation={"want": 0.87})
    assert "Below what was wanted: 1 of 8, painted: objects in the right places; 1 within" in report(run)
    for low, met in ((1.02, False), (0.98, figures.WITHIN)):
        assert figures.verdict(metric("loss", 1.1, 9, low, 1.2, None, 1.0, "lower")) == met


def test_a_scale_is_drawn_where_something_gives_one():
    """By hand: the line's middle is 95, its ends 8 and 182."""
    def x(*figure):
        return re.findall(r'cx="([\d.]+)"', pictures.scale(*figure, good=True))

    assert x(0.5, None, None, None, None) == x(None, 0.1, 0.9, 0.5, 0.5) == x(float("nan"), 0, 1, 0, 0) == []
    assert x(0.5, 0.4, 0.6, None, None) == ["95.0"]  # a fraction
    assert x(0.5, None, None, None, 1.0) == x(-0.5, None, None, None, -1.0) == ["95.0"]  # from 0, with a margin
    assert float(x(2.0, None, None, 4.0, 1.0)[0]) == 95 and float(x(30.0, 29.0, 31.0, None, None)[0]) > 160


def test_a_wanted_metric_without_a_value_is_not_reached(run):
    """Nothing could be scored (n = 0): the page says so, and is written all the same."""
    unscored = {"value": None, "n": 0, "low": None, "high": None}
    change(run / "evaluation/metrics.json", sprites=unscored, fid=unscored)  # nothing is wanted of the latter
    text = report(run)
    assert "Below what was wanted: 2 of 8, painted: exactly the right objects, painted:" in text
    row = text[text.index("<td>painted: exactly the right objects") :]
    row = row[: row.index("</tr>")]
    assert '<td class="value">–<small>n = 0</small>' in row and "✗" in row and "≥ 0.8" in row


def test_a_part_that_fails_is_named(run):
    """Each class has its row; one that is asked for more than it gives counts in the verdict."""
    change(run / "evaluation/metrics.json", exact__two={"value": 0.08, "low": 0.02, "high": 0.24})
    text = report(run)
    assert "2 of 8, painted: objects in the right places, exact, two" in text
    row = text[text.index('<td class="" data-label="class of scene">two') :]
    row = row[: row.index("</tr>")]
    assert ">26<" in row and "0.080" in row and row.count("✗") == 1 and "0.960" in row


def test_the_run_that_made_the_codec_is_shown(run, whole_run):
    """The data say which; without them, or without it, nothing is missing."""
    shown = section(report(run), "codec")
    assert str(whole_run.parent / "autoencoder") in shown and "Held-out PSNR" in shown
    assert "Reconstruction loss" in shown
    write_json(run / "config.json", {"objective": "transfusion", "seed": 0})
    text = report(run)
    assert 'id="codec"' not in text and 'id="left-out"' not in text


def test_stages_are_those_of_run_evaluation_data_and_codec(run):
    shown = section(report(run), "speed")
    parts = re.findall(r'(\w+) <span class="faint">·</span> (\w+)', shown)
    assert parts == [("autoencoder", "compile"), ("autoencoder", "train"), ("data", "prepare"),
                     ("transfusion", "compile"), ("transfusion", "train"), ("evaluation", "evaluate")]
    assert "5 min 37 s in all" in shown


def test_where_the_time_of_all_attempts_went(run):
    card = section(report(run), "speed").partition("<b>Where the time went</b>")[2]
    assert card.startswith("Of training, 5 min 00 s in 2 attempts.")
    rows = re.findall(r"<tr>(.*?)</tr>", card.partition("</table>")[0])[1:]
    shown = [re.findall(r">([^<>]+)<", row) for row in rows]
    assert shown[0] == ["training steps", "4 min 00 s", "80.0 %"]
    assert shown[-1] == ["lost to restarts", "20 s", "6.7 %"]
    (run / "goodput.json").unlink()
    text = report(run)
    assert "Where the time went" not in text and 'id="left-out"' not in text


def test_what_was_left_out_of_the_evaluation_is_named(run):
    path = run / "evaluation/metrics.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"left_out": {"drawn": "the run cannot <draw>"}}))
    note = section(report(run), "left-out")
    assert "Evaluation: drawn" in note and "the run cannot &lt;draw&gt;" in note


@pytest.mark.parametrize(("missing", "gone"), [
    ("evaluation/scenes/card.npz", "pictures"), ("evaluation/documents/card.json", "interleaved"),
    ("evaluation/mask/card.json", "mask")])
def test_a_missing_part_is_left_out_with_a_note(run, missing, gone):
    (run / missing).unlink()
    text = report(run)
    assert f'<section id="{gone}">' not in text and f'href="#{gone}"' not in text
    note = section(text, "left-out")
    assert Path(missing).name in note and "python -m tfusion.evaluate" in note


def test_a_run_that_was_not_evaluated_shows_its_training(run):
    shutil.rmtree(run / "evaluation")
    text = report(run)
    assert 'id="losses"' in text and "verdict" not in text.partition("<header")[2].partition("</header>")[0]
    assert "python -m tfusion.evaluate --workdir=" in section(text, "left-out")


def test_the_bare_minimum_is_enough(run, charts):
    for path in run.rglob("*"):
        if path.is_file() and path.name not in ("metrics.jsonl", "config.json"):
            path.unlink()
    (run / "metrics.jsonl").write_text('{"step": 1, "train/lm_loss": 2.5}\n')
    text = report(run)
    assert 'id="losses"' in text and 'id="left-out"' in text and 'id="figures"' not in text


def test_a_run_of_any_kind(tmp_path, charts):
    """Whatever it logged under train/ and eval/ is drawn, under its own name."""
    rows = [{"step": step, "train/error_of_all": 9.0 / step, "eval/line/error_of_all": 8.0 / step,
             "eval/curve/error_of_all": 7.0 / step, "train/depth_bin0": 1.0, "train/depth_bin1": 2.0 / step}
            for step in range(1, 30)]
    write_lines(tmp_path / "toy/metrics.jsonl", rows)
    write_json(tmp_path / "toy/config.json", {"objective": "toy", "width": 8})
    text = report(tmp_path / "toy")
    losses = section(text, "losses")
    assert "<b>Error of all</b>" in losses and "<b>Depth by noise level</b>" in losses
    assert ">curve</text>" in losses and ">line</text>" in losses
    assert "Error of all</th>" in section(text, "milestones") and "you should see" not in text
    assert "tfusion run report · toy" in text


def test_an_autoencoder(tmp_path):
    text = report(write_autoencoder(tmp_path / "autoencoder"))
    losses = section(text, "losses")
    assert "<b>Reconstruction loss</b>" in losses and "<b>KL divergence</b>" in losses
    assert "Held-out PSNR" in losses
    assert "images seen" in text and "tokens seen" not in text and 'id="codec"' not in text
    assert "images per second" in section(text, "speed")


def test_figures_over_the_steps_that_were_evaluated(run, charts):
    """Of two and more checkpoints; broken ones, and figures without a value, are passed over."""
    assert 'id="progress"' not in report(run)
    for step, value in ((60, 0.2), (120, 0.5), (180, None)):
        path = run / f"evaluation/steps/{step}/metrics.json"
        shutil.copytree(run / "evaluation/mask", path.parent / "mask")
        shutil.copyfile(run / "evaluation/metrics.json", path)
        change(path, canvas={"value": value}, sprites={"value": None if step > 60 else 0.1})
    write_json(run / "evaluation/steps/200/metrics.json", [])
    shown = section(report(run), "progress")
    assert shown.startswith('<section id="progress"><h2>Figures over the steps')
    assert "3 checkpoints" in shown and "<b>painted: background colour</b>" in shown
    assert "exactly the right objects" not in shown and "exact, one" not in shown


@pytest.mark.parametrize("required", ["metrics.jsonl", "config.json"])
def test_a_required_file_is_named_with_its_command(run, required):
    (run / required).unlink()
    with pytest.raises(ReportError, match=rf"{required} is missing; `python -m tfusion.train .*` makes it"):
        report(run)
    assert not (run / "out").exists()


def test_damage_is_reported_with_its_place(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3\n')
    with pytest.raises(ReportError, match=r"metrics.jsonl, line \d+ is not JSON"):
        report(run)


@pytest.mark.parametrize("text", ["", '{"stages": [', "[]", "null", "{}"])
def test_broken_side_files_are_left_out_and_named(run, text):
    for name in ("timing.json", "summary.json", "goodput.json"):
        (run / name).write_text(text)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3')  # being written
    note = section(report(run), "left-out")
    for name in ("timing.json", "summary.json", "goodput.json"):
        assert f"transfusion/{name} is broken" in note


@pytest.mark.parametrize("text", ["[]", "{}", '{"metrics": {"a": {}}}', '{"metrics": []}', "null"])
def test_a_broken_evaluation_is_one_line(run, text):
    (run / "evaluation/metrics.json").write_text(text)
    with pytest.raises(ReportError, match="evaluate --workdir=") as e:
        report(run)
    assert "\n" not in str(e.value)


def verb(*args: str, cwd=REPOSITORY) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "tfusion.report", *args], text=True, capture_output=True,
                          check=False, cwd=cwd, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})


def test_the_verb_writes_beside_the_run_and_fails_in_one_line(run, tmp_path):
    done = verb(f"--workdir={run}")
    assert done.returncode == 0, done.stderr
    assert (run / "report.html").is_file() and "wrote" in done.stdout
    (run / "metrics.jsonl").unlink()
    failed = verb(f"--workdir={run}", f"--out={tmp_path / 'no.html'}")
    assert failed.returncode == 1 and not (tmp_path / "no.html").exists()
    assert len(failed.stderr.strip().splitlines()) == 1
    assert "metrics.jsonl is missing; `python -m tfusion.train" in failed.stderr


def test_reporting_needs_no_jax():
    code = "import sys, tfusion.report; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
