"""What `evaluate` does: all that a run can and has the data for; of the rest, a line. A metric is one file."""

import json
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest

from tests import toy
from tests.conftest import import_verb, tiny_config, tiny_dict
from tfusion import config, evals, inference
from tfusion.data.tokenizers import load_tokenizer
from tfusion.errors import UserError
from tfusion.evals import base, measure
from tfusion.evals.base import EVALUATORS, NEEDS, Evaluator, LeftOut, Options
from tfusion.inference.trained import Trained
from tfusion.objectives.base import Aux
from tfusion.reporting.run_page import write_report

TOKENIZER = load_tokenizer("byte")
ALL = ["scenes", "captions", "frechet", "drawn", "described", "documents", "captions_of_documents",
       "reconstructions", "codes", "mask", "losses", "baselines"]
ON_SCENES = dict.fromkeys(("captions", "frechet"), "goes on from 'scenes', which is left out")


def run_of(cfg, codec=None, tokenizer=TOKENIZER):
    codec = codec or SimpleNamespace(image_size=32)
    return Trained(cfg, {}, None if codec == "none" else codec, tokenizer, 1, {}, Aux(1, {}, {}))


def with_data(root, shares=None, **changes):
    tree = tiny_dict(root)
    tree.data.update(changes)
    for name, share in (shares or {}).items():
        tree.data.sources[name].share = share
    return config.from_dict(tree)


@pytest.fixture
def done(monkeypatch):
    """Each evaluator stands in for itself, leaves its name, and a figure of it."""
    called = []
    for name in ALL:
        def run(run, folder, options, name=name):
            called.append(name)
            return {name: {"title": name}}

        monkeypatch.setitem(base.EVALUATORS, name, base.EVALUATORS[name]._replace(run=run))
    return called


