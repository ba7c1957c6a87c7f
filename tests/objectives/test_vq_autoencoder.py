"""The VQ autoencoder's objective: whose gradient each loss is, and how dead codes begin anew.

B batch, K codes, c code_dim, n vectors of a batch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import quickstart
from tfusion import config, sharding
from tfusion.config import MeshConfig
from tfusion.models.codecs.network import to_unit
from tfusion.models.codecs.vq import VQAutoencoder
from tfusion.objectives import make_objective, vq_autoencoder
from tfusion.objectives.base import Aux
from tfusion.objectives.vq_autoencoder import DEAD, USAGE_DECAY
from tfusion.types import ImageBatch

K, c = 6, 3
restarted = jax.jit(vq_autoencoder.restarted)


pytestmark = pytest.mark.usefixtures("quick_compiles")


@functools.cache
def tiny():
    """(cfg, objective, params, buffers): 8 x 8 pictures, a grid of 2 x 2; code = parameter + origin."""
    tree = quickstart.get_config("smoke,vq")
    tree.autoencoder.update(image_size=8, downsample=4, width=8, num_codes=K, code_dim=c)
    cfg = config.from_dict(tree)
    obj = make_objective(cfg)
    first, second = jax.random.normal(jax.random.key(1), (2, K, c))
    params = jax.jit(obj.init)(jax.random.key(0)) | {"codebook": first}
    return cfg, obj, params, obj.init_buffers(None) | {"origin": second}


def pictures(rows: int = 4):
    images = np.random.default_rng(0).integers(0, 256, (rows, 8, 8, 3), dtype=np.uint8)
    return ImageBatch(np.arange(10, 10 + rows, dtype=np.int32), images)


@functools.cache
def network():
    """(encode, decode) of (params, x), jitted; the codebook; the pictures in -1..1."""
    cfg, _, params, buffers = tiny()
    model = VQAutoencoder(cfg.autoencoder)
    encode, decode = (jax.jit(lambda params, x, name=name: model.apply({"params": params}, x, method=name))
                      for name in ("encode", "decode"))
    return encode, decode, np.asarray(params["codebook"] + buffers["origin"]), to_unit(pictures().images_BHWC)


def nearest_of(z, book):
    return ((np.asarray(z)[..., None, :] - book) ** 2).sum(-1).argmin(-1)


@functools.cache
def losses():
    """({loss: sum}, {loss: count}, function that takes the sums' cotangents back to the parameters)."""
    _, obj, params, buffers = tiny()

    def sums(params):
        found = obj.loss(params, Aux(0, {}, buffers), pictures(), jax.random.key(0))
        return tuple({name: pair[i] for name, pair in found.items()} for i in (0, 1))

    sums, back, counts = jax.vjp(jax.jit(sums), params, has_aux=True)
    return sums, counts, jax.jit(back)


def gradient(name: str):
    sums, _, back = losses()
    return back({each: jnp.float32(each == name) for each in sums})[0]


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), a, b)


def test_losses_and_counts_by_hand():
    encode, decode, book, x = network()
    _, obj, params, _ = tiny()
    z = np.asarray(encode(params, x))
    e = book[nearest_of(z, book)]
    error, distance = np.asarray(decode(params, e) - x), ((z - e) ** 2).sum()
    sums, counts, _ = losses()
    close(sums, {"reconstruction_l1": np.abs(error).sum(), "reconstruction_mse": (error**2).sum(),
                 "codebook": distance, "commitment": distance})
    want = dict(reconstruction_l1=4 * 192, reconstruction_mse=4 * 192, codebook=16 * c, commitment=16 * c)
    assert want == jax.tree.map(int, counts) == jax.tree.map(int, obj.counts(pictures()))
    assert obj.weights == {"reconstruction_l1": 1, "reconstruction_mse": 1, "codebook": 1, "commitment": 0.25}


def test_the_reconstructions_gradient_goes_straight_through():
    """The encoder is given the decoder's at e, as if it had been z; the codebook nothing."""
    encode, decode, book, x = network()
    params = tiny()[2]
    z, back = jax.vjp(lambda params: encode(params, x), params)
    e = jnp.asarray(book[nearest_of(z, book)])
    decoded, back_e = jax.vjp(decode, params, e)
    decoders, at_e = back_e(2 * (decoded - x))
    got = gradient("reconstruction_mse")
    close(got, jax.tree.map(jnp.add, decoders, back(at_e)[0]))
    assert not np.any(got["codebook"]) and np.abs(got["encoder_in"]["kernel"]).max() > 0.1


def test_the_codebook_learns_by_its_loss_alone():
    """sum of 2 (e - z) over the vectors of a code; nothing else learns by it."""
    encode, _, book, x = network()
    z = np.asarray(encode(tiny()[2], x))
    codes, want = nearest_of(z, book), np.zeros((K, c))
    np.add.at(want, codes, 2 * (book[codes] - z))
    got = dict(gradient("codebook"))
    close(got.pop("codebook"), want)
    assert not any(np.any(x) for x in jax.tree.leaves(got)) and (want != 0).any(1).sum() > 1


