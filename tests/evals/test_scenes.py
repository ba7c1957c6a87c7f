"""Scoring composed scenes both ways: chance, full marks, the split, and nothing to score."""

import numpy as np
import pytest

from tfusion.data.scenes import is_held_out, make_caption, render
from tfusion.evals import scenes


def only(held, images, wanted):
    """The scenes of some relations, with their pictures."""
    chosen = [i for i, scene in enumerate(held) if scene.relation in wanted]
    assert len(chosen) > 4
    return [held[i] for i in chosen], images[chosen]


def test_held_out_scenes_are_held_out(cfg):
    world, held, images = scenes.held_out(cfg, 40)
    assert len(held) == len(images) == 40 and images.dtype == np.uint8
    assert all(map(is_held_out, held))
    assert len({scene.caption for scene in held}) == 40
    train = cfg.data.sources["scenes"].open("train")
    seen = {scene.caption for i in range(len(train)) for scene in train.scenes(i)}
    assert not seen & {scene.caption for scene in held}
    for scene, image in zip(held, images):
        np.testing.assert_array_equal(image, render(world, scene))


def test_there_are_only_so_many_held_out_scenes(cfg):
    _, held, images = scenes.held_out(cfg, 10**6)
    source = cfg.data.sources["scenes"].open("heldout")
    captions = {source.scenes(i)[0].caption for i in range(len(source))}
    assert len(held) == len(images) == len(captions) > 256 and {s.caption for s in held} == captions


def drawn_and_told(world, held, images, captions):
    """All figures, over all scenes and by class, of pictures and captions."""
    level = scenes.chance(held)
    drawn, classes = scenes.metrics("generation", scenes.DRAWN, held,
                                    scenes.judge_pictures(world, held, images), level["generation"])
    told, more = scenes.metrics("caption", scenes.TOLD, held, scenes.judge_captions(world, held, captions),
                                level["caption"])
    return drawn | told, {name: classes[name] | more[name] for name in classes}


def values(metrics, key="value"):
    return {name: m[key] for name, m in metrics.items()}


def test_chance_is_that_of_a_model_that_does_not_listen(cfg):
    """The share of right answers over all pairs of different scenes, pictures and captions really scored."""
    world, held, images = scenes.held_out(cfg, 24)
    level, n = scenes.chance(held), len(held)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    drawn = scenes.judge_pictures(world, [held[i] for i, _ in pairs], images[[j for _, j in pairs]])
    told = scenes.judge_captions(world, [held[i] for i, _ in pairs], [held[j].caption for _, j in pairs])
    for prefix, verdicts in (("generation", drawn), ("caption", told)):
        for name in level[prefix]:
            if name != "relation":
                want = np.mean([v[name] for v in verdicts])
                assert level[prefix][name].mean() == pytest.approx(want), (prefix, name)
    assert 0.03 < level["generation"]["canvas"].mean() < 0.3
    assert 0 < level["generation"]["sprites"].mean() < 0.05


@pytest.mark.parametrize("n", [2, 3, 4])
def test_chance_never_pairs_a_scene_with_itself(cfg, n):
    level = scenes.chance(scenes.held_out(cfg, n)[1])
    for name in ("all", "exact"):
        assert level["caption"][name].tolist() == [0] * n


def test_one_scene_alone_has_no_chance_level(cfg):
    world, held, images = scenes.held_out(cfg, 1)
    metrics, _ = drawn_and_told(world, held, images, [held[0].caption])
    assert metrics["generation_canvas"]["chance"] is None and metrics["generation_canvas"]["value"] == 1


def test_perfect_pictures_and_captions_get_full_marks(cfg):
    world, held, images = scenes.held_out(cfg, 60)
    metrics, classes = drawn_and_told(world, held, images, [s.caption for s in held])
    assert set(values(metrics).values()) == {1.0} and len(metrics) == 8
    related = sum(s.relation != "" for s in held)
    assert metrics["generation_relation"]["n"] == metrics["caption_relation"]["n"] == related < 60
    assert list(classes) == ["one", "two", "left of", "above"]
    for name, relation in (("one", ""), ("two", "two"), ("left of", "left of"), ("above", "above")):
        assert values(classes[name]) == {"generation_all": 1.0, "caption_all": 1.0, "caption_exact": 1.0}
        assert set(values(classes[name], "n").values()) == {sum(s.relation == relation for s in held)}
    twos = sum(s.relation == "two" for s in held)
    assert metrics["generation_relation"]["chance"] == pytest.approx(0.25 + 0.25 * twos / related)
    assert metrics["caption_relation"]["chance"] == pytest.approx(0.25 + (1 / 3 - 0.25) * twos / related)


def test_wrong_pictures_and_captions_do_not(cfg):
    world, held, images = scenes.held_out(cfg, 60)
    held, images = only(held, images, ("left of",))
    mirrored = np.stack([render(world, s._replace(positions=s.positions[::-1])) for s in held])
    told = [s.caption.replace("left of", "above") for s in held]
    metrics, classes = drawn_and_told(world, held, mirrored, told)
    assert values(metrics) == {
        "generation_canvas": 1, "generation_sprites": 1, "generation_relation": 0, "generation_all": 0,
        "caption_canvas": 1, "caption_relation": 0, "caption_all": 0, "caption_exact": 0}
    assert values(classes["left of"]) == {"generation_all": 0, "caption_all": 0, "caption_exact": 0}
    assert values(classes["two"]) == {"generation_all": None, "caption_all": None, "caption_exact": None}


def test_two_of_a_kind_misnamed_count_everywhere(cfg):
    """'A star left of a star' for two stars: wrong as a relation, as a whole, and in its class."""
    world, held, images = scenes.held_out(cfg, 60)
    told = [s.caption if s.relation != "two" else make_caption(s.canvas, s.nouns, "left of") for s in held]
    metrics, classes = drawn_and_told(world, held, images, told)
    twos, n = sum(s.relation == "two" for s in held), len(held)
    related = sum(s.relation != "" for s in held)
    assert twos > 2
    assert metrics["caption_all"]["value"] == metrics["caption_exact"]["value"] == pytest.approx(1 - twos / n)
    assert metrics["caption_relation"]["value"] == pytest.approx(1 - twos / related)
    assert classes["two"]["caption_all"]["value"] == 0 and classes["above"]["caption_all"]["value"] == 1


@pytest.mark.parametrize("wanted", [("",), ("two", "left of", "above")])
def test_nothing_to_say_of_relations(cfg, wanted):
    """Scenes without a relation to score, or none drawn and told well enough: no value, and no crash."""
    world, held, images = scenes.held_out(cfg, 90)
    held, images = only(held, images, wanted)
    captions = [s.caption for s in held]
    if "left of" in wanted:
        images, captions = np.zeros_like(images), [""] * len(held)
    metrics, _ = drawn_and_told(world, held, images, captions)
    for metric in (metrics["generation_relation"], metrics["caption_relation"]):
        assert metric["value"] is None and metric["n"] == 0 and metric["low"] is metric["high"] is None
