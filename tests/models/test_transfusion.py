"""The model: leak probe, patches in and out, the timestep, vocabulary padding, parameter counts.

T positions, I image slots, N patches per image, P values per patch, h w c latent.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments import transfusion as experiment
from tfusion import config
from tfusion.models.adapters import linear
from tfusion.models.adapters.linear import LinearConfig
from tfusion.models.masks import dense_mask
from tfusion.models.transfusion import ModelConfig, Transfusion, patch_places, put_patches, take_patches
from tfusion.types import BOS, EOS, PAD, Batch

MODEL = ModelConfig(
    num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, d_ff=32, text_vocab_size=20,
    image_attention="bidirectional", qk_norm="none", norm_order="pre", remat="none", compute_dtype="float32",
    adapter=LinearConfig("linear", latent_size=4, latent_channels=2, patch_size=2, patch_positions="learned"))
MODES = ("bidirectional", "causal")
N, BOI, EOI = MODEL.num_patches, MODEL.text_vocab_size, MODEL.text_vocab_size + 1
IMAGE = [BOI, -1, -1, -1, -1, EOI]  # -1: a patch
# Two captioned pictures; a picture first; two pictures with nothing between; text only; then padding.
DOCUMENTS = ([BOS, 5, 6, *IMAGE, 7, *IMAGE, EOS], [BOS, *IMAGE, 8, EOS], [BOS, 9, *[-1] * 2 * N, 4, EOS],
             [BOS, 11, 12, EOS])
T = 56
I = 7  # image slots; five in use


def one_row() -> Batch:
    """DOCUMENTS as a batch of one row, written out by hand. Its own latents are never read: NaN."""
    flat = [(token, number, place) for number, document in enumerate(DOCUMENTS, start=1)
            for place, token in enumerate(document)]
    flat += [(PAD, 0, 0)] * (T - len(flat))
    tokens, segments, positions = (np.array([x], np.int32) for x in zip(*flat))
    patches = np.flatnonzero(tokens[0] < 0).reshape(-1, N)  # every image has N patches
    images, starts = np.zeros((1, T), np.int32), np.full((1, I), T, np.int32)
    for slot, where in enumerate(patches):
        images[0, where], starts[0, slot] = slot + 1, where[0]
    max_t = (starts < T).astype(np.float32)
    return Batch(np.zeros(1, np.int32), np.maximum(tokens, PAD), segments, images, positions,
                 np.zeros((1, T), bool), np.full((1, I, *MODEL.latent_shape), np.nan, np.float32), starts,
                 max_t, np.zeros((1, I, 2), np.uint32))


ROW = one_row()
USED = int((ROW.image_start_BI < T).sum())
PATCH_POSITIONS = np.flatnonzero(ROW.image_ids_BT[0])  # slot by slot, in raster order


def repeat(tree, times: int):
    return jax.tree.map(lambda x: np.repeat(x, times, axis=0), tree)


def latents(seed: int = 0):
    rng = np.random.default_rng(seed)
    x_t = rng.standard_normal((1, I, *MODEL.latent_shape)).astype(np.float32)
    return x_t, rng.uniform(0.1, 1, (1, I)).astype(np.float32)


@functools.cache
def model_and_params(mode: str, dtype: str = "float32"):
    """The model with every parameter random (the adapter's output starts at zero, which hides leaks)."""
    model = Transfusion(dataclasses.replace(MODEL, image_attention=mode, compute_dtype=dtype), T)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), ROW, *latents()))
    rng = np.random.default_rng(1)

    def draw(leaf):
        scale = leaf.shape[-2] ** -0.5 if len(leaf.shape) > 1 else 1.0
        return jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32)

    return model, jax.tree.map(draw, shapes)


@functools.cache
def apply(mode: str, dtype: str = "float32"):
    """(batch, x_t, t) -> (logits (B, T, padded V), prediction_BIhwc)"""
    return jax.jit(functools.partial(heads, *model_and_params(mode, dtype)))


def heads(model, params, batch, x_t, t):
    h_BTD, prediction = model.apply(params, batch, x_t, t)
    return model.apply(params, h_BTD, method="logits"), prediction


def by_patch(x_Ihwc):
    """(..., I, h, w, c) -> (..., I * N, P), patches left to right, top to bottom, by plain slicing."""
    patches = [x_Ihwc[..., i, y : y + 2, x : x + 2, :] for i in range(USED) for y in (0, 2) for x in (0, 2)]
    return np.stack([patch.reshape(*patch.shape[:-3], -1) for patch in patches], axis=-2)


