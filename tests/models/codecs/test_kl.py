"""The KL autoencoder as a network, and as the codec of a run's pictures."""

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
from tfusion.models.codecs.kl import Autoencoder, AutoencoderConfig, KLCodec, to_pixels, to_unit

CFG = AutoencoderConfig(image_size=8, latent_channels=3, downsample=4, width=8, num_blocks=1, kl_weight=0.25)


@functools.cache
def params(cfg=CFG):
    size = cfg.image_size
    return jax.jit(Autoencoder(cfg).init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]


def pictures(number: int, size: int = 8):
    return np.random.default_rng(0).integers(0, 256, (number, size, size, 3), np.uint8)


def test_pixels_round_trip():
    """All 256 values; the ends are -1 and 1, and what overshoots is clipped."""
    values = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_pixels(to_unit(values)), values)
    assert float(to_unit(values)[0]) == -1 and float(to_unit(values)[-1]) == 1
    np.testing.assert_array_equal(to_pixels(jnp.array([-3.0, 3.0])), [0, 255])


def test_encode_and_decode_keep_the_picture_grid():
    """A latent pixel is made from its own downsample x downsample block, and decoded near it: without
    3 x 3 blocks (num_blocks = 0) the encoder sees nothing else."""
    model = Autoencoder(dataclasses.replace(CFG, num_blocks=0))
    x = jnp.zeros((1, 8, 8, 3))
    params = jax.jit(model.init)(jax.random.key(0), x)
    encode = jax.jit(lambda x: model.apply(params, x, method="encode")[0])
    plain = encode(x)
    for row, column in np.ndindex(2, 2):
        spotted = x.at[0, 4 * row + 1, 4 * column + 2].set(1.0)
        moved = np.asarray(encode(spotted) != plain)[0].any(-1)
        expected = np.zeros((2, 2), bool)
        expected[row, column] = True
        np.testing.assert_array_equal(moved, expected)
    assert jax.eval_shape(lambda z: model.apply(params, z, method="decode"), plain).shape == x.shape


# ---------------------------------------------------------------- as a codec

def test_latents_are_the_posteriors_mean_normalised():
    """By channel to mean 0 and deviation 1 over the pictures of its fit; the decoder takes that back."""
    codec, images = KLCodec.fit(CFG, params(), pictures(40)), pictures(40)
    latents = codec.encode(images)
    assert latents.shape == (40, *codec.shape) == (40, 2, 2, 3) and latents.dtype == codec.dtype
    np.testing.assert_allclose(latents.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(latents.std((0, 1, 2)), 1, atol=1e-5)
    mean = Autoencoder(CFG).apply({"params": params()}, to_unit(images), method="encode")[0]
    np.testing.assert_allclose(latents * codec.std + codec.mean, mean, atol=1e-5)
    decoded = to_pixels(Autoencoder(CFG).apply({"params": params()}, mean, method="decode"))
    assert np.abs(codec.decode(latents).astype(int) - np.asarray(decoded)).max() <= 1  # rounding


def test_a_saved_codec_is_the_same(tmp_path):
    codec = KLCodec.fit(CFG, params(), pictures(10))
    codec.save(tmp_path / "codec.npz")
    again = load(tmp_path / "codec.npz")
    assert again.fingerprint == codec.fingerprint
    assert dataclasses.replace(again.cfg, kl_weight=CFG.kl_weight) == CFG
    np.testing.assert_array_equal(again.encode(pictures(3)), codec.encode(pictures(3)))


def test_the_fingerprint_is_of_weights_and_normalisation():
    codec = KLCodec.fit(CFG, params(), pictures(10))
    other = jax.tree.map(lambda x: x + 1e-6, params())
    assert KLCodec(CFG, params(), codec.mean, codec.std).fingerprint == codec.fingerprint
    assert KLCodec(CFG, other, codec.mean, codec.std).fingerprint != codec.fingerprint
    assert KLCodec(CFG, params(), codec.mean + 1e-3, codec.std).fingerprint != codec.fingerprint


@pytest.mark.parametrize("images", [pictures(2, 16), pictures(2).astype(np.float32)], ids=["size", "type"])
def test_pictures_that_are_not_its_own_are_refused(images):
    with pytest.raises(UserError, match=r"the codec was trained on uint8 \(8, 8, 3\)"):
        KLCodec.fit(CFG, params(), pictures(2)).encode(images)


@pytest.mark.parametrize("number", [1, base.CHUNK, base.CHUNK + 1])
def test_any_number_of_pictures_in_chunks_of_one_size(number):
    codec, images = KLCodec(CFG, params(), np.zeros(3), np.ones(3)), pictures(number)
    latents = codec.encode(images)
    assert len(latents) == number == len(codec.decode(latents))
    np.testing.assert_allclose(latents[-1], codec.encode(images[-1:])[0], atol=1e-5)
    assert codec._encode._cache_size() == 1


def test_pictures_are_encoded_on_all_devices_of_the_mesh(monkeypatch):
    """In a chunk's rows; the latents are those of one device, as is what is saved."""
    codec, images = KLCodec.fit(CFG, params(), pictures(40)), pictures(300)
    alone, seen = codec.encode(images), []
    encode = codec._encode
    monkeypatch.setattr(codec, "_encode", lambda x: seen.append(x) or encode(x))
    with jax.set_mesh(sharding.make_mesh(MeshConfig(1, -1, 1, 1))):
        spread = codec.encode(images)
        again = KLCodec.fit(CFG, params(), pictures(40))
    assert [len(x.sharding.device_set) for x in seen] == [8, 8]
    assert {shard.data.shape for shard in seen[0].addressable_shards} == {(base.CHUNK // 8, 8, 8, 3)}
    np.testing.assert_allclose(spread, alone, atol=2e-6)  # programs of other sizes round differently
    np.testing.assert_allclose(again.std, codec.std, rtol=1e-5)
