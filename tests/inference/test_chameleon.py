"""Decoding of codes: exactly N of the image's ids and EOI after BOI, by the model's own probabilities; a row's
result does not depend on its neighbours.

Two tiny models: `random_params`, every parameter alive, and `bigram`, whose next token is a table of the
current one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.codes import ColourCodec, K, N
from tests.conftest import tiny_chameleon
from tests.inference import written
from tests.inference.written import described, parts_of
from tfusion import config, inference
from tfusion.data.tokenizers import load_tokenizer
from tfusion.errors import UserError
from tfusion.inference import chameleon, documents, writing
from tfusion.inference.trained import Trained
from tfusion.models.language import LanguageModel
from tfusion.objectives import make_objective
from tfusion.objectives.base import Aux
from tfusion.types import BOS, EOS, PAD

SAMPLING = {"sampling.temperature": 1.0, "sampling.top_p": 1.0, "sampling.guidance_scale": 2.0}
CFG = tiny_chameleon("unused", **SAMPLING)
MODEL, I = LanguageModel(CFG.model, CFG.data.seq_len), CFG.rows.image_slots
BOI, EOI, CODE = CFG.vocabulary.boi, CFG.vocabulary.eoi, CFG.vocabulary.first_code
A, B, C = 10, 11, 12  # text ids
T, ROWS = 48, 3  # one shape for all tests, so that each function compiles once


pytestmark = pytest.mark.usefixtures("quick_compiles")


def filled(fn):
    """Parameters by fn(name, shape)."""
    shapes = nn.unbox(jax.eval_shape(make_objective(CFG).init, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(
        lambda path, x: np.asarray(fn(path[-1].key, x.shape), np.float32), shapes)


@functools.cache
def random_params():
    rng = np.random.default_rng(0)
    return filled(lambda name, shape: rng.standard_normal(shape) * (
        shape[-2] ** -0.5 if name.endswith("kernel") else 1))


def bigram(table: dict):
    """{token: (best, second best ...)}; after any other token comes EOS."""
    params = filled(lambda name, shape: np.full(shape, float(name == "final_norm_scale")))
    for dim, (token, after) in enumerate(table.items()):
        params["token_embedding"][token, dim] = 1.0
        for rank, choice in enumerate(after):
            params["lm_head_kernel"][dim, choice] = 10.0 - rank
    return params


def generate(params, prompts, cfg=CFG, rows: int = ROWS, **options):
    return written.generate(chameleon, cfg, params, prompts, rows, **{"max_len": T} | options)


def picture(seed: int = 0):
    return np.random.default_rng(seed).integers(0, K, (4, 4), np.int32)


def start_rows(*prompts):
    return writing.start_rows(CFG, list(map(parts_of, prompts)), 3, T)


def draw(rows, scale: float = 1.0, temperature: float = 1.0, top_p: float = 1.0, params=None):
    return chameleon.draw_images(MODEL, scale != 1, random_params() if params is None else params, rows,
                                 *map(jnp.float32, (temperature, top_p, scale)))


# ---------------------------------------------------------------- what is written

def test_exactly_n_codes_of_the_images_ids_then_eoi():
    """Though the model would rather say EOS: after BOI codes alone, EOI forced, and text goes on, which has no
    codes."""
    table = {BOS: (A,), A: (BOI,), BOI: (EOS, B, CODE + 3), CODE + 3: (EOI, CODE + 4), CODE + 4: (B, CODE + 3),
             EOI: (CODE, PAD, BOS, EOI, CODE + K, C), C: (EOS,)}
    rows = draw(start_rows([[A, BOI]], [[A]], [[B, BOI]]), temperature=0.0, params=bigram(table))
    codes = [CODE + 3, CODE + 4] * (N // 2)
    assert rows.tokens_BT[0, : 4 + N].tolist() == [BOS, A, BOI, *codes, EOI]
    assert rows.image_ids_BT[0].tolist() == [0] * 3 + [1] * N + [0] * (T - 3 - N)
    assert rows.length_B.tolist() == [4 + N, 2, 4 + N] and rows.image_start_BI[:, 0].tolist() == [3, T, 3]
    assert rows.tokens_BT[1].tolist() == [BOS, A] + [PAD] * (T - 2)
    cfg = config.changed(CFG, {"sampling.temperature": 0.0, "sampling.guidance_scale": 1.0})
    (words, made, after), = generate(bigram(table), [[]], cfg)
    assert (words.tolist(), made.ravel().tolist(), after.tolist()) == ([A], [3, 4] * (N // 2), [C])


def test_codes_are_any_and_stay_in_range():
    rows = draw(start_rows([[A, BOI]], [[B, BOI]], [[C, BOI]]))
    made = np.asarray(rows.tokens_BT)[:, 3 : 3 + N] - CODE
    assert ((made >= 0) & (made < K)).all() and len(np.unique(made)) > K / 2
    assert (np.asarray(rows.tokens_BT)[:, 3 + N] == EOI).all()


def test_several_images_and_their_limits():
    params = bigram({BOS: (A,), A: (BOI,), EOI: (B,), B: (BOI, C), C: (EOS,)})
    most = min(I, (T - 2) // (N + 3))
    assert described(generate(params, [[]])[0]) == [[A], "image", *[[B], "image"] * (most - 1), [B, C]]
    assert described(generate(params, [[]], max_images=1)[0]) == [[A], "image", [B]]
    assert described(generate(params, [[]], max_images=0)[0]) == [[A]]
    exact = [A] * (T - (N + 2) - 1)
    assert described(generate(params, [[[*exact, BOI]]])[0]) == ["image"]
    with pytest.raises(UserError, match="no room for an image"):
        generate(params, [[[*exact, A, BOI]]])


# ---------------------------------------------------------------- by which probabilities

def full_logits(rows, tokens_BT):
    """Of whole rows, by one pass: (B, T, K), of codes."""
    rows = rows._replace(tokens_BT=tokens_BT, length_B=jnp.full(len(tokens_BT), T))
    h_BTD = MODEL.apply({"params": random_params()}, tokens_BT, writing.sight(MODEL, rows))
    logits = MODEL.apply({"params": random_params()}, h_BTD, method="logits")
    return np.asarray(logits)[..., CODE : CODE + K]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_cached_drawing_is_the_full_forward(scale):
    """Greedy, after prompts of unequal lengths, one with a picture: each code is the likeliest by a pass over
    the finished row, and of one over `<bos> <boi> codes` where there is guidance."""
    start = start_rows([[A, B, C, BOI]], [[B], picture(), [C, BOI]], [[BOI]])
    rows, begin = draw(start, scale, temperature=0.0), np.asarray(start.length_B)
    tokens = np.asarray(rows.tokens_BT)
    codes = np.stack([row[at : at + N] for row, at in zip(tokens, begin)])
    alone = np.full((ROWS, T), PAD)
    alone[:, : 2 + N] = np.concatenate([np.tile([BOS, BOI], (ROWS, 1)), codes], axis=1)
    cond, plain = full_logits(rows, rows.tokens_BT), full_logits(rows, jnp.asarray(alone))
    for row, at in enumerate(begin):
        z = cond[row, at - 1 : at - 1 + N]
        z = plain[row, 1 : 1 + N] + scale * (z - plain[row, 1 : 1 + N])
        np.testing.assert_array_equal(codes[row] - CODE, z.argmax(-1))
    assert not np.array_equal(codes[0], codes[1])


def test_guidance_one_is_no_guidance():
    """The program that compares, at scale 1, draws what the one without does; at 0 the prompt is not seen."""
    start = start_rows([[A, BOI]], [[B, BOI]], [[C, BOI]])

    def guided(start, scale):
        return chameleon.draw_images(MODEL, True, random_params(), start, *map(jnp.float32, (0.0, 1.0, scale)))

    plain, three = draw(start, 1.0, temperature=0.0).tokens_BT, guided(start, 3.0).tokens_BT
    np.testing.assert_array_equal(guided(start, 1.0).tokens_BT, plain)
    assert (np.asarray(three) != np.asarray(plain)).any()
    nothing = np.asarray(guided(start, 0.0).tokens_BT)[:, 3 : 3 + N]
    assert (nothing == nothing[0]).all() and (np.asarray(plain)[:, 3 : 3 + N] != nothing).any()


def test_codes_are_drawn_by_their_probabilities():
    """Temperature and top-p by hand: p = .5, .3, .15, .05."""
    p = np.array([0.15, 0.5, 0.05, 0.3])
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.jit(jax.vmap(chameleon.draw_code, (0, None, None, None)))

    def shares(temperature, top_p):
        return np.bincount(draw(keys, jnp.log(p) + 7, temperature, top_p), minlength=4) / len(keys)

    np.testing.assert_allclose(shares(1.0, 1.0), p, atol=0.03)
    np.testing.assert_allclose(shares(0.5, 1.0), p**2 / (p**2).sum(), atol=0.03)
    np.testing.assert_allclose(shares(1.0, 0.79), [0, 0.625, 0, 0.375], atol=0.03)  # .5 alone does not reach it
    np.testing.assert_allclose(shares(1.0, 0.81), [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95], atol=0.03)
    for temperature, top_p in ((1.0, 0.01), (0.0, 1.0)):
        assert shares(temperature, top_p).tolist() == [0, 1, 0, 0]


# ---------------------------------------------------------------- rows are independent

def some_prompts():
    return [[[A, B, C, BOI]], [[A], picture(1), [B, BOI]], [[BOI]]]


def test_a_row_does_not_depend_on_its_neighbours_nor_on_the_chunk():
    """Text and codes drawn at temperature 1; the same prompt as another number draws something else."""
    options = dict(seed=5, temperature=1.0, max_new_tokens=4, max_images=1)
    together = generate(random_params(), some_prompts(), **options)
    assert all(described(parts)[0] == "image" for parts in together)
    for row, prompt in enumerate(some_prompts()):
        alone = generate(random_params(), [prompt], first_row=row, **options)[0]
        assert described(alone) == described(together[row])
        for x, y in zip(alone, together[row]):
            np.testing.assert_array_equal(x, y)
    same = generate(random_params(), [some_prompts()[0]] * ROWS, **options)
    assert len({parts[0].tobytes() for parts in same}) == ROWS


def test_a_second_image_is_drawn_anew():
    """A model without preferences: the same key would draw the same codes for ever."""
    params = bigram({BOS: (A,), A: (BOI,), EOI: (B,), B: (BOI,)})
    (_, first, _, second), *_ = [parts[:4] for parts in generate(params, [[]])]
    assert len(set(first.ravel())) > 4 and not np.array_equal(first, second)


# ---------------------------------------------------------------- in words and pictures

def test_a_run_draws_describes_and_goes_on(monkeypatch):
    """documents.py, the same as for latents: pictures go in as codes and come out decoded."""
    cfg = config.changed(CFG, {"data.seq_len": T})
    run = Trained(cfg, random_params(), ColourCodec(), load_tokenizer("byte"), 1, {}, Aux(1, {}, {}))
    assert inference.can(run) == {"draw", "describe", "go_on", "reconstruct", "codes"}
    monkeypatch.setattr(documents, "CHUNK", 2)
    monkeypatch.setattr(documents, "MAX_CAPTION_TOKENS", 4)
    drawn = documents.draw(run, ["ab", "abc", "a"], seed=1)
    assert drawn.shape == (3, 32, 32, 3) and (documents.reconstruct(run, drawn) == drawn).all()
    assert len(documents.describe(run, drawn)) == 3
    parts, = documents.go_on(run, [["ab", drawn[0]]], seed=1, max_images=1, draw_first=True)
    assert parts[0].shape == (32, 32, 3)
