"""Decoding: when it writes, when it draws, when it stops; a row's result does not depend on its neighbours.

Two tiny models: `random_params`, every parameter alive, and `bigram`, whose next token is a table of the
current one, so that each behaviour can be called up.
"""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.conftest import tiny_config
from tfusion.data import packing
from tfusion.diffusion import sampler
from tfusion.errors import UserError
from tfusion.inference import decode
from tfusion.models import lm_head
from tfusion.models.transfusion import Transfusion
from tfusion.objectives import make_objective
from tfusion.types import BOS, EOS, PAD, Document

CFG = tiny_config("unused")  # DDPM, as it draws noise at every step
CFG = dataclasses.replace(CFG, sampling=dataclasses.replace(CFG.sampling, sampler="ddpm"))
MODEL, N, I = CFG.model, CFG.model.num_patches, CFG.image_slots
BOI, EOI = MODEL.boi, MODEL.eoi
A, B, C, D = 10, 11, 12, 13  # text ids
STEPS = CFG.sampling.num_inference_steps
T, ROWS = 48, 3  # one shape for all tests, so that each function compiles once


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def abstract_params():
    return nn.meta.unbox(jax.eval_shape(make_objective(CFG).init, jax.random.key(0)))


def filled(fn):
    """Parameters by fn(name, shape)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: np.asarray(fn(path[-1].key, x.shape), np.float32), abstract_params())


@pytest.fixture
def random_params():
    return make_random_params()


@cache
def make_random_params():
    rng = np.random.default_rng(0)

    def value(name, shape):
        noise = rng.standard_normal(shape)
        if name.endswith("scale"):
            return 1 + 0.1 * noise
        return noise if name == "token_embedding" else noise / np.sqrt(shape[-2] if len(shape) > 1 else 10)

    return filled(value)


def bigram(table: dict):
    """{token: next} or {token: (best, second best)}; after any other token comes EOS. Latents stay noise."""
    params = filled(lambda name, shape: np.ones(shape) if name.endswith("scale") else np.zeros(shape))
    for dim, (token, after) in enumerate(table.items()):
        params["token_embedding"][token, dim] = 1.0
        for rank, choice in enumerate(after if isinstance(after, tuple) else (after,)):
            params["lm_head_kernel"][dim, choice] = 10.0 - rank
    return params


def generate(params, prompts, **options):
    """One list of parts per prompt; padded with empty prompts to the shape that is compiled."""
    padded = [*prompts, *[[]] * (ROWS - len(prompts))]
    return decode.generate(CFG, params, padded, max_len=T, **options)[: len(prompts)]


def described(parts) -> list:
    """Text as lists of ids, pictures as 'image'."""
    return [part.tolist() if part.ndim == 1 else "image" for part in parts]


def assert_same_parts(got, want):
    assert described(got) == described(want)
    for x, y in zip(got, want):
        np.testing.assert_array_equal(x, y)


def latents(seed: int, number: int = 1):
    x = np.random.default_rng(seed).standard_normal((number, *MODEL.latent_shape)).astype(np.float32)
    return list(x)


# ---------------------------------------------------------------- LM mode

def test_stops_at_eos():
    params = bigram({BOS: A, A: B, B: EOS, C: D})
    got = generate(params, [[], [[A]], [[C]]])
    assert [described(x) for x in got] == [[[A, B]], [[B]], [[D]]]


def test_stops_at_the_limit():
    params = bigram({BOS: A, A: B, B: A})
    assert described(generate(params, [[]], max_new_tokens=5)[0]) == [[A, B, A, B, A]]
    assert described(generate(params, [[[A, B]]], max_new_tokens=2)[0]) == [[A, B]]
    assert generate(params, [[]], max_new_tokens=0)[0] == []
    assert len(generate(params, [[]])[0][0]) == T - 1  # the row's end


def test_never_writes_pad_bos_eoi_or_padding_of_the_vocabulary():
    params = bigram({BOS: (PAD, BOS, EOI, MODEL.vocab_size, A), A: EOS})
    assert described(generate(params, [[]])[0]) == [[A]]


def test_greedy_is_deterministic_and_temperature_depends_on_the_seed(random_params):
    prompts = [[[A, B]], [[C]], [[D]]]
    greedy = [generate(random_params, prompts, max_new_tokens=8, max_images=0, seed=seed) for seed in (0, 0, 1)]
    for a, b, c in zip(*greedy):
        assert_same_parts(a, b)
        assert_same_parts(a, c)
    warm = [generate(random_params, prompts, max_new_tokens=8, max_images=0, seed=seed, temperature=2.0)
            for seed in (0, 0, 1)]
    assert [described(x) for x in warm[0]] == [described(x) for x in warm[1]]
    assert [described(x) for x in warm[0]] != [described(x) for x in warm[2]]
    assert [described(x) for x in warm[0]] != [described(x) for x in greedy[0]]


# ---------------------------------------------------------------- diffusion mode

def test_boi_switches_to_diffusion_and_eoi_back():
    params = bigram({BOS: A, A: BOI, EOI: B, B: EOS})
    rows = decode.start_rows(CFG, [[], [[B]], [[A]]], 0, T)
    rows = decode.write_text(CFG, params, rows, jnp.full(ROWS, T), jnp.float32(0))
    assert rows.mode_B.tolist() == [decode.DRAW, decode.DONE, decode.DRAW]
    assert rows.length_B.tolist() == [3, 3, 3]
    drawn = decode.draw_images(CFG, params, rows, "ddpm", "fixed_small", STEPS, jnp.float32(1))
    assert drawn.mode_B.tolist() == [decode.WRITE, decode.DONE, decode.WRITE]
    assert drawn.length_B.tolist() == [3 + N + 1, 3, 3 + N + 1]
    assert drawn.tokens_BT[0, : 3 + N + 1].tolist() == [BOS, A, BOI] + [PAD] * N + [EOI]
    assert drawn.image_ids_BT[0].tolist() == [0] * 3 + [1] * N + [0] * (T - 3 - N)
    assert drawn.image_start_BI[:, 0].tolist() == [3, T, 3] and (drawn.image_start_BI[:, 1:] == T).all()
    assert not drawn.latents_BIhwc[1].any() and drawn.latents_BIhwc[0, 0].any()
    assert not drawn.latents_BIhwc[:, 1:].any()
    parts = generate(params, [[]])[0]
    assert described(parts) == [[A], "image", [B]]
    assert parts[1].shape == MODEL.latent_shape


def test_boi_at_the_prompts_end_draws_at_once():
    params = bigram({EOI: B, B: EOS})
    assert described(generate(params, [[[A, BOI]]])[0]) == ["image", [B]]


def test_several_images_to_a_document():
    """As many as there are slots; then BOI is not offered."""
    params = bigram({BOS: A, A: BOI, EOI: B, B: (BOI, C), C: EOS})
    assert described(generate(params, [[]])[0]) == [[A], "image", *[[B], "image"] * (I - 1), [B, C]]
    with_one = generate(params, [[[A], latents(0)[0]]])[0]  # one slot holds the prompt's picture
    assert described(with_one) == [*[[B], "image"] * (I - 1), [B, C]]
    images = [x for x in with_one if x.ndim > 1]
    assert len({x.tobytes() for x in images}) == I - 1  # each has its own noise


def test_max_images_and_the_limit_count_text_and_pictures_apart():
    params = bigram({BOS: A, A: BOI, EOI: B, B: (BOI, C), C: EOS})
    assert described(generate(params, [[]], max_images=2)[0]) == [[A], "image", [B], "image", [B]]
    assert described(generate(params, [[]], max_images=0)[0]) == [[A]]
    assert described(generate(params, [[]], max_new_tokens=3)[0]) == [[A], "image", [B]]
    assert described(generate(params, [[]], max_new_tokens=2)[0]) == [[A], "image"]


def test_no_boi_without_room():
    """BOI, N patches and EOI must fit: with one position less, the second choice is written."""
    params = bigram({A: (BOI, C), C: EOS})
    exact = T - (N + 2)  # positions in use: BOS and the text
    assert described(generate(params, [[[A] * (exact - 1)]])[0]) == ["image"]
    assert described(generate(params, [[[A] * exact]])[0]) == [[C]]


def test_only_the_picture_being_drawn_is_noisy(monkeypatch):
    """Those before it are clean, t = 0, for the conditional model; the unconditional one sees none."""
    (x, noisy), t = latents(6, 2), np.float32(0.7)
    rows = decode.start_rows(CFG, [[[A], x, [B, BOI]]], 0, T)

    @jax.jit
    def seen(rows):
        calls = []

        def forward(cfg, params, rows, x_BIhwc, t_BI):
            calls.append((x_BIhwc, t_BI, rows.tokens_BT))
            return None, jnp.zeros(x_BIhwc.shape)

        monkeypatch.setattr(decode, "forward", forward)
        monkeypatch.setattr(sampler, "sample",
                            lambda process, denoise, *_: denoise(noisy[None], jnp.full(1, t))[0])
        decode.draw_images.__wrapped__(CFG, None, rows, "ddpm", "fixed_small", STEPS, jnp.float32(2))
        return calls

    (x_BI, t_BI, _), (x_alone, t_alone, tokens) = seen(rows)
    np.testing.assert_array_equal(x_BI[0, :2], [x, noisy])
    np.testing.assert_array_equal(t_BI[0], [0, t, *[0] * (I - 2)])
    np.testing.assert_array_equal(x_alone[0], [noisy])
    assert t_alone.tolist() == [[t]] and tokens.tolist() == [[BOS, BOI, *[PAD] * N]]


def drawn(fn, params, prompts, scale: float, variance: str = "fixed_small"):
    """The pictures that prompts ending with BOI start with."""
    rows = decode.start_rows(CFG, prompts, 3, T)
    return np.asarray(fn(CFG, params, rows, "ddpm", variance, STEPS, jnp.float32(scale)).latents_BIhwc[:, 0])


def test_guidance_one_is_the_conditional_model(random_params, monkeypatch):
    prompts = [[[A, BOI]], [[B, C, BOI]], [[D, BOI]]]
    one, three = (drawn(decode.draw_images, random_params, prompts, scale) for scale in (1.0, 3.0))
    monkeypatch.setattr(sampler, "guide", lambda cond, uncond, scale: cond)
    fresh = jax.jit(decode.draw_images.__wrapped__, static_argnums=(0, 3, 4, 5))
    np.testing.assert_allclose(one, drawn(fresh, random_params, prompts, 1.0), rtol=1e-4, atol=1e-4)
    assert np.abs(one - three).max() > 1e-2


def test_variance_reaches_the_sampler_and_few_steps_are_said_once(random_params, capsys):
    """The pictures of `generate` are those of the config's variance."""
    prompts, pictures = [[[A, BOI]]] * ROWS, {}
    decode.warn_once.cache_clear()
    for variance in ("fixed_small", "fixed_large"):
        cfg = dataclasses.replace(CFG, sampling=dataclasses.replace(
            CFG.sampling, variance=variance, guidance_scale=1.0))
        for _ in range(2):
            parts = decode.generate(cfg, random_params, prompts, seed=3, max_images=1, max_len=T)
        pictures[variance] = np.stack([row[0] for row in parts])
        np.testing.assert_allclose(pictures[variance], drawn(decode.draw_images, random_params, prompts, 1.0,
                                                             variance), rtol=1e-4, atol=1e-4)
    assert np.abs(pictures["fixed_small"] - pictures["fixed_large"]).max() > 1e-2
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {sampler.warning('ddpm', variance, STEPS)}" for variance in pictures]


