"""Cached decoding is the full forward pass: rows of unequal lengths, images in what was cached, grouped heads.

B rows, T positions, N patches per image, h w c latent.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.test_transfusion import BOI, EOI, MODEL, N, model_and_params
from tfusion.inference import cache
from tfusion.models.masks import row_sight
from tfusion.models.transfusion import Transfusion
from tfusion.types import BOS, EOS, PAD

IMAGE = [BOI, *[-1] * N, EOI]  # -1: a patch
PREFIXES = ([BOS, 5, 6, *IMAGE], [BOS], [BOS, *IMAGE, 7, *IMAGE, 9, 10, 11])
TEXT = [4, 12, 5, 13, 6, 14, 7, EOS]  # what follows each
T, I, B = 40, 2, len(PREFIXES)
JUNK = 19  # stands past a row's end, in whole rows


def whole_rows(lengths):
    """(tokens, sight, image starts) of the first `lengths` positions of each document, the rest padding."""
    tokens, images, starts = np.full((B, T), JUNK), np.zeros((B, T), int), np.full((B, I), T)
    for row, prefix in enumerate(PREFIXES):
        document = np.array(prefix + TEXT)
        for slot, at in enumerate(np.flatnonzero(document == BOI)):
            images[row, at + 1 : at + 1 + N], starts[row, slot] = slot + 1, at + 1
        tokens[row, : lengths[row]] = np.maximum(document[: lengths[row]], PAD)
    positions = np.broadcast_to(np.arange(T), (B, T))
    segments = (positions < lengths[:, None]).astype(int)
    return tokens, (positions, segments, images * segments), starts


@pytest.mark.parametrize("mode, remat", [
    ("bidirectional", "none"), ("causal", "none"), ("bidirectional", "full")])
def test_cached_equals_the_full_forward(mode, remat):
    """Every hidden state within 1e-5 of its size, as each row writes on from its own length."""
    assert MODEL.num_heads > MODEL.num_kv_heads > 1
    begin = np.array([len(prefix) for prefix in PREFIXES])
    params = model_and_params(mode)[1]["params"]
    model = Transfusion(dataclasses.replace(MODEL, image_attention=mode, remat=remat), T)
    x_t = np.random.default_rng(0).standard_normal((B, I, *MODEL.latent_shape)).astype(np.float32)

    def embedded(lengths):
        tokens, ids, starts = whole_rows(lengths)
        x_BTD, _ = model.apply({"params": params}, tokens, starts, x_t, np.zeros((B, I), np.float32),
                               method="embed")
        return x_BTD, row_sight(*map(jnp.asarray, ids), mode)

    full, none = model.apply({"params": params}, *embedded(begin + len(TEXT)), method="hidden")
    assert none is None
    h_BTD, kept = jax.jit(partial(cache.prefill, model, params))(*embedded(begin))
    step = jax.jit(partial(cache.step, model, params))
    for row in range(B):
        assert_close(h_BTD[row, : begin[row]], full[row, : begin[row]])
    for n, token in enumerate(TEXT):
        h_BD, kept = step(kept, jnp.full(B, token), begin + n)
        assert_close(h_BD, full[np.arange(B), begin + n])


def assert_close(got, want):
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)


def test_a_step_writes_one_position_of_each_row_only():
    model, variables = model_and_params("bidirectional")
    before = jax.tree.map(lambda x: x + 7, cache.empty(model, B, T))
    at = np.array([3, 0, T])  # the last one is past the end
    _, after = cache.step(model, variables["params"], before, jnp.full(B, 5), jnp.asarray(at))
    for old, new in zip(before, after):
        changed = (np.asarray(old) != np.asarray(new)).any((3, 4))
        np.testing.assert_array_equal(changed, np.broadcast_to(np.arange(T) == at[:, None], changed.shape))
