"""A sweep is read from workdirs and from what is kept of them; what is missing is named, the rest fitted."""

import io
import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.reporting.fake_run import metric, write_json, write_lines
from tests.scaling.fake_sweep import LAWS, RATIO, SIZES, lose_runs, write_point, write_sweep
from tfusion.errors import UserError
from tfusion.scaling import results, study


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder of a sweep, its points)."""
    root = tmp_path_factory.mktemp("sweep")
    return root, write_sweep(root)


@pytest.fixture
def sweep(whole, tmp_path):
    """One to be damaged: (folder, points), workdirs in it."""
    return shutil.copytree(whole[0], tmp_path / "x"), whole[1]


def change(path, **values):
    write_json(path, json.loads(path.read_text()) | values)


def test_known_laws_are_found(whole):
    found = study.read(whole[0])
    assert len(found.runs) == 26 and len(found.ladder()) == 16 and not found.missing
    assert {panel.metric.name for panel in found.panels} == LAWS.keys()
    inside = []
    for panel in found.panels:
        for axis in ("six_nd", "flops"):
            for recipe in panel.values:
                low, high = panel.fits[axis][recipe].slope_interval
                assert low <= LAWS[panel.metric.name][1] <= high, (panel.metric.name, axis, recipe)
            ratio = panel.ratios[axis]
            if panel.metric.name == "diffusion_loss":
                assert ratio == "the baseline has no run to match"
            else:
                inside.append(ratio.low < RATIO[panel.metric.name] < ratio.high)
                assert not ratio.beyond
                assert ratio.value == pytest.approx(RATIO[panel.metric.name], rel=0.3)
    assert len(inside) == 14 and sum(inside) >= 12  # of 95 %


def test_a_loss_is_fitted_as_its_perplexity(whole):
    panel = next(x for x in study.read(whole[0]).panels if x.metric.name == "glosses_lm_loss")
    run, value = panel.values["transfusion"][0]
    assert value == pytest.approx(math.exp(run.figures["glosses_lm_loss"]["value"]))
    assert panel.metric.title == "Perplexity, glosses" and panel.metric.better == "lower"


def test_axes_are_the_papers_and_what_was_counted(whole):
    run = next(run for run in study.read(whole[0]).runs if run.size == "s2")
    n = SIZES["s2"]
    assert (run.six_nd, run.flops) == (pytest.approx(6 * n * 20 * n), pytest.approx(1.3 * 6 * n * 20 * n))


def test_floors_are_shown_per_codec_and_once(whole):
    floors = {panel.metric.name: panel.floors for panel in study.read(whole[0]).panels}
    assert floors["fd_pack"] == pytest.approx({
        "real against real": 0.05, "codec, transfusion": 0.2, "codec, chameleon": 0.3})
    assert floors["cider"] == {"chance": 20.0} and floors["caption_exact"] == {}


def test_the_rest_is_fitted_where_runs_are_missing(sweep):
    root, _ = sweep
    runs = root
    (runs / "transfusion-s1-seed0/summary.json").unlink()
    change(runs / "transfusion-s1-seed0/config.json", train={"num_steps": 400})
    (runs / "transfusion-s2-seed0/evaluation/metrics.json").unlink()
    change(runs / "transfusion-s2-seed1/evaluation/metrics.json", step=50)
    change(runs / "transfusion-s3-seed1/evaluation/metrics.json", step=80)
    change(runs / "transfusion-s3-seed1/summary.json", steps=80)  # of a shorter schedule
    (runs / "chameleon-s1-seed0/evaluation/metrics.json").write_text('{"metr')
    shutil.rmtree(runs / "chameleon-s1-seed1")
    (runs / "chameleon-s2-seed1/summary.json").unlink()
    (runs / "chameleon-s2-seed1/metrics.jsonl").unlink()
    found = study.read(root)
    assert found.missing == {
        "transfusion-s1-seed0":
            "its workdir holds another run (train.num_steps = 400, not 100): move it away",
        "transfusion-s2-seed0": "trained, not evaluated",
        "transfusion-s2-seed1": "trained to step 100, evaluated at step 50",
        "transfusion-s3-seed1": "trained to step 80, evaluated at step 80",
        "chameleon-s1-seed0": "trained, not evaluated", "chameleon-s1-seed1": "not begun",
        "chameleon-s2-seed1": "begun, nothing logged"}
    assert len(found.ladder()) == 9 and found.planned == 26
    panel = found.panels[0]
    assert [len(some) for some in panel.values.values()] == [4, 5]
    assert [len(fit.groups) for fit in panel.fits["six_nd"].values()] == [3, 3]


@pytest.mark.parametrize(("path", "content"), [
    ("config.json", "{}"), ("summary.json", '{"steps": 100}'), ("evaluation/metrics.json", '{"step": 100}')])
def test_a_broken_file_costs_one_run(sweep, path, content):
    root, _ = sweep
    (root / "chameleon-s1-seed0" / path).write_text(content)
    found = study.read(root)
    assert list(found.missing) == ["chameleon-s1-seed0"] and len(found.ladder()) == 15


def test_a_broken_line_of_a_log_costs_that_line(sweep):
    root, _ = sweep
    for name in ("chameleon-s1-seed0", "chameleon-s2-seed0"):
        path = root / name / "metrics.jsonl"
        path.write_text(path.read_text() + "{garbage\n")
    (root / "chameleon-s2-seed0/summary.json").unlink()
    found = study.read(root)
    assert found.missing == {"chameleon-s2-seed0": "stopped or under way at step 100 of 100"}
    drops = next(run for run in found.runs if run.name == "chameleon-s1-seed0").drops
    assert drops == pytest.approx({"scenes": 0.024})


def test_a_run_of_another_configuration_is_not_the_point(sweep):
    """Neither fitted nor kept under the point's hash."""
    root, _ = sweep
    change(root / "chameleon-s1-seed0/config.json", objective="transfusion")
    why = "its workdir holds another run (objective = transfusion, not chameleon): move it away"
    assert study.read(root).missing == {"chameleon-s1-seed0": why}
    assert len(study.keep(root, root / "kept")) == 25