@functools.cache
def jacobians(mode: str):
    """Which patch's input reaches (each position's logits, each patch's prediction): exact non-zeros."""
    rng = np.random.default_rng(2)
    w_logits = rng.standard_normal(MODEL.vocab_size).astype(np.float32)
    w_latent = rng.standard_normal(MODEL.latent_shape).astype(np.float32)
    model, params = model_and_params(mode)
    x_t, t = latents()

    def scalars(x_t):
        logits, prediction = heads(model, params, ROW, x_t, t)
        weighted = prediction[0] * w_latent[None]
        patches = [weighted[i, y : y + 2, x : x + 2].sum()
                   for i in range(USED) for y in (0, 2) for x in (0, 2)]
        return logits[0, :, : MODEL.vocab_size] @ w_logits, jnp.stack(patches)

    return tuple(np.abs(by_patch(np.asarray(j)[:, 0])).sum(-1) for j in jax.jit(jax.jacrev(scalars))(x_t))


@pytest.mark.parametrize("mode", MODES)
def test_logits_gradients_to_patches_are_exactly_the_mask(mode):
    """Exactly zero to later images, later patches under 'causal', and other documents; not zero to any
    patch in sight. (Visibility is transitive, so depth adds no path.)"""
    mask = np.asarray(dense_mask(ROW.segment_ids_BT, ROW.image_ids_BT, mode))[0]
    np.testing.assert_array_equal(jacobians(mode)[0] != 0, mask[:, PATCH_POSITIONS])


@pytest.mark.parametrize("mode", MODES)
def test_prediction_gradients_to_patches_are_exactly_the_mask(mode):
    """Inside an image each patch reaches each other, both ways; under 'causal' later ones only."""
    reached = jacobians(mode)[1] != 0
    mask = np.asarray(dense_mask(ROW.segment_ids_BT, ROW.image_ids_BT, mode))[0]
    np.testing.assert_array_equal(reached, mask[np.ix_(PATCH_POSITIONS, PATCH_POSITIONS)])
    first = reached[:N, :N]
    assert first.all() if mode == "bidirectional" else (first == np.tri(N, dtype=bool)).all()


@pytest.mark.parametrize("mode", MODES)
def test_changing_a_token_changes_exactly_who_sees_it(mode):
    """Row p of the batch has another token at position p: positions that do not see p keep every bit of
    their logits and predictions, positions that do change."""
    plain, x_t, t = repeat(ROW, T), *(np.repeat(x, T, axis=0) for x in latents())
    changed = plain._replace(tokens_BT=np.where(np.eye(T, dtype=bool), 13, plain.tokens_BT))
    (before, predicted), (after, predicted_after) = (
        apply(mode)(batch, x_t, t) for batch in (plain, changed))
    touched = (np.asarray(before) != np.asarray(after)).any(-1).T  # [query, changed position]
    touched_patches = (by_patch(np.asarray(predicted)) != by_patch(np.asarray(predicted_after))).any(-1).T
    expected = np.array(dense_mask(ROW.segment_ids_BT, ROW.image_ids_BT, mode))[0]
    expected[:, PATCH_POSITIONS] = False  # a patch's token id is never read
    np.testing.assert_array_equal(touched, expected)
    np.testing.assert_array_equal(touched_patches, expected[PATCH_POSITIONS])


def test_unused_slots_change_no_bit():
    """Their latents and t may be anything; the slots in use and all logits stay."""
    (x_t, t), (other_x, other_t) = latents(0), latents(1)
    used = (ROW.image_start_BI < T)
    out = apply("bidirectional")(ROW, x_t, t)
    same = apply("bidirectional")(ROW, np.where(used[..., None, None, None], x_t, other_x),
                                  np.where(used, t, other_t))
    for each, its_own in zip(out, same):
        np.testing.assert_array_equal(each, its_own)
    assert 0 < used.sum() < I


def test_clean_latents_of_the_batch_are_not_read():
    """They are NaN in ROW; the model sees the noisy ones only."""
    assert all(np.isfinite(out).all() for out in apply("bidirectional")(ROW, *latents()))


def test_timestep_reaches_its_image_and_what_follows_only():
    x_t, t = latents()
    slot = 1  # the second picture of the first document
    other = np.where(np.arange(I) == slot, t / 2, t)
    (logits, prediction), (logits_moved, moved) = (
        map(np.asarray, apply("bidirectional")(ROW, x_t, each)) for each in (t, other))
    np.testing.assert_array_equal((prediction != moved)[0].any((1, 2, 3)), np.arange(I) == slot)
    assert np.abs(prediction - moved)[0, slot].max() > 1e-3
    changed = (logits != logits_moved)[0].any(-1)
    after = (ROW.segment_ids_BT[0] == 1) & (np.arange(T) >= ROW.image_start_BI[0, slot])
    np.testing.assert_array_equal(changed, after)


