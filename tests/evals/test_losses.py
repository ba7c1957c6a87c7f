"""Held-out losses of every source: as training measures them, every document once, beside the baselines."""

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import linen as nn

from tests.conftest import fake_encode, tiny_config
from tests.golden import write_split
from tfusion import sharding
from tfusion.config import MeshConfig
from tfusion.data import store
from tfusion.data.documents import Documents
from tfusion.data.store import Split
from tfusion.data.tokenizers import load_tokenizer
from tfusion.evals import baselines, losses, reconstructions
from tfusion.evals.base import Options
from tfusion.inference.trained import Trained
from tfusion.objectives import make_objective
from tfusion.objectives.base import Aux
from tfusion.training import loop
from tfusion.training.state import TrainState


def test_psnr_by_hand():
    dark = np.full((2, 4, 4, 3), 100, np.uint8)
    bright = np.full((2, 4, 4, 3), 110, np.uint8)
    want = 20 * math.log10(255 / 10)  # 28.13 dB: an error of 10 everywhere
    psnr = reconstructions.psnr
    assert psnr(dark, bright) == pytest.approx(want)
    assert psnr(bright, dark) == pytest.approx(want)  # bytes must not wrap around
    black, white = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
    assert psnr(black, white) == pytest.approx(0)
    assert 80 < psnr(black, black) < 100  # not infinity, which JSON does not have
    half = dark.copy()
    half[0] += 20  # 400 in one picture, 0 in the other: the errors are averaged, not the decibels
    assert psnr(dark, half) == pytest.approx(10 * math.log10(255**2 / 200))


pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def model(prepared_root):
    """(config, parameters away from their initial zeros)."""
    cfg = tiny_config(prepared_root)
    with jax.set_mesh(sharding.parse_mesh(None)):
        params = nn.meta.unbox(jax.jit(make_objective(cfg).init)(jax.random.key(0)))
    rng = np.random.default_rng(0)
    return cfg, jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32), params)


def evaluated(cfg, params, folder):
    """(figures of losses and baselines, {source: its sums})"""
    run = Trained(cfg, params, None, load_tokenizer("byte"), cfg.train.num_steps, {}, Aux(0, {}, {}))
    for name in ("losses", "baselines"):
        (folder / name).mkdir()
    with jax.set_mesh(sharding.parse_mesh(None)):
        figures = losses.run(run, folder / "losses", Options())
        figures |= baselines.run(run, folder / "baselines", Options())
    return figures, losses.read_sums(folder / "losses")


def block(folder, name, title):
    """A block of an evaluator's card."""
    (section,) = json.loads((folder / name / "card.json").read_text())["sections"]
    return next(block for block in section["blocks"] if block["title"] == title)


@pytest.fixture(scope="module")
def reported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    return *evaluated(*model, folder), folder


def replace(cfg, group, **changes):
    return dataclasses.replace(cfg, **{group: dataclasses.replace(getattr(cfg, group), **changes)})


def test_all_held_out_documents_as_training_measures_them(model, reported, one_device_mesh):
    """`train.eval_documents` is all that an evaluation in training leaves out."""
    cfg, params = model
    every = replace(cfg, "train", eval_documents=10**6)
    held = loop.Held(every, make_objective(cfg), one_device_mesh, None)
    want = held.evaluate(TrainState(np.int32(0), params, {}, None, None), {}, lambda losses: False)
    figures, sums, folder = reported
    assert sums.keys() == {"scenes", "stories", "glosses"} and sums["glosses"].mean("diffusion_loss") is None
    for source, name in itertools.product(sums, ("lm_loss", "diffusion_loss")):
        if (source, name) != ("glosses", "diffusion_loss"):
            assert sums[source].mean(name) == pytest.approx(want[f"eval/{source}/{name}"], rel=1e-5)
    assert figures["diffusion_loss"]["value"] == pytest.approx(want["eval/diffusion_loss"], rel=1e-5)
    assert figures["diffusion_loss/stories"]["value"] == sums["stories"].mean("diffusion_loss")
    assert "diffusion_loss/glosses" not in figures
    for i, group in enumerate(block(folder, "baselines", "Against the best linear predictor")["groups"]):
        assert group["values"][1] == pytest.approx(want[f"eval/diffusion_loss_bin{i}"], rel=1e-5)