def test_points_without_a_transformer_are_not_compared_and_none_counts_twice(sweep):
    root, points = sweep
    write_lines(root / "points.jsonl", [*points, points[0] | {"name": "codec", "params": None, "tokens": None}])
    assert study.read(root).planned == 26
    write_lines(root / "points.jsonl", [*points, points[0]])
    with pytest.raises(UserError, match=f"has '{points[0]['name']}' twice"):
        study.read(root)


def test_what_is_no_number_has_no_place_in_a_line(sweep):
    root, _ = sweep
    path = root / "chameleon-s1-seed0/evaluation/metrics.json"
    figures = json.loads(path.read_text())["metrics"]
    figures["cider"]["value"], figures["scenes_lm_loss"]["value"] = math.nan, 800.0
    change(path, metrics=figures)
    panels = {x.metric.name: x for x in study.read(root).panels}
    for name in ("cider", "scenes_lm_loss"):
        assert panels[name].dropped == [("chameleon-s1-seed0", "no value")]


@pytest.mark.parametrize("lost", ["value", "run"])
def test_the_baselines_largest_runs_are_matched_or_nothing(sweep, lost):
    """Not the next smaller ones."""
    root, _ = sweep
    if lost == "run":
        shutil.rmtree(root / "chameleon-s4-seed1")
    else:
        path = root / "chameleon-s4-seed1/evaluation/metrics.json"
        figures = json.loads(path.read_text())["metrics"]
        figures["generation_all"]["value"] = 0.0
        change(path, metrics=figures)
    ratios = {x.metric.name: x.ratios["six_nd"] for x in study.read(root).panels}
    assert ratios["generation_all"] == "chameleon-s4-seed1, which it has to match, has no value here"
    assert isinstance(ratios["cider"], str) == (lost == "run")


