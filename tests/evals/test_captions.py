"""CIDEr: equal to coco-caption's, and what it says of right, shifted and empty captions.

testdata/nlgeval: examples/{hyp,ref1,ref2}.txt of github.com/Maluuba/nlg-eval (MIT), whose tests state 1.242192.
"""

import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from tests.evals.test_measure import run_of, with_data
from tfusion import inference
from tfusion.evals import captions, documents, scenes
from tfusion.evals.base import LeftOut, Options
from tfusion.evals.captions import cider, figure_of

NLGEVAL = Path(__file__).parents[1] / "testdata/nlgeval"
ABSTRACT = Path(__file__).parents[3] / "shared/golden"


def test_the_published_value():
    said, *references = [(NLGEVAL / f"{name}.txt").read_text().splitlines() for name in ("hyp", "ref1", "ref2")]
    assert cider(said, list(zip(*references, strict=True))).mean() == pytest.approx(1.242192, abs=1e-6)


@pytest.mark.skipif(not (ABSTRACT / "cider_abstract48S.json").is_file(),
                    reason=f"the abstract scenes of CIDEr are not shipped; none in {ABSTRACT}")
def test_two_hundred_captions_with_48_references_each():
    references = defaultdict(list)
    for line in json.loads((ABSTRACT / "cider_abstract48S.json").read_text()):
        references[line["image_id"]].append(line["caption"])
    said = {line["image_id"]: line["caption"]
            for line in json.loads((ABSTRACT / "cider_abstract_candsB.json").read_text())}
    found = cider(list(said.values()), [references[name] for name in said])
    assert len(found) == 200 and found.mean() == pytest.approx(0.5865432078516745, abs=1e-12)


def test_right_captions_score_ten_and_others_less():
    references = [["a star on teal"], ["two moons left of a fox"], ["a panda above an owl"]]
    right = [texts[0].upper() + "." for texts in references]
    assert cider(right, references).tolist() == pytest.approx([10.0] * 3)
    assert cider(["", "so", "the end"], references).tolist() == [0.0] * 3
    shifted = cider(right[1:] + right[:1], references)
    assert 0 <= shifted.max() < 1
    near = cider(["a star on pink", *right[1:]], references)
    assert 1 < near[0] < 9 and near[1:].tolist() == pytest.approx([10.0] * 2)


def test_length_and_repetition_are_punished_by_hand():
    """A reference said twice over: its cosine is clipped, and four more pairs of words cost exp(-16 / 72)."""
    twice = cider(["a b c d a b c d", "e", "f"], [["a b c d"], ["e"], ["f"]])[0]
    # Of n words: how often each n-gram of the reference is said, and each other one.
    said = {1: ([2, 2, 2, 2], []), 2: ([2, 2, 2], [1]), 3: ([2, 2], [1, 1]), 4: ([2], [1, 1, 1])}
    cosines = [len(own) / (math.sqrt(sum(c * c for c in own + others)) * math.sqrt(len(own)))
               for own, others in said.values()]
    assert twice == pytest.approx(10 * np.mean(cosines) * math.exp(-16 / 72))


def test_a_figure_with_its_interval_and_the_level_of_not_looking():
    references = [f"a {noun} on teal" for noun in ("star", "moon", "fox", "owl", "bus")]
    found = figure_of("x", [*references[:4], "a car on teal"], references)
    assert found["n"] == 5 and found["better"] == "higher" and found["value"] == pytest.approx(800)
    half = 1.959964 * np.std([1000] * 4 + [0], ddof=1) / math.sqrt(5)
    assert (found["low"], found["high"]) == pytest.approx((800 - half, 800 + half)) and found["chance"] == 0
    alone = figure_of("x", references[:1], references[:1])
    assert alone["value"] == alone["low"] == alone["high"] == 0  # one picture has no rare words


def test_scenes_are_read_from_what_was_told(cfg, tmp_path):
    world, held, _ = scenes.held_out(cfg, 12)
    told = [scene.caption for scene in held]
    (tmp_path / "scenes").mkdir()
    verdicts = scenes.judge_captions(world, held, told)
    scenes.write_verdicts(tmp_path / "scenes" / scenes.TOLD_LINES, held, verdicts, told=told)
    found = captions.of_scenes(None, tmp_path / "captions", Options())
    assert found["cider"]["value"] == pytest.approx(1000) and found["cider"]["n"] == 12


def test_documents_are_described(monkeypatch, prepared_root, tmp_path):
    texts = ["a very red bus", "an old tree by the river", "two foxes in snow"]
    monkeypatch.setattr(captions, "pairs", lambda run, n: (texts, np.zeros((3, 4, 4, 3), np.uint8)))
    monkeypatch.setattr(inference, "decoder", lambda run: type("D", (), {
        "describe": staticmethod(lambda run, pictures: texts)}))
    run = run_of(with_data(prepared_root))
    assert captions.of_documents(run, tmp_path, Options())["cider_documents"]["value"] == pytest.approx(1000)
    monkeypatch.undo()
    assert documents.pairs is captions.pairs
    with pytest.raises(LeftOut, match="no held-out document is one text and one picture"):
        captions.of_documents(run_of(with_data(prepared_root)), tmp_path, Options())
