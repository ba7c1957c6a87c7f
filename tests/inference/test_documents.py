"""What a trained Transfusion can do: chunks of one shape, noise of each prompt's own, documents both ways."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tfusion import inference
from tfusion.data import layout
from tfusion.data.tokenizers import load_tokenizer
from tfusion.inference import documents, transfusion, writing
from tfusion.inference.trained import Trained
from tfusion.objectives.base import Aux

LATENT = np.zeros((4, 4, 4), np.float32)
CODEC = SimpleNamespace(
    image_size=32, encode=lambda images: np.stack([LATENT + x.mean() for x in images]),
    decode=lambda latents: np.stack([np.full((2, 2, 3), x.mean(), np.uint8) for x in latents]))


@pytest.fixture
def run(cfg):
    return Trained(cfg, {}, CODEC, load_tokenizer("byte"), 1, {}, Aux(1, {}, {}))


def test_a_run_can_what_it_has_the_parts_for(run):
    everything = {"draw", "describe", "go_on", "reconstruct"}
    assert inference.can(run) == everything and inference.decoder(run).image_size == 32
    assert inference.can(run._replace(codec=None)) == {"go_on"}
    assert inference.can(run._replace(tokenizer=None)) == set()


def test_chunks_have_one_shape_and_keep_the_order(run, monkeypatch):
    asked = []

    def generate(cfg, params, prompts, **options):
        asked.append((len(prompts), options))
        return [[prompt[0] * 10] for prompt in prompts]

    monkeypatch.setattr(transfusion, "generate", generate)
    n = documents.CHUNK + 5
    out = documents.in_chunks(run, [[np.array([i])] for i in range(n)], "title", seed=3)
    assert [int(parts[0][0]) for parts in out] == [10 * i for i in range(n)]
    assert [size for size, _ in asked] == [documents.CHUNK] * 2
    assert all(options["seed"] == 3 for _, options in asked)
    assert [options["first_row"] for _, options in asked] == [0, documents.CHUNK]


def test_every_prompt_has_noise_of_its_own_whatever_the_chunk(run, monkeypatch):
    """What a row is keyed by, over two chunks and over one: all different, and the same both times."""

    def generate(cfg, params, prompts, **options):
        rows = writing.start_rows(cfg, prompts, options["seed"], 8, options["first_row"])
        return [bytes(key) for key in np.asarray(jax.random.key_data(rows.key_B))]

    monkeypatch.setattr(transfusion, "generate", generate)
    keys = []
    for size in (4, 9):
        monkeypatch.setattr(documents, "CHUNK", size)
        keys.append(documents.in_chunks(run, [[layout.text([5])]] * 9, "title", seed=3))
    assert len(set(keys[0])) == 9 and keys[0] == keys[1]


def test_documents_go_in_and_come_out_as_words_and_pictures(run, monkeypatch):
    """Their order is kept: pictures are coded together, and each comes back where it stood."""

    def generate(cfg, params, prompts, **options):
        seen.append((prompts, options))
        return answers

    seen, answers = [], [[layout.image(LATENT + 7), layout.text([98, 99]), layout.image(LATENT + 9)], []]
    monkeypatch.setattr(transfusion, "generate", generate)
    pictures = [np.full((32, 32, 3), value, np.uint8) for value in (3, 5)]
    out = documents.go_on(run, [["ab", pictures[0]], [pictures[1]]], seed=2, draw_first=True)
    (first, second), options = seen[0]
    assert options["seed"] == 2 and options["max_images"] is None
    assert [part.kind for part in first] == ["text", "image", "text"] and len(second) == 2
    assert first[1].values.mean() == 3 and second[0].values.mean() == 5
    assert first[2].values.tolist() == second[1].values.tolist() == [run.cfg.vocabulary.boi]
    (picture, words, other), nothing = out
    assert picture.mean() == 7 and other.mean() == 9 and isinstance(words, str) and nothing == []
    answers[:] = [[layout.text([98])]]
    assert documents.go_on(run._replace(codec=None), [["ab"]]) == [[words[0]]]
    assert seen[1][1]["max_images"] == 0