def test_references_of_one_modality_are_no_part_of_the_ladder(sweep):
    """They have no codec or draw nothing, and are compared with nobody."""
    root, points = sweep
    points = [*points, write_point(root, "text-s1", "transfusion", "s1", 0, "reference")]
    write_lines(root / "points.jsonl", points)
    path = root / "text-s1/evaluation/metrics.json"
    figures = json.loads(path.read_text())["metrics"]
    change(path, metrics={"scenes_lm_loss": figures["scenes_lm_loss"]})
    found = study.read(root)
    assert len(found.runs) == 27 and len(found.ladder()) == 16
    assert [run.figures["scenes_lm_loss"] for run in found.runs][-1] == figures["scenes_lm_loss"]


def test_processes_may_sample_otherwise(sweep):
    root, _ = sweep
    change(root / "transfusion-s2-flow/evaluation/metrics.json", sampling={"sampler": "euler"})
    assert len(study.read(root).runs) == 26


def test_too_few_runs_are_no_line_and_no_crash(tmp_path):
    write_lines(tmp_path / "points.jsonl", [write_point(tmp_path, "a", "transfusion", "s1", 0)])
    panel = study.read(tmp_path).panels[0]
    assert panel.fits["six_nd"]["transfusion"] == "a line needs two sizes, here is one"
    assert panel.ratios["flops"] == "the baseline has no run to match"


def test_what_has_no_logarithm_and_what_is_an_outlier_is_named(sweep):
    root, _ = sweep
    path = root / "chameleon-s1-seed0/evaluation/metrics.json"
    figures = json.loads(path.read_text())["metrics"]
    figures["generation_all"]["value"], figures["cider"]["value"] = 0.0, 3.5
    figures["caption_all"]["value"] = None
    figures["fid"] = metric("FID", 120.0, 9, None, None, None, None, "lower")
    change(path, metrics=figures)
    by_rule = [("chameleon-s1-seed0", "3.5 is an outlier by the paper's rule")]
    for outliers, gone in (("none", []), ("paper", by_rule)):
        panels = {x.metric.name: x for x in study.read(root, outliers=outliers).panels}
        assert panels["generation_all"].dropped == [("chameleon-s1-seed0", "0 has no logarithm")]
        assert panels["caption_all"].dropped == [("chameleon-s1-seed0", "no value")]
        assert panels["cider"].dropped == gone and len(panels["cider"].values["chameleon"]) == 8 - len(gone)
        assert bool(panels["fid"].values) == (outliers == "none")


@pytest.mark.parametrize("key", ["tokenizer", "sizes.scenes", "codec", "sampling", "n"])
def test_runs_that_do_not_compare_are_refused(sweep, key):
    root, points = sweep
    other, kept = points[9], root / "kept"
    for point in points:
        results.keep(point, root / point["name"], kept)
        recipe = "a" if "transfusion" in point["name"] else "b"
        change(kept / point["name"] / "result.json", identity={
            "tokenizer": "t", "codec": recipe, "order": point["name"], "sizes.scenes": "s"})
    lose_runs(root)
    assert len(study.read(root, kept).runs) == 26  # each recipe its own codec, each seed its own order
    path = kept / other["name"]
    if key == "sampling":
        change(path / results.EVALUATION, sampling={"of": "other"})
    elif key == "n":
        figures = json.loads((path / results.EVALUATION).read_text())["metrics"]
        figures["generation_all"]["n"] = 16
        change(path / results.EVALUATION, metrics=figures)
    else:
        found = json.loads((path / "result.json").read_text())["identity"]
        change(path / "result.json", identity=found | {key: "other"})
    what = {"n": "pictures"}.get(key, key)
    with pytest.raises(UserError, match=f"cannot be compared: they differ in .*{what}.*{other['name']}"):
        study.read(root, kept)


LINE = json.dumps({"name": "a", "workdir": "a", "config_hash": "h", "params": 1, "tokens": 1,
                   "verbs": ["evaluate"]})


