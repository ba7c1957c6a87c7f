"""Decoding: when it writes, when it draws, when it stops; a row's result does not depend on its neighbours.

Two tiny models: `random_params`, every parameter alive, and `bigram`, whose next token is a table of the
current one, so that each behaviour can be called up.
"""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.conftest import tiny_config
from tests.inference import written
from tests.inference.written import described, parts_of
from tfusion import config
from tfusion.data import packing
from tfusion.diffusion import sampler
from tfusion.errors import UserError
from tfusion.inference import cache, transfusion, writing
from tfusion.models.transfusion import Transfusion
from tfusion.objectives import make_objective
from tfusion.types import BOS, EOS, PAD, Document

CFG = tiny_config("unused")  # DDPM, as it draws noise at every step
CFG = dataclasses.replace(CFG, sampling=dataclasses.replace(CFG.sampling, sampler="ddpm"))
MODEL, N, I = CFG.model, CFG.model.num_patches, CFG.rows.image_slots
NETWORK, PROCESS = Transfusion(MODEL, CFG.data.seq_len), CFG.process.make()
BOI, EOI = CFG.vocabulary.boi, CFG.vocabulary.eoi
A, B, C, D = 10, 11, 12, 13  # text ids
STEPS = CFG.sampling.num_inference_steps
T, ROWS = 48, 3  # one shape for all tests, so that each function compiles once


pytestmark = pytest.mark.usefixtures("quick_compiles")


def abstract_params():
    return nn.meta.unbox(jax.eval_shape(make_objective(CFG).init, jax.random.key(0)))


def filled(fn):
    """Parameters by fn(name, shape)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: np.asarray(fn(path[-1].key, x.shape), np.float32), abstract_params())


@pytest.fixture
def random_params():
    return make_random_params()


@functools.cache
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


def start_rows(prompts, seed: int = 0, max_len: int = T):
    return writing.start_rows(CFG, list(map(parts_of, prompts)), seed, max_len)


def write_text(params, rows):
    return writing.write_text(NETWORK, params, rows, jnp.full(ROWS, T), jnp.float32(0))


def draw_images(params, rows, scale: float, variance: str = "fixed_small", fn=transfusion.draw_images):
    return fn(NETWORK, PROCESS, "ddpm", STEPS, scale != 1, params, rows, jnp.bool_(variance == "fixed_large"),
              jnp.float32(scale))


def generate(params, prompts, cfg=CFG, rows: int = ROWS, **options):
    return written.generate(transfusion, cfg, params, prompts, rows, **{"max_len": T} | options)


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
    rows = start_rows([[], [[B]], [[A]]])
    rows = write_text(params, rows)
    assert rows.mode_B.tolist() == [writing.DRAW, writing.DONE, writing.DRAW]
    assert rows.length_B.tolist() == [3, 3, 3]
    drawn = draw_images(params, rows, 1)
    assert drawn.mode_B.tolist() == [writing.WRITE, writing.DONE, writing.WRITE]
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
    rows = start_rows([[[A], x, [B, BOI]]])

    @jax.jit
    def seen(rows):
        calls = []

        def predict(model, params, rows, x_BIhwc, t_BI):
            calls.append((x_BIhwc, t_BI, rows.tokens_BT))
            return jnp.zeros(x_BIhwc.shape)

        monkeypatch.setattr(transfusion, "predict", predict)
        monkeypatch.setattr(sampler, "sample",
                            lambda process, denoise, *_: denoise(noisy[None], jnp.full(1, t))[0])
        draw_images(None, rows, 2, fn=transfusion.draw_images.__wrapped__)
        return calls

    (x_BI, t_BI, _), (x_alone, t_alone, tokens) = seen(rows)
    np.testing.assert_array_equal(x_BI[0, :2], [x, noisy])
    np.testing.assert_array_equal(t_BI[0], [0, t, *[0] * (I - 2)])
    np.testing.assert_array_equal(x_alone[0], [noisy])
    assert t_alone.tolist() == [[t]] and tokens.tolist() == [[BOS, BOI, *[PAD] * N]]


def drawn(params, prompts, *options):
    """The pictures that prompts ending with BOI start with."""
    return np.asarray(draw_images(params, start_rows(prompts, 3), *options).latents_BIhwc[:, 0])


def test_guidance_one_is_the_conditional_model(random_params, monkeypatch):
    prompts = [[[A, BOI]], [[B, C, BOI]], [[D, BOI]]]
    one, near, three = (drawn(random_params, prompts, scale) for scale in (1.0, 1.0 + 1e-6, 3.0))
    np.testing.assert_allclose(one, near, rtol=1e-4, atol=1e-4)  # the one runs no unconditional model
    assert np.abs(one - three).max() > 1e-2


def test_variance_reaches_the_sampler_and_few_steps_are_said_once(random_params, capsys):
    """The pictures of `generate` are those of the config's variance."""
    prompts, pictures = [[[A, BOI]]] * ROWS, {}
    transfusion.warn_once.cache_clear()
    for variance in ("fixed_small", "fixed_large"):
        cfg = dataclasses.replace(CFG, sampling=dataclasses.replace(
            CFG.sampling, variance=variance, guidance_scale=1.0))
        for _ in range(2):
            parts = generate(random_params, prompts, cfg, seed=3, max_images=1)
        pictures[variance] = np.stack([row[0] for row in parts])
        np.testing.assert_allclose(pictures[variance], drawn(random_params, prompts, 1.0,
                                                             variance), rtol=1e-4, atol=1e-4)
    assert np.abs(pictures["fixed_small"] - pictures["fixed_large"]).max() > 1e-2
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {sampler.warning('ddpm', variance, STEPS)}" for variance in pictures]


