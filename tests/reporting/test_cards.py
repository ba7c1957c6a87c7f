"""Cards that evaluators left: every kind of block, what does not fit together, and what is not known."""

import json

import numpy as np
import pytest

from tests.reporting.fake_run import write_card, write_fake_run, write_json
from tfusion.reporting import cards
from tfusion.reporting.records import ReportError, RunFiles


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_fake_run(tmp_path_factory.mktemp("whole"))


def shown(root, evaluator):
    """({anchor: HTML}, notes) of one evaluator's card."""
    run = RunFiles(root)
    return {name: html for name, _, html in cards.sections(run, cards.Card(run, evaluator))}, run.notes


def test_a_gallery_says_how_much_of_it_is_shown_and_right(whole):
    found, _ = shown(whole, "scenes")
    assert "All 12, in the order they came; 11 of these 12 are right" in found["pictures"]
    assert found["pictures"].count('class="tile wrong"') == 1
    assert '<small class="bad">wrong objects</small>' in found["pictures"]
    assert "The first 12 of 1,000" in found["captions"] and "a star on teal &amp; more" in found["captions"]
    assert "<i>(nothing)</i>" in found["captions"]


def test_only_so_many_pictures_are_shown(tmp_path):
    items = [{"caption": f"picture {i}"} for i in range(50)]
    block = {"kind": "gallery", "images": "a", "items": items, "of": 50}
    write_card(tmp_path / "evaluation/x", ("x", "X", block), a=np.zeros((50, 2, 2, 3), np.uint8))
    found, _ = shown(tmp_path, "x")
    assert found["x"].count("<img") == cards.SHOWN and "first 32 of 50, in the order they came." in found["x"]


def test_documents_pairs_bars_and_tables(whole, charts):
    documents = shown(whole, "documents")[0]["interleaved"]
    assert "an &lt;apple&gt; on teal" in documents and documents.count("<img") == 3
    assert documents.count("<article") == 3 and "<i>(nothing)</i>" in documents
    assert shown(whole, "reconstructions")[0]["reconstructions"].count('<div class="pair">') == 9
    baselines = shown(whole, "baselines")[0]["baselines"]
    assert baselines.startswith('<div class="cards">') and baselines.count("<svg") == 2
    assert ">glosses, bigram</text>" in baselines and ">0.83</text>" in baselines
    assert "&lt;scenes&gt;" in baselines and "3.86" in baselines and "–" in baselines


def test_a_leak_in_the_mask_is_counted(whole, tmp_path):
    assert "Not one visible pair breaks this rule." in shown(whole, "mask")[0]["mask"]
    with np.load(whole / "evaluation/mask/card.npz") as file:
        arrays = {name: file[name] for name in file.files}
    arrays["mask"][0, 1] = arrays["mask"][-1, 0] = arrays["mask"][-1, -2] = True
    (block,) = json.loads((whole / "evaluation/mask/card.json").read_text())["sections"][0]["blocks"]
    write_card(tmp_path / "evaluation/mask", ("mask", "Mask", block), **arrays)
    assert "3 visible pairs (red) break this rule." in shown(tmp_path, "mask")[0]["mask"]


def test_a_block_that_is_not_known_is_named(tmp_path):
    write_card(tmp_path / "evaluation/x", ("x", "X", {"kind": "hologram"}))
    found, notes = shown(tmp_path, "x")
    assert found == {"x": ""} and "a block of kind 'hologram', which is not known here" in notes[0][1]


@pytest.mark.parametrize(("arrays", "line"), [({}, "card.npz has no 'a'"), (
    {"a": np.zeros((3, 2, 2, 3), np.uint8)}, "3 images in card.npz, but 2 in card.json")])
def test_a_card_that_does_not_fit_its_arrays_is_damage(tmp_path, arrays, line):
    block = {"kind": "gallery", "images": "a", "items": [{"caption": "x"}] * 2, "of": 2}
    write_card(tmp_path / "evaluation/x", ("x", "X", block), **arrays)
    with pytest.raises(ReportError, match=line):
        shown(tmp_path, "x")


def test_cards_come_in_the_order_of_the_evaluation(whole, tmp_path):
    assert [card.place for card in cards.read(RunFiles(whole))] == [f"evaluation/{name}" for name in (
        "scenes", "documents", "reconstructions", "mask", "baselines", "silent")]


def test_an_older_evaluators_card_is_not_shown(tmp_path):
    """Its folder stays, its name is in metrics.json no longer."""
    for name in ("old", "new"):
        write_card(tmp_path / f"evaluation/{name}", (name, name))
    write_json(tmp_path / "evaluation/metrics.json", {"metrics": {}, "evaluators": ["new"]})
    assert [card.place for card in cards.read(RunFiles(tmp_path))] == ["evaluation/new"]