LATENTS = {"codes": "the run cannot write pictures as codes"}
CASES = {  # codec, shares, changes of data: what is left out, and why
    "all": (None, {}, {}, LATENTS),
    "text": ("none", {"scenes": 0.0, "stories": 0.0}, {}, LATENTS | {
        "scenes": "data.sources has no 'scenes'", **ON_SCENES,
        "drawn": "cannot draw pictures: it has no codec",
        **dict.fromkeys(("described", "captions_of_documents"), "cannot describe pictures: it has no codec"),
        "reconstructions": "cannot reconstruct pictures: it has no codec"}),
    "no scenes": (None, {"scenes": 0.0}, {}, LATENTS | {
        "scenes": "data.sources has no 'scenes'", **ON_SCENES}),
    "data gone": (None, {}, {"prepared": "/nowhere/data"}, LATENTS | {
        **dict.fromkeys(("drawn", "described", "captions_of_documents", "mask", "losses"),
                        "/nowhere/data is gone: --config"),
        "baselines": "goes on from 'losses', which is left out"}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_can_be_measured_is(done, case, prepared_root, tmp_path, capsys):
    codec, shares, changes, left_out = case
    run = run_of(with_data(prepared_root, shares, **changes), codec)
    result = measure.measure(run, tmp_path, Options())
    assert done == result["evaluators"] == [name for name in ALL if name not in left_out]
    assert list(result["metrics"]) == done and result["left_out"].keys() == left_out.keys()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"left out: {name} ({why})" for name, why in result["left_out"].items()]
    assert all(why in result["left_out"][name] for name, why in left_out.items())


@pytest.mark.parametrize("word, more", [("autoencoder", set()), ("vq", {"codes"})])
def test_an_autoencoder_shows_its_reconstructions(done, tmp_path, word, more):
    from experiments import quickstart

    run = run_of(config.from_dict(quickstart.get_config(f"smoke,{word}")), "none", None)
    assert inference.can(run) == {"reconstruct", "make_codec"} | more
    assert measure.measure(run, tmp_path, Options())["evaluators"] == ["reconstructions", *more, "losses"]


def test_order_is_that_of_needs_and_numbers(monkeypatch):
    monkeypatch.setattr(base, "EVALUATORS", {})
    for name, needs, order in (("a", ("c", "go_on"), 1), ("b", (), 3), ("c", ("scenes",), 4), ("d", (), 2)):
        base.register(Evaluator(name, needs, None, order))
    monkeypatch.setattr(measure, "EVALUATORS", base.EVALUATORS)
    assert [evaluator.name for evaluator in measure.in_order()] == ["d", "b", "c", "a"]


def test_one_that_finds_nothing_leaves_no_folder(done, monkeypatch, prepared_root, tmp_path, capsys):
    def nothing(run, folder, options):
        raise LeftOut("there is nothing")

    monkeypatch.setitem(base.EVALUATORS, "drawn", base.EVALUATORS["drawn"]._replace(run=nothing))
    result = measure.measure(run_of(tiny_config(prepared_root)), tmp_path, Options())
    assert result["left_out"] == {"drawn": "there is nothing"} | LATENTS
    assert "left out: drawn (there is nothing)" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(set(ALL) - {"drawn", "codes"})


METRIC = '''
    """The share of pictures that are dark: a metric in one file."""

    import numpy as np

    from tfusion import inference
    from tfusion.evals import figure
    from tfusion.evals.base import Evaluator, register, section, write_card


    def run(run, folder, options):
        made = inference.decoder(run).reconstruct(run, np.zeros((3, 4, 4, 3), np.uint8))
        items = [{"caption": f"dark number {i}"} for i in range(len(made))]
        write_card(folder, section("dark", "How dark it is", {
            "kind": "gallery", "images": "made", "items": items, "of": len(items)}), made=made)
        return {"dark": figure.share("Dark pictures", [bool(x.max() < 9) for x in made], want=0.9)}


    register(Evaluator("darkness", ("reconstruct",), run))
'''


@pytest.fixture
def toy_metric(tmp_path, monkeypatch):
    """A file like those of tfusion/evals, found as those are."""
    folder = tmp_path / "more_evals"
    folder.mkdir()
    (folder / "darkness.py").write_text(textwrap.dedent(METRIC))
    monkeypatch.setattr(evals, "__path__", [*evals.__path__, str(folder)])
    known = dict(base.EVALUATORS)
    evals.find()
    yield
    base.EVALUATORS.clear()
    base.EVALUATORS.update(known)
    sys.modules.pop("tfusion.evals.darkness", None)


def toy_run(folder):
    cfg = config.from_dict(toy.get_config())
    folder.mkdir()
    config.save(cfg, folder)
    (folder / "metrics.jsonl").write_text('{"step": 1, "train/error": 2.5}\n{"step": 2, "train/error": 2.0}\n')
    aux = Aux(1, {"offset": np.float32(toy.OFFSET)}, {})
    return Trained(cfg, {"line_kernel": np.ones(8, np.float32)}, None, None, 2, {}, aux)


def test_a_metric_is_one_file(toy_metric, tmp_path):
    """Its figure is in metrics.json and on the page, its card on the page: of a kind nobody knows either."""
    folder = tmp_path / "toy"
    measure.evaluate(toy_run(folder), folder / "evaluation", Options())
    found = json.loads((folder / "evaluation/metrics.json").read_text())
    assert found["evaluators"] == ["documents", "losses", "darkness"] and found["step"] == 2
    assert found["metrics"]["dark"]["value"] == 1.0 and found["metrics"]["error"]["value"] < 0.01
    assert {"scenes", "baselines", "reconstructions"} <= found["left_out"].keys()
    write_report(folder, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Dark pictures" in page and "How dark it is" in page and "dark number 2</figcaption>" in page
    assert "✓ As good as wanted: all 1 figures" in page and "Held-out error" in page


def test_a_broken_evaluator_stops_no_other(toy_metric, tmp_path, monkeypatch, capsys):
    def broken(run, folder, options):
        raise ZeroDivisionError("by zero")

    monkeypatch.setitem(EVALUATORS, "broken", Evaluator("broken", (), broken, order=0))
    with pytest.raises(UserError, match=r"^broken failed \(above\)"):
        measure.evaluate(toy_run(tmp_path / "toy"), tmp_path / "evaluation", Options())
    found = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    assert found["metrics"]["dark"]["value"] == 1.0
    assert found["left_out"]["broken"] == "it failed: ZeroDivisionError: by zero"
    assert "Traceback" in capsys.readouterr().err  # it is code that failed, no mistake of the user's


def test_what_cannot_be_measured_again_is_kept(toy_metric, tmp_path, monkeypatch):
    """Data gone, say: the figures that they gave stay, and the user is told."""
    run, place = toy_run(tmp_path / "toy"), tmp_path / "evaluation"
    monkeypatch.setitem(NEEDS, "data", lambda run: None)
    monkeypatch.setitem(EVALUATORS, "kept", Evaluator("kept", ("data",), lambda *_: {}, order=0))
    measure.evaluate(run, place, Options())
    before = (place / "metrics.json").read_text()
    monkeypatch.setitem(NEEDS, "data", lambda run: "DIR is gone")
    with pytest.raises(UserError, match=r"cannot be measured now \(DIR is gone\)"):
        measure.evaluate(run, place, Options())
    assert (place / "metrics.json").read_text() == before
    measure.evaluate(run._replace(step=3), place, Options())  # of another step it is another evaluation


def test_metrics_json_is_the_last_file(done, prepared_root, tmp_path, monkeypatch):
    """With it, all is there: who waits for it may read the rest."""
    stood = []
    replace = measure.replace_text
    monkeypatch.setattr(measure, "replace_text", lambda path, text: (
        stood.extend(p.name for p in tmp_path.iterdir()), replace(path, text)))
    measure.evaluate(run_of(tiny_config(prepared_root)), tmp_path, Options(seed=5))
    assert {"timing.json", *ALL} - {"codes"} == set(stood)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["seed"] == 5 and found["data"]["prepared"] == str(prepared_root) and found["sampling"]


@pytest.fixture
def verb(monkeypatch):
    return import_verb("evaluate")


def test_a_folder_that_is_named_must_be_there(verb, prepared_root, monkeypatch):
    """Data that are gone are left out; a folder named by flag is not passed over."""
    run = run_of(with_data(prepared_root, prepared="/nowhere/data"))
    monkeypatch.setattr(verb.trained, "load", lambda *args: run)
    flag = SimpleNamespace(value=SimpleNamespace(data=SimpleNamespace(prepared=None, sources={})))
    monkeypatch.setattr(verb, "DATA", flag)
    assert verb.load("x", None, None).cfg.data.prepared == "/nowhere/data"
    flag.value.data.prepared = "/elsewhere"
    with pytest.raises(UserError, match=r"/elsewhere/meta\.json not found"):
        verb.load("x", None, None)


def test_data_of_another_tokenizer_are_refused(verb, prepared_root, monkeypatch):
    run = run_of(tiny_config(prepared_root))._replace(identity={"tokenizer": "another"})
    monkeypatch.setattr(verb.trained, "load", lambda *args: run)
    flag = SimpleNamespace(value=SimpleNamespace(data=SimpleNamespace(prepared=None, sources={})))
    monkeypatch.setattr(verb, "DATA", flag)
    with pytest.raises(UserError, match="trained on other data"):
        verb.load("x", None, None)
