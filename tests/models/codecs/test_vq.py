"""The VQ autoencoder as the codec of a run's pictures."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfusion import sharding
from tfusion.config import MeshConfig
from tfusion.errors import UserError
from tfusion.models.codecs import base, load
from tfusion.models.codecs.network import to_pixels, to_unit
from tfusion.models.codecs.vq import VQAutoencoder, VQCodec, VQConfig, nearest

CFG = VQConfig(image_size=8, downsample=4, width=8, num_blocks=1, num_codes=7, code_dim=3,
               commitment_weight=0.25)


@functools.cache
def params():
    made = jax.jit(VQAutoencoder(CFG).init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    return made | {"codebook": jax.random.normal(jax.random.key(1), (7, 3))}


def pictures(number: int):
    return np.random.default_rng(0).integers(0, 256, (number, 8, 8, 3), np.uint8)


def test_the_nearest_code_by_squared_distance():
    z, book = np.random.default_rng(0).normal(size=(2, 50, 3)), np.random.default_rng(1).normal(size=(9, 3))
    want = ((z[:, :, None] - book) ** 2).sum(-1).argmin(-1)
    codes = nearest(jnp.float32(z), jnp.float32(book))
    assert codes.dtype == jnp.int32 and len(np.unique(want)) > 5
    np.testing.assert_array_equal(codes, want)


def test_codes_and_pictures():
    """A picture's codes are those nearest to its encoded grid; the decoder is given their vectors."""
    codec, images = VQCodec(CFG, params()), pictures(40)
    codes = codec.encode(images)
    assert codes.shape == (40, *codec.shape) == (40, 2, 2) and codes.dtype == codec.dtype == np.int32
    encode, decode = (jax.jit(functools.partial(VQAutoencoder(CFG).apply, {"params": params()}, method=name))
                      for name in ("encode", "decode"))
    z, book = np.asarray(encode(to_unit(images))), np.asarray(params()["codebook"])
    np.testing.assert_array_equal(codes, ((z[..., None, :] - book) ** 2).sum(-1).argmin(-1))
    assert len(np.unique(codes)) > 2 and codec.num_codes == 7
    decoded = to_pixels(decode(book[codes]))
    assert np.abs(codec.decode(codes).astype(int) - np.asarray(decoded)).max() <= 1  # rounding


def test_a_saved_codec_is_the_same(tmp_path):
    codec = VQCodec(CFG, params())
    codec.save(tmp_path / "codec.npz")
    again = load(tmp_path / "codec.npz")
    assert isinstance(again, VQCodec) and again.fingerprint == codec.fingerprint
    assert dataclasses.replace(again.cfg, commitment_weight=CFG.commitment_weight) == CFG
    codes = codec.encode(pictures(3))
    np.testing.assert_array_equal(again.encode(pictures(3)), codes)
    np.testing.assert_array_equal(again.decode(codes), codec.decode(codes))


def test_the_fingerprint_is_of_the_codebook_too():
    other = params() | {"codebook": params()["codebook"] + 1e-6}
    assert VQCodec(CFG, other).fingerprint != VQCodec(CFG, params()).fingerprint


def test_any_number_in_chunks_on_all_devices():
    codec, images = VQCodec(CFG, params()), pictures(base.CHUNK + 1)
    alone = codec.encode(images)
    assert len(alone) == len(images) and codec._encode._cache_size() == 1
    with jax.set_mesh(sharding.make_mesh(MeshConfig(1, -1, 1, 1))):
        np.testing.assert_array_equal(codec.encode(images), alone)
        assert len(codec.decode(alone)) == len(images)


@pytest.mark.parametrize("codes", [np.full((1, 2, 2), 7), np.full((1, 2, 2), -1), np.zeros((1, 2, 2))],
                         ids=["above", "below", "floats"])
def test_what_is_no_code_of_its_own_is_refused(codes):
    with pytest.raises(UserError, match="whole numbers from 0 to 6: they are another codec's"):
        VQCodec(CFG, params()).decode(codes)
