"""Scoring composed scenes both ways: chance, full marks, the split, and nothing to score."""

import jax
import numpy as np
import pytest

from tfusion.data.scenes import CANVASES, is_held_out, render
from tfusion.data.sources import scenes as scenes_source
from tfusion.evals import scenes
from tfusion.inference import decode

LEVEL = {"canvas": 0.1, "sprites": 0.2, "relation": 0.25, "caption_canvas": 0.3, "caption_all": 0.4}


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
    train = scenes_source(cfg.data, "train")
    seen = {scene.caption for i in range(len(train)) for scene in train.scenes(i)}
    assert not seen & {scene.caption for scene in held}
    for scene, image in zip(held, images):
        np.testing.assert_array_equal(image, render(world, scene))


def test_there_are_only_so_many_held_out_scenes(cfg):
    _, held, images = scenes.held_out(cfg, 10**6)
    source = scenes_source(cfg.data, "heldout")
    captions = {source.scenes(i)[0].caption for i in range(len(source))}
    assert len(held) == len(images) == len(captions) > 256 and {s.caption for s in held} == captions


def test_chance_is_that_of_a_model_that_does_not_listen(cfg):
    world, held, images = scenes.held_out(cfg, 64)
    level = scenes.chance(world, held, images)
    by_count = sum((sum(s.canvas == c for s in held) / 64) ** 2 for c in CANVASES)  # about 1 in 8
    assert level["canvas"] == pytest.approx(by_count, abs=0.08)
    assert 0.03 < level["canvas"] < 0.3
    assert level["caption_canvas"] == level["canvas"]  # the same pairs of scenes, right on both sides
    assert 0 <= level["sprites"] < 0.05 and 0 <= level["caption_all"] < 0.05


@pytest.mark.parametrize("n", [7, 14, 28])
def test_chance_never_pairs_a_scene_with_itself(cfg, n):
    world, held, images = scenes.held_out(cfg, n)
    level = scenes.chance(world, held, images)
    assert level["caption_all"] < 0.15 and level["canvas"] < 0.5


def test_perfect_pictures_and_captions_get_full_marks(cfg):
    world, held, images = scenes.held_out(cfg, 60)
    verdicts, drawn = scenes.generation_metrics(world, held, images, LEVEL)
    assert len(verdicts) == 60
    assert {name: m["value"] for name, m in drawn.items()} == {
        "generation_canvas": 1.0, "generation_sprites": 1.0, "generation_relation": 1.0}
    verdicts, told = scenes.caption_metrics(world, held, [s.caption for s in held], LEVEL)
    assert len(verdicts) == 60
    assert {name: m["value"] for name, m in told.items()} == {
        "caption_canvas": 1.0, "caption_all": 1.0, "caption_relation": 1.0, "caption_exact": 1.0}
    pairs = sum(s.relation in ("left of", "above") for s in held)  # 'two' says nothing of order
    assert drawn["generation_relation"]["n"] == told["caption_relation"]["n"] == pairs < 60
    chances = {name: m["chance"] for name, m in (drawn | told).items()}
    assert chances == {"generation_canvas": 0.1, "generation_sprites": 0.2, "generation_relation": 0.25,
                       "caption_canvas": 0.3, "caption_all": 0.4, "caption_relation": 0.25,
                       "caption_exact": None}


def test_wrong_pictures_and_captions_do_not(cfg):
    world, held, images = scenes.held_out(cfg, 60)
    held, images = only(held, images, ("left of",))
    mirrored = [s._replace(positions=s.positions[::-1]) for s in held]
    _, drawn = scenes.generation_metrics(world, held, np.stack([render(world, s) for s in mirrored]), LEVEL)
    assert drawn["generation_sprites"]["value"] == 1 and drawn["generation_relation"]["value"] == 0
    told = [s.caption.replace("left of", "above") for s in held]
    _, told = scenes.caption_metrics(world, held, told, LEVEL)
    assert told["caption_all"]["value"] == 1 and told["caption_relation"]["value"] == 0
    assert told["caption_exact"]["value"] == 0


@pytest.mark.parametrize("wanted", [("", "two"), ("left of", "above")])
def test_nothing_to_say_of_relations(cfg, wanted):
    """Scenes without a relation to score, or none drawn and told well enough: no value, and no crash."""
    world, held, images = scenes.held_out(cfg, 60)
    held, images = only(held, images, wanted)
    captions = [s.caption for s in held]
    if "left of" in wanted:
        images, captions = np.zeros_like(images), [""] * len(held)
    _, drawn = scenes.generation_metrics(world, held, images, LEVEL)
    _, told = scenes.caption_metrics(world, held, captions, LEVEL)
    for metric in (drawn["generation_relation"], told["caption_relation"]):
        assert metric["value"] is None and metric["n"] == 0 and metric["low"] is metric["high"] is None


def test_chunks_have_one_shape_and_keep_the_order(cfg, monkeypatch):
    asked = []

    def generate(cfg, params, prompts, **options):
        asked.append((len(prompts), options))
        return [[prompt[0] * 10] for prompt in prompts]

    monkeypatch.setattr(decode, "generate", generate)
    n = scenes.CHUNK + 5
    out = scenes.in_chunks(cfg, None, [[np.array([i])] for i in range(n)], "title", seed=3)
    assert [int(parts[0][0]) for parts in out] == [10 * i for i in range(n)]
    assert [size for size, _ in asked] == [scenes.CHUNK] * 2
    assert all(options["seed"] == 3 for _, options in asked)
    assert [options["first_row"] for _, options in asked] == [0, scenes.CHUNK]


def test_every_prompt_has_noise_of_its_own_whatever_the_chunk(cfg, monkeypatch):
    """What a row is keyed by, over two chunks and over one: all different, and the same both times."""

    def generate(cfg, params, prompts, **options):
        rows = decode.start_rows(cfg, prompts, options["seed"], 8, options["first_row"])
        return [bytes(key) for key in np.asarray(jax.random.key_data(rows.key_B))]

    monkeypatch.setattr(decode, "generate", generate)
    keys = []
    for size in (4, 9):
        monkeypatch.setattr(scenes, "CHUNK", size)
        keys.append(scenes.in_chunks(cfg, None, [[np.array([5])]] * 9, "title", seed=3))
    assert len(set(keys[0])) == 9 and keys[0] == keys[1]