def test_guidance_zero_does_not_see_the_prompt(random_params):
    one, other = ([[[x, BOI]]] * ROWS for x in (A, B))
    for scale, same in ((0.0, True), (1.0, False)):
        x, y = (drawn(random_params, prompts, scale) for prompts in (one, other))
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
    options = dict(seed=5, max_new_tokens=4, max_images=1)
    alone = generate(random_params, [prompt], rows=1, **options)[0]
    batch = generate(random_params, [prompt, [[A]], []], **options)[0]
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
    """A finished document as decoding lays it out, and the same document packed behind another one: what is
    predicted of its pictures, noisy, and of each next token, its pictures clean."""
    (x, y), noisy, lay = latents(2, 2), np.stack(latents(4, 2)), CFG.rows.layout.lay
    params = {"params": random_params}
    parts = [[A, B], x, [C], y, [D, D]]
    example = lay(Document(tuple(parts_of(parts)), True))
    first = lay(Document(tuple(parts_of([[D, C], latents(3)[0]])), True))
    packed = packing.stack_rows([packing.pack_row(0, [first, example], CFG.rows)])
    start, n = len(first.tokens_L), len(example.tokens_L)
    rows = start_rows([[*parts[:-1], [D, D, EOS]]])
    np.testing.assert_array_equal(rows.tokens_BT[0, :n], example.tokens_L)
    np.testing.assert_array_equal(rows.image_ids_BT[0, :n], example.image_ids_L)
    np.testing.assert_array_equal(rows.latents_BIhwc[0, :2], [x, y])

    @jax.jit
    def training(images, t):
        x_BI = jnp.asarray(packed.latents_BIhwc).at[0, 1:3].set(images)
        h_BTD, out = NETWORK.apply(params, packed, x_BI, jnp.zeros((1, I)).at[0, 1:3].set(t))
        return NETWORK.apply(params, h_BTD, method="logits")[0, start : start + n], out[0, 1:3]

    _, want = training(noisy, 0.37)
    x_BI, t_BI = rows.latents_BIhwc.at[0, :2].set(noisy), jnp.zeros((1, I)).at[0, :2].set(0.37)
    got = jax.jit(transfusion.predict, static_argnums=0)(NETWORK, random_params, rows, x_BI, t_BI)
    np.testing.assert_allclose(got[0, :2], want, rtol=1e-4, atol=1e-4)
    assert np.abs(want).max() > 0.1

    kept = jax.jit(writing.read, static_argnums=0)(NETWORK, random_params, rows)
    step = jax.jit(cache.step, static_argnums=0)
    logits, _ = training(jnp.stack([x, y]), 0.0)
    for p in np.flatnonzero(example.image_ids_L == 0):
        h_BD, kept = step(NETWORK, random_params, kept, rows.tokens_BT[:, p], jnp.full(1, p))
        here = NETWORK.apply(params, h_BD, method="logits")
        np.testing.assert_allclose(here[0], logits[p], rtol=1e-4, atol=1e-4)