def test_the_encoder_commits_to_its_codes():
    encode, _, book, x = network()
    z, back = jax.vjp(lambda params: encode(params, x), tiny()[2])
    got = gradient("commitment")
    close(got, back(2 * (z - book[nearest_of(z, book)]))[0])
    assert not np.any(got["codebook"])


# ---------------------------------------------------------------- dead codes

def test_usage_is_averaged_over_steps():
    params, z = {"codebook": jnp.eye(4, 2)}, jnp.eye(4, 2)[jnp.array([0, 0, 0, 1])]
    buffers = {"origin": jnp.zeros((4, 2)), "usage": jnp.full(4, 0.5)}
    after, share = restarted(params, buffers, z, jnp.zeros(4)), np.array([0.75, 0.25, 0, 0])
    np.testing.assert_allclose(after["usage"], 0.5 * USAGE_DECAY + (1 - USAGE_DECAY) * share, rtol=1e-6)
    assert not np.any(after["origin"])


def test_a_dead_code_begins_anew_at_a_vector_of_the_batch():
    """Codes 1 and 3 are dead: they go to the vectors that are far from their own code, each to another; code 2,
    used seldom, stays. A code is where its parameter and its origin together are."""
    params = {"codebook": jnp.full((4, 2), 0.5)}
    book = jnp.array([[0.0, 0], [50, 0], [30, 30], [60, 0]])
    buffers = {"origin": book - 0.5, "usage": jnp.array([0.9, 0, 1.1 * DEAD / 4 / USAGE_DECAY, 0])}
    z = jnp.array([[0.0, 0], [0, 9], [0, 0], [9, 0]])
    after = restarted(params, buffers, z, jnp.zeros(4))
    codes = np.asarray(vq_autoencoder.codebook(params, after))
    assert {tuple(code) for code in codes[[1, 3]].tolist()} == {(0, 9), (9, 0)}
    np.testing.assert_array_equal(codes[[0, 2]], book[jnp.array([0, 2])])
    np.testing.assert_allclose(after["usage"][jnp.array([1, 3])], 1 / 4)
    again = restarted(params, after, z, jnp.zeros(4))
    np.testing.assert_array_equal(again["origin"][jnp.array([0, 1, 3])], after["origin"][jnp.array([0, 1, 3])])


def test_more_dead_codes_than_vectors():
    """As many as there are vectors begin anew; the others wait."""
    params, z = {"codebook": jnp.zeros((5, 2))}, jnp.array([[1.0, 2], [3, 4]])
    buffers = {"origin": jnp.zeros((5, 2)), "usage": jnp.zeros(5)}
    after = restarted(params, buffers, z, jnp.zeros(2))
    moved = np.asarray(after["origin"]).any(1)
    assert moved.sum() == 2 and {tuple(x) for x in np.asarray(after["origin"])[moved]} == {(1, 2), (3, 4)}


def test_vectors_are_drawn_by_their_squared_distance():
    """Of two at distances 1 and 3 the farther is taken nine times in ten."""
    z = jnp.array([[1.0, 0], [0, 3]])
    noise = jax.random.gumbel(jax.random.key(0), (2000, 2))

    def first(gumbel):
        buffers = {"origin": jnp.array([[0.0, 0], [90, 90]]), "usage": jnp.array([1.0, 0])}
        return restarted({"codebook": jnp.zeros((2, 2))}, buffers, z, gumbel)["origin"][1, 1] == 3

    assert float(jnp.mean(jax.jit(jax.vmap(first))(noise))) == pytest.approx(0.9, abs=0.02)


def after_update(params, buffers, batch, key):
    return jax.jit(tiny()[1].after_update)(params, buffers, batch, jax.random.key(key))


def test_every_code_begins_in_the_first_batch():
    """The codebook starts as zeros, and nothing has been used."""
    _, obj, params, _ = tiny()
    params = params | {"codebook": jnp.zeros((K, c))}
    after = after_update(params, obj.init_buffers(None), pictures(), 3)
    z = np.asarray(network()[0](params, network()[3])).reshape(-1, c)
    began = np.asarray(after["origin"])
    at = np.abs(z[:, None] - began).max(-1).argmin(0)
    np.testing.assert_allclose(began, z[at], rtol=1e-5, atol=1e-6)
    assert len(set(at)) == K
    assert not np.any(jax.jit(obj.init)(jax.random.key(0))["codebook"])


def test_restarts_are_the_same_on_any_mesh():
    """Of one device and of four, and of rows in another order: drawn by row, over the whole batch."""
    _, _, params, buffers = tiny()
    params, buffers, batch = *jax.device_get((params, buffers)), pictures(8)
    alone = jax.device_get(after_update(params, buffers, batch, 3))
    with jax.set_mesh(mesh := sharding.make_mesh(MeshConfig(2, 2, 1, 1), jax.devices()[:4])):
        spread = jax.device_get(after_update(params, buffers, sharding.put_batch(batch, mesh, 8), 3))
    close(spread, alone)
    order = np.array([5, 2, 7, 0, 1, 3, 6, 4])
    close(after_update(params, buffers, jax.tree.map(lambda x: x[order], batch), 3), alone)
    other = after_update(params, buffers, batch, 4)
    assert np.abs(np.asarray(other["origin"]) - alone["origin"]).max() > 0.01