def test_timestep_features_tell_neighbouring_steps_apart():
    """cos and sin of 1000 t times 10^(-4 i / half), for all of DDPM's 1000 steps."""
    t = np.arange(1, 1001) / 1000
    features = np.asarray(linear.timestep_features(jnp.asarray(t, jnp.float32)))
    angle = 1000 * t[:, None] * 10_000.0 ** (-np.arange(128) / 128)
    np.testing.assert_allclose(features, np.concatenate([np.cos(angle), np.sin(angle)], -1), atol=1e-3)
    assert np.abs(np.diff(features, axis=0)).max(axis=1).min() > 0.5


def test_vocabulary_padding_gets_no_probability():
    logits, _ = apply("bidirectional")(ROW, *latents())
    probabilities = np.asarray(jax.nn.softmax(logits))
    assert logits.shape[-1] == MODEL.padded_vocab_size > MODEL.vocab_size
    assert (probabilities[..., MODEL.vocab_size :] == 0).all()
    assert (probabilities[..., : MODEL.vocab_size] > 0).all()


def test_outputs_are_float32_under_bfloat16_compute():
    """And near the float32 model's, so the compute dtype is a matter of rounding alone."""
    out, exact = (apply("bidirectional", dtype)(ROW, *latents()) for dtype in ("bfloat16", "float32"))
    model, params = model_and_params("bidirectional", "bfloat16")
    assert jax.eval_shape(model.apply, params, ROW, *latents())[0].dtype == jnp.bfloat16
    assert model.apply(params, method="lm_head").dtype == jnp.float32
    for low, high in zip(out, exact):
        assert low.dtype == jnp.float32
        real = np.asarray(high) > -1e8  # not the padding of the vocabulary
        low, high = np.asarray(low)[real], np.asarray(high)[real]
        assert 0 < np.linalg.norm(low - high) < 0.05 * np.linalg.norm(high)


def random_starts(rng, rows: int):
    """Slots in any order, at places that do not overlap; some unused."""
    starts = rng.permuted(np.tile(np.arange(0, T - N + 1, N), (rows, 1)), axis=1)[:, :I]
    return np.where(rng.random(starts.shape) < 0.3, T, starts).astype(np.int32)


@pytest.mark.parametrize("seed", range(5))
def test_taking_patches_undoes_putting_them(seed):
    rng = np.random.default_rng(seed)
    starts = random_starts(rng, 4)
    x, patches = rng.standard_normal((4, T, 3)), rng.standard_normal((4, I, N, 3))
    places = patch_places(jnp.asarray(starts), N, T)
    out = put_patches(jnp.asarray(x), jnp.asarray(patches), places)
    expected, used = x.copy(), starts < T
    for row, slot in np.argwhere(used):
        expected[row, starts[row, slot] : starts[row, slot] + N] = patches[row, slot]
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    back = take_patches(out, places, N)
    np.testing.assert_allclose(back, patches * used[..., None, None], rtol=1e-6)


@pytest.mark.parametrize("k, size", [(1, 4), (2, 8), (4, 8), (8, 8)])
def test_patches_are_windows_left_to_right_top_to_bottom(k, size):
    x = np.arange(2 * 3 * size * size * 2, dtype=np.float32).reshape(2, 3, size, size, 2)
    patches = np.asarray(linear.patchify(x, k))
    across = size // k
    for n in range(across**2):
        top, left = n // across * k, n % across * k
        window = x[:, :, top : top + k, left : left + k]
        np.testing.assert_array_equal(patches[:, :, n], window.reshape(2, 3, -1))
    np.testing.assert_array_equal(linear.unpatchify(patches, k, size), x)


PAPER = {  # reference/paper.md 1.1 (parameters with untied 32k embeddings) and 1.2 (adapter's share)
    "0.16b": (162.4e6, 0.52), "0.37b": (373.9e6, 0.37), "0.76b": (777.9e6, 0.37),
    "1.4b": (1364.3e6, 0.36), "7b": (6738.4e6, 0.27)}


@pytest.mark.parametrize("size", experiment.MODEL_SIZES)
def test_parameter_counts_are_the_papers(size):
    """Without adapter and vocabulary padding within 0.1 %; the adapter's share as table 7 prints it."""
    cfg = config.from_dict(experiment.get_config(size)).model
    row = jnp.zeros((1, cfg.num_patches), jnp.int32)
    batch = Batch(row[:, 0], row, row, row, row, row, row, row[:, :1], row[:, :1], None)
    shapes = jax.eval_shape(Transfusion(cfg, cfg.num_patches).init, jax.random.key(0), batch,
                            jnp.zeros((1, 1, *cfg.latent_shape)), jnp.zeros((1, 1)))["params"]
    total, adapter = (sum(x.size for x in jax.tree.leaves(tree))
                      for tree in (shapes, shapes["image_adapter"]))
    extra_ids = 2 * (cfg.padded_vocab_size - 32_000) * cfg.d_model
    paper_total, paper_share = PAPER[size]
    assert total - adapter - extra_ids == pytest.approx(paper_total, rel=1e-3)
    assert 100 * adapter / total == pytest.approx(paper_share, abs=0.02)