def test_guidance_zero_does_not_see_the_prompt(random_params):
    one, other = ([[[x, BOI]]] * ROWS for x in (A, B))
    for scale, same in ((0.0, True), (1.0, False)):
        x, y = (drawn(decode.draw_images, random_params, prompts, scale) for prompts in (one, other))
        assert np.allclose(x, y, rtol=1e-5, atol=1e-5) == same


def test_guidance_moves_from_unconditional_through_conditional():
    cond, uncond = np.array([1.0, 2.0]), np.array([0.0, 4.0])
    np.testing.assert_array_equal(sampler.guide(cond, uncond, 0), uncond)
    np.testing.assert_array_equal(sampler.guide(cond, uncond, 1), cond)
    np.testing.assert_array_equal(sampler.guide(cond, uncond, 3), np.array([3.0, -2.0]))


# ---------------------------------------------------------------- rows are independent

def some_prompts():
    x, y = latents(1, 2)
    return [[[A, B, C, BOI]], [[A], x, [B], y, [D]], []]


def test_a_row_does_not_depend_on_its_neighbours(random_params):
    """Not on what they hold, nor on how long they are; text drawn at temperature 1, pictures by DDPM."""
    run = partial(generate, random_params, seed=5, temperature=1.0, max_new_tokens=6, max_images=2)
    prompts, others = some_prompts(), [[[D] * 20], [[C, BOI]], [latents(7)[0]]]
    together = run(prompts=prompts)
    assert any("image" in described(x) for x in together) and any(described(x) != [] for x in together)
    for row in range(ROWS):
        among = [*others[:row], prompts[row], *others[row + 1 :]]
        got = run(prompts=among)[row]
        assert described(got) == described(together[row])
        for x, y in zip(got, together[row]):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_a_batch_of_one_is_row_zero(random_params):
    prompt = some_prompts()[0]
    options = dict(seed=5, max_new_tokens=4, max_images=1, max_len=T)
    alone = decode.generate(CFG, random_params, [prompt], **options)[0]
    batch = decode.generate(CFG, random_params, [prompt, [[A]], []], **options)[0]
    assert described(alone) == described(batch) and described(alone)[0] == "image"
    for x, y in zip(alone, batch):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_a_prompts_number_keys_its_noise_whatever_the_chunk(random_params):
    """Of three equal prompts each has noise of its own, and drawn later as number 2 it is the third's."""
    options = dict(seed=5, max_new_tokens=0, max_images=1)
    together = [parts[0] for parts in generate(random_params, [[[A, BOI]]] * ROWS, **options)]
    assert len({x.tobytes() for x in together}) == ROWS
    later = [parts[0] for parts in generate(random_params, [[[A, BOI]]] * 2, first_row=1, **options)]
    np.testing.assert_allclose(later, together[1:], rtol=1e-4, atol=1e-4)


