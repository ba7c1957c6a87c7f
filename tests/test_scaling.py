"""The ladders of experiments/scaling.py: what the two recipes are given alike."""

import functools
import types

import numpy as np
import pytest

from experiments import ablations, scaling
from tfusion import config
from tfusion.data import documents, rows, store
from tfusion.data.tokenizers import load_tokenizer
from tfusion.objectives import kind_of
from tfusion.scaling import ladder, paper, points

WINDOWS = 12


@functools.cache
def sizes(name: str) -> np.ndarray:
    """Text tokens and images of a source's first records, as they are."""
    spec = config.from_dict(scaling.get_config()).data.sources[name]
    records, number = spec.open("train", 32), {"scenes": 8000, "stories": 2000, "glosses": 8000}[name]
    step = max(1, len(records) // number)
    if name == "glosses":
        parts = [records[i] for i in range(0, number * step, step)]
    else:
        parts = [[scene.caption for scene in records.scenes(i)] for i in range(number)]
    tokens = iter(load_tokenizer("default").encode_batch([text for texts in parts for text in texts]))
    return np.array([(sum(len(next(tokens)) for _ in texts), 0 if name == "glosses" else len(texts))
                     for texts in parts], np.int32)


class Sizes:
    """A split of which only the sizes are there."""

    def __init__(self, root, name: str, split: str):
        self.folder, self.image_shape, found = f"{root}/{name}/{split}", None, sizes(name)
        self.shards = [types.SimpleNamespace(records=len(found), text_tokens=int(found[:, 0].sum()),
                                             images=int(found[:, 1].sum()), max_token_id=3)]
        self.digest = ""

    def __len__(self) -> int:
        return self.shards[0].records

    def sizes(self, shard) -> np.ndarray:
        return sizes(self.folder.split("/")[-2])


@pytest.fixture
def packed(monkeypatch):
    """(recipe) -> the rows of the pack's ladder, planned on real sizes."""
    monkeypatch.setattr(documents, "Split", Sizes)
    monkeypatch.setattr(rows, "read_meta", lambda format: {"tokenizer": "", "codec": ""})
    monkeypatch.setattr(store, "assets", lambda root: [])
    return lambda words: kind_of(cfg := make(words)).open_rows(cfg)


def make(words: str):
    return config.from_dict(scaling.get_config(words))


def offered(found, windows: int) -> dict[str, list]:
    """{source: (epoch, record) in the order in which the run offers them}"""
    every = [found.offered(window) for window in range(windows)]
    return {source.name: [pair for c in every for pair in zip(c.epochs[c.sources == k].tolist(),
                                                              c.records[c.sources == k].tolist())]
            for k, source in enumerate(found.sources)}


def test_the_nth_record_that_is_offered_is_the_same_for_both_recipes(packed):
    ours, theirs = offered(packed("transfusion"), 6), offered(packed("chameleon"), 6)
    for name in ours:
        number = min(len(ours[name]), len(theirs[name]))
        assert number > 100 and ours[name][:number] == theirs[name][:number]
    assert len(ours["scenes"]) > 2 * len(theirs["scenes"])  # within as many positions
    assert len(ours["glosses"]) == pytest.approx(len(theirs["glosses"]), abs=2)


def dropped(found) -> dict[str, float]:
    """{source: share of its documents that no window took}"""
    lost, of = np.zeros(3), np.zeros(3)
    for window in range(1, WINDOWS):
        lost += np.bincount(found.plan(window).dropped, minlength=3)
        of += np.bincount(found._own(window - 1).offered.sources, minlength=3)
    return {source.name: share for source, share in zip(found.sources, lost / of)}


def test_both_recipes_drop_as_many_documents_of_each_source(packed):
    ours, theirs = dropped(packed("transfusion")), dropped(packed("chameleon"))
    for name in ours:
        assert abs(ours[name] - theirs[name]) <= 0.005 and max(ours[name], theirs[name]) < 0.02


def test_matched_images_are_matched_and_so_are_the_texts(packed):
    cfgs = [make(words) for words in ("transfusion", "chameleon,images")]
    steps = [cfg.train.num_steps for cfg in cfgs]
    records = [np.array(packed(words).mixture.records[0]) for words in ("transfusion", "chameleon,images")]
    np.testing.assert_allclose(records[0] * steps[0], records[1] * steps[1], rtol=0.01)
    assert steps[1] > 2 * steps[0]
    assert make("chameleon").train.num_steps == steps[0]  # by FLOPs, without the word


@pytest.mark.parametrize("ladder_name", ["pack", "paper"])
def test_sizes_cost_both_recipes_the_same_and_differ_enough(ladder_name):
    axis = []
    for size in scaling.LADDERS[ladder_name][1]:
        ours, theirs = (ladder.cost(make(f"{ladder_name},{recipe},{size}"))
                        for recipe in ("transfusion", "chameleon"))
        assert ours[1:] == theirs[1:]  # tokens, N and 6 N D
        axis.append(ours.six_n_d)
    assert sorted(axis) == axis and axis[-1] / axis[0] >= 16


def test_the_papers_ladder_has_its_sizes_tokens_and_rates():
    """Table 2 with both embeddings, 0.5T tokens, 3e-4 and 1e-4."""
    n = {size: ladder.cost(make(f"paper,{size}")).params / 1e6 for size in ("0.16b", "0.76b", "7b")}
    assert n == pytest.approx({"0.16b": 162.4, "0.76b": 777.9, "7b": 6738.4}, rel=2e-4)
    for recipe, rate in (("transfusion", 3e-4), ("chameleon", 1e-4)):
        cfg = make(f"paper,{recipe},7b")
        assert cfg.optimizer.learning_rate == rate and cfg.optimizer.ema_decay == 0
        assert ladder.cost(cfg).tokens == pytest.approx(0.5e12, rel=0.05)


def test_both_arms_of_the_pack_are_trained_alike():
    ours, theirs = make("transfusion,s2"), make("chameleon,s2")
    assert ours.optimizer.ema_decay == theirs.optimizer.ema_decay == 0
    assert ours.train == theirs.train and ours.process.prediction == "v"
    alike = ("seq_len", "window_rows", "caption_dropout", "image_first_fraction", "sources", "tokenizer")
    assert all(getattr(ours.data, key) == getattr(theirs.data, key) for key in alike)


def test_the_packs_sweep_is_26_runs_and_what_they_need():
    parts = [point["tags"]["part"] for point in scaling.get_sweep("pack")]
    assert {part: parts.count(part) for part in set(parts)} == {"data": 4, "lr": 8, "ladder": 16, "process": 2}
    assert parts[:4] == ["data"] * 4 and parts[4:12] == ["lr"] * 8


def test_the_ablations_sweep_is_every_linear_row_of_the_papers_tables(tmp_path):
    made = points.make(ablations.get_sweep(), "x", tmp_path)
    rows = sorted((table, row) for point in made for table, row in point.tags["tables"].items())
    assert rows == sorted((table, row) for table, (_, theirs) in paper.TABLES.items() for row in theirs)
    strict = points.make(ablations.get_sweep("strict"), "x", tmp_path)
    assert [point.name for point in strict] == [point.name for point in made]
    assert all(point.resolved["optimizer"]["ema_decay"] == 0 for point in strict)


@pytest.mark.parametrize(("recipe", "sources"), [
    ("text_only", {"glosses"}), ("image_only", {"scenes", "stories"})])
def test_a_reference_sees_the_records_of_its_modality_that_the_ladder_sees(packed, recipe, sources):
    both, alone = packed("transfusion"), packed(recipe)
    assert {source.name for source in alone.sources} == sources
    steps = {words: make(words).train.num_steps for words in ("transfusion", recipe)}
    taken = {words: dict(zip([source.name for source in found.sources], np.array(found.mixture.records[0])
                             * steps[words])) for words, found in (("transfusion", both), (recipe, alone))}
    for name in sources:
        assert taken[recipe][name] == pytest.approx(taken["transfusion"][name], rel=0.02)