def test_every_image_and_every_token_counts_once(model, reported):
    cfg, _ = model
    figures, *_ = reported
    sizes = {name: Split(cfg.data.prepared, name, "heldout").sizes(0) for name in cfg.data.sources}
    assert figures["diffusion_loss"]["n"] == sum(size[:, 1].sum() for size in sizes.values())
    for name, size in sizes.items():  # one more for EOS, one for each BOI
        text_tokens, scored = size[:, 0].sum(), size.sum() + len(size)
        assert figures[f"{name}_lm_loss"]["n"] == scored
        nats = figures[f"{name}_lm_loss"]["value"] * scored
        assert figures[f"{name}_bits_per_byte"]["n"] == text_tokens  # a token is a byte here
        assert figures[f"{name}_bits_per_byte"]["value"] == pytest.approx(
            nats / math.log(2) / text_tokens)


def test_bytes_are_those_of_the_text(cfg, tmp_path):
    """Not of the pieces, whose first one has a space that the text has not."""
    texts, tokenizer = ["a panda on a teal canvas", "caf\u00e9 \U0001f43c", "x"], load_tokenizer("default")
    image = np.zeros((32, 32, 3), np.uint8)
    write_split(tmp_path, "t", "heldout", [[texts[0], image], [texts[1]], [texts[2], image]],
                tokenizer.encode_batch, fake_encode)
    cfg = replace(cfg, "data", prepared=str(tmp_path))
    cfg = replace(cfg, "model", text_vocab_size=tokenizer.vocab_size)
    held = SimpleNamespace(source=Documents(cfg.rows, "t", "heldout"))
    assert losses.text_bytes(held, tokenizer) == sum(len(text.encode()) for text in texts)


def test_against_the_baselines(reported):
    """A model that knows nothing loses to both; each source has both."""
    figures, sums, folder = reported
    bars = block(folder, "baselines", "Against n-gram models")
    assert bars["names"] == ["unigram", "bigram", "model"]
    assert {group["name"] for group in bars["groups"]} == {"scenes", "stories", "glosses"}
    for group in bars["groups"]:
        name, (unigram, bigram, model) = group["name"], group["values"]
        assert bigram < unigram < model == sums[name].mean("lm_loss")
        for other, value in (("unigram", unigram), ("bigram", bigram)):
            assert figures[f"{name}_vs_{other}"]["value"] == pytest.approx(model - value)
    assert figures["diffusion_vs_linear"]["value"] > 1 and figures["diffusion_vs_linear"]["want"] == 0.75


def test_text_alone(model, tmp_path, capsys):
    """No images, a source that was never prepared, one without held-out records: what there is, is measured."""
    cfg, params = model
    tokenizer = load_tokenizer("byte")
    for split, texts in (("train", ["ab", "abc"]), ("heldout", ["abcd", "b"])):
        write_split(tmp_path, "words", split, [[t] for t in texts], tokenizer.encode_batch, None)
    write_split(tmp_path, "more", "train", [["ab"]], tokenizer.encode_batch, None)
    write_split(tmp_path, "more", "heldout", [], tokenizer.encode_batch, None)
    store.write_meta(tmp_path, tokenizer, "", cfg.model.latent_shape)
    spec = cfg.data.sources["glosses"]
    shares = {"words": 1.0, "more": 1.0, "never": 0.0}
    specs = {name: dataclasses.replace(spec, share=share) for name, share in shares.items()}
    cfg = replace(cfg, "data", prepared=str(tmp_path), sources=specs)
    (tmp_path / "evaluation").mkdir()
    figures, sums = evaluated(cfg, params, tmp_path / "evaluation")
    assert list(sums) == ["words"]
    assert figures.keys() == {f"words_{x}" for x in ("lm_loss", "bits_per_byte", "vs_unigram", "vs_bigram")}
    assert {figure["want"] for figure in figures.values()} == {None}  # of these data nobody knows what to want
    assert figures["words_lm_loss"]["n"] == 7 and figures["words_bits_per_byte"]["n"] == 5
    assert "'more' is not evaluated" in capsys.readouterr().out


class SameRows(list):
    def read(self, numbers):
        return [self[number] for number in numbers]


def test_rows_at_once_divide_over_the_devices(cfg):
    def rows(number, length):
        return SameRows([(np.zeros(length), np.zeros((3, 4)))] * number)

    assert losses.rows_at_once(rows(1000, 192)) == losses.POSITIONS // 192
    assert losses.rows_at_once(rows(5, 192)) == 5
    with jax.set_mesh(sharding.make_mesh(MeshConfig(2, 2, 1, 1), jax.devices()[:4])):
        assert losses.rows_at_once(rows(1000, 10**6)) == 4 and losses.rows_at_once(rows(1000, 192)) % 4 == 0
        assert losses.rows_at_once(rows(3, 192)) == 4