def test_text_is_drawn_anew_at_every_position():
    """A model without preferences: the same key at every position would write one token for ever."""
    rows = generate(bigram({}), [[]] * ROWS, seed=1, temperature=1.0, max_new_tokens=12, max_images=0)
    texts = [parts[0].tolist() for parts in rows]
    assert all(len(set(text)) > 8 for text in texts) and texts[0] != texts[1] != texts[2]


def test_forward_equals_the_training_forward(random_params):
    """A finished document as decoding lays it out, and the same document packed behind another one."""
    objective, (x, y), noisy = make_objective(CFG), latents(2, 2), latents(4, 2)
    parts = [np.array([A, B], np.int32), x, np.array([C], np.int32), y, np.array([D, D], np.int32)]
    example = objective.layout(Document(tuple(parts), 1.0, True))
    first = objective.layout(Document((np.array([D, C], np.int32), latents(3)[0]), 1.0, True))
    packed = packing.stack_rows([packing.pack_row(0, [first, example], T, I, MODEL.latent_shape)])
    start, n = len(first.tokens_L), len(example.tokens_L)
    rows = decode.start_rows(CFG, [[*parts[:-1], [D, D, EOS]]], 0, T)
    np.testing.assert_array_equal(rows.tokens_BT[0, :n], example.tokens_L)
    np.testing.assert_array_equal(rows.image_ids_BT[0, :n], example.image_ids_L)
    np.testing.assert_array_equal(rows.latents_BIhwc[0, :2], [x, y])
    training = jax.jit(Transfusion(MODEL, CFG.data.seq_len).apply)
    decoding = jax.jit(decode.forward, static_argnums=0)

    def inputs(latents_BIhwc, slots, t):
        x_BIhwc, t_BI = np.array(latents_BIhwc), np.zeros((1, I), np.float32)
        x_BIhwc[0, slots], t_BI[0, slots] = noisy, t
        return x_BIhwc, t_BI

    for t in (0.0, 0.37):
        h_packed, want = training({"params": random_params}, packed,
                                  *inputs(packed.latents_BIhwc, slice(1, 3), t))
        h, got = decoding(CFG, random_params, rows, *inputs(rows.latents_BIhwc, slice(2), t))
        logits, logits_packed = (lm_head.logits(x, random_params["lm_head_kernel"], MODEL.vocab_size)
                                 for x in (h, h_packed))
        np.testing.assert_allclose(logits[0, :n], logits_packed[0, start : start + n], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got[0, :2], want[0, 1:3], rtol=1e-4, atol=1e-4)
        assert np.abs(want[0, 1:3]).max() > 0.1


# ---------------------------------------------------------------- mistakes

def test_prompt_too_long():
    decode.start_rows(CFG, [[[A] * (T - 1)]], 0, T)
    with pytest.raises(UserError, match=f"prompt 1 is {T + 1} positions long, there is room for {T}"):
        decode.start_rows(CFG, [[], [[A] * T]], 0, T)


def test_too_many_images():
    decode.start_rows(CFG, [latents(0, I)], 0, T)
    with pytest.raises(UserError, match=rf"prompt 0 has more images than the {I} that"):
        decode.start_rows(CFG, [latents(0, I + 1)], 0, 2 * T)


def test_forced_image_without_room():
    params = bigram({EOI: EOS})
    exact = T - (N + 2)
    assert described(generate(params, [[[A] * (exact - 1) + [BOI]]])[0]) == ["image"]
    with pytest.raises(UserError, match=f"no room for an image: {T + 1} positions are needed, there are {T}"):
        generate(params, [[[A] * exact + [BOI]]])


def test_forced_image_without_a_slot():
    params = bigram({EOI: EOS})
    full = latents(0, I)
    with pytest.raises(UserError, match=rf"prompt 0 has {I} images already"):
        generate(params, [[*full, [A, BOI]]])