@pytest.mark.parametrize(("lines", "why"), [
    (None, "there is no sweep at"), ("", "holds no points"), ("{", "line 1 is not JSON"),
    ("3", "line 1 is not JSON"),
    ('{"name": "a"}', "line 1 lacks workdir, config_hash, params, tokens"),
    (LINE.replace("evaluate", "prepare"), "holds no points that are evaluated"),
    (LINE, r"no run of .* \(a: not begun\)")])
def test_no_sweep_is_one_line(tmp_path, lines, why):
    if lines is not None:
        (tmp_path / "points.jsonl").write_text(lines)
    with pytest.raises(UserError, match=why):
        study.read(tmp_path)


def test_a_point_is_finished_where_it_is_kept(sweep):
    root, points = sweep
    point, kept = points[0], root / "kept"
    name, digest, workdir = point["name"], point["config_hash"], root / point["name"]
    assert study.finished(root, point, kept) == workdir
    write_json(workdir / "evaluation/scenes/told.jsonl", {})
    (workdir / "evaluation/scenes/drawn.npz").write_bytes(b"all")
    np.savez(workdir / "evaluation/scenes/card.npz", drawn=np.zeros((48, 32, 32, 3), np.uint8))
    assert len(study.keep(root, kept)) == 26 and study.keep(root, kept) == []
    place = kept / name
    shutil.rmtree(workdir)
    assert study.finished(root, point, None) is None and study.finished(root, point, kept) == place
    names = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    assert names == {"result.json", "config.json", "summary.json", "metrics.jsonl", "samples.png",
                     "evaluation/metrics.json", "evaluation/scenes/told.jsonl"}
    assert Image.open(io.BytesIO((place / "samples.png").read_bytes())).size == (256, 128)
    assert study.read(root, kept).runs[0].folder == place
    assert results.kept(kept, name, digest) == place
    assert results.kept(kept, name, "new") is None and results.kept(kept, "other", digest) is None
    (place / "result.json").unlink()  # written last: without it the copy was cut off
    assert results.kept(kept, name, digest) is None


def test_another_configurations_result_is_not_overwritten(sweep):
    root, points = sweep
    results.keep(points[0], root / points[0]["name"], root / "kept")
    with pytest.raises(UserError, match="of another configuration than transfusion-s1-seed0 has now"):
        results.keep(points[0] | {"config_hash": "new"}, root / points[0]["name"], root / "kept")


def test_what_a_verb_failed_of_is_named(tmp_path):
    assert results.why_not(tmp_path / "none", {}) == "not begun"
    write_json(tmp_path / "sweep.json", {"verb": "train", "status": 1, "why": "error: loss is NaN"})
    assert results.why_not(tmp_path, {}) == "train ended with 1: error: loss is NaN"


def test_a_log_is_thinned_but_for_its_evaluations():
    rows = [{"step": i} | ({"eval/lm_loss": 1.0} if i % 500 == 7 else {}) for i in range(3000)]
    text = results.thinned("".join(json.dumps(row) + "\n" for row in rows))
    kept = [json.loads(line) for line in text.splitlines()]
    assert len(kept) <= 106 and kept[0]["step"] == 0 and kept[-1]["step"] == 2999
    assert sum("eval/lm_loss" in row for row in kept) == 6
    assert results.thinned('{"step": 1}\n') == '{"step": 1}\n' and results.thinned("") == ""


def test_a_few_pictures_are_a_short_sheet(tmp_path):
    assert results.samples(tmp_path) is None
    (tmp_path / "evaluation/drawn").mkdir(parents=True)
    for number, size in ((3, (96, 32)), (17, (256, 64))):
        np.savez(tmp_path / "evaluation/drawn/card.npz", drawn=np.zeros((number, 32, 32, 3), np.uint8))
        assert Image.open(io.BytesIO(results.samples(tmp_path))).size == size


def test_drops_are_means_over_the_run(whole):
    runs = study.read(whole[0]).runs
    assert {run.recipe: run.drops for run in runs} == {
        "transfusion": {"scenes": pytest.approx(0.02)}, "chameleon": {"scenes": pytest.approx(0.024)}}