def test_writing_on_after_a_prompt_is_the_full_forward(random_params):
    """Each token is the likeliest by one pass over the finished rows, of unequal lengths and with pictures."""
    x, y = latents(2, 2)
    start = start_rows([[[A, B, C]], [[A], x, [B], y, [D]], []])
    rows = writing.write_text(NETWORK, random_params, start, start.length_B + 8, jnp.float32(0))

    @jax.jit
    def full(rows):
        apply = functools.partial(NETWORK.apply, {"params": random_params})
        x_BTD, _ = apply(rows.tokens_BT, rows.image_start_BI, rows.latents_BIhwc, jnp.zeros((ROWS, I)),
                         method="embed")
        h_BTD, _ = apply(x_BTD, writing.sight(NETWORK, rows), method="hidden")
        return apply(h_BTD, method="logits").at[..., jnp.array([PAD, BOS, EOI])].set(-jnp.inf).argmax(-1)

    tokens, likeliest = np.asarray(rows.tokens_BT), np.asarray(full(rows))
    assert (rows.length_B - start.length_B).sum() > 12
    for row, (begin, end) in enumerate(zip(start.length_B, rows.length_B)):
        np.testing.assert_array_equal(tokens[row, begin:end], likeliest[row, begin - 1 : end - 1])


# ---------------------------------------------------------------- what is compiled

COMPILED = []  # a program each
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: COMPILED.append(name) if name.endswith("backend_compile_duration") else None)


def test_other_numbers_compile_nothing_anew(random_params):
    """Guidance, variance, temperature, seed, the optimizer's and the loss's settings are no part of a program;
    the number of steps and the sampler are."""
    prompts = [[[A, BOI]], [[B]], []]

    def programs(cfg, **options):
        before = len(COMPILED)
        generate(random_params, prompts, cfg, max_new_tokens=3, max_images=1, **options)
        return len(COMPILED) - before

    programs(CFG, seed=1, temperature=1.0)
    changes = {"sampling.guidance_scale": 7.0, "sampling.variance": "fixed_large", "loss_weight": 2.0,
               "optimizer.learning_rate": 0.5, "optimizer.ema_decay": 0.3, "train.num_steps": 1, "seed": 9}
    assert programs(config.changed(CFG, changes), seed=2, temperature=0.3) == 0
    assert programs(config.changed(CFG, {"sampling.sampler": "ddim"})) == 1
    assert programs(config.changed(CFG, {"sampling.num_inference_steps": 2})) == 1


# ---------------------------------------------------------------- mistakes

def test_prompt_too_long():
    start_rows([[[A] * (T - 1)]])
    with pytest.raises(UserError, match=f"prompt 1 is {T + 1} positions long, there is room for {T}"):
        start_rows([[], [[A] * T]])


def test_too_many_images():
    start_rows([latents(0, I)])
    with pytest.raises(UserError, match=rf"prompt 0 has more images than the {I} that"):
        start_rows([latents(0, I + 1)], max_len=2 * T)


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


def test_no_row_is_longer_than_those_of_training(random_params):
    """RoPE's tables end there."""
    most = CFG.data.seq_len
    with pytest.raises(UserError, match=f"max_len = {most + 1} .* data.seq_len = {most}"):
        generate(random_params, [[]], max_len=most + 1)
