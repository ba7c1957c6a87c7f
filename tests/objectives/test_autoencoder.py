"""The autoencoder's objective: its three losses, their counts and the posterior's noise.

B batch, H W C picture, h w c latent.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import quickstart
from tfusion import config
from tfusion.models.codecs.kl import Autoencoder
from tfusion.objectives import make_objective
from tfusion.objectives.autoencoder import kl_divergence
from tfusion.objectives.base import Aux
from tfusion.types import ImageBatch

pytestmark = pytest.mark.usefixtures("quick_compiles")


@functools.cache
def tiny():
    """(cfg, objective, jitted loss, params), compiled once; 8 x 8 pictures, 2 x 2 x 3 latents."""
    tree = quickstart.get_config("smoke,autoencoder")
    tree.autoencoder.update(image_size=8, latent_channels=3, width=8, downsample=4, kl_weight=0.25)
    cfg = config.from_dict(tree)
    obj = make_objective(cfg)
    loss = jax.jit(lambda params, batch, key: obj.loss(params, Aux(0, {}, {}), batch, key))
    return cfg, obj, loss, jax.jit(obj.init)(jax.random.key(0))


def pictures(rows: int = 4):
    images = np.random.default_rng(0).integers(0, 256, (rows, 8, 8, 3), dtype=np.uint8)
    return ImageBatch(np.arange(10, 10 + rows, dtype=np.int32), images)


def test_kl_is_the_integral_of_its_definition():
    """KL(q || N(0, 1)) = the integral of q log(q / p), on a fine grid; summed over elements."""
    mean, log_variance = np.array([[0.0, 1.5], [-0.7, 0.2]]), np.array([[0.0, -1.0], [0.8, -3.0]])
    x = np.linspace(-15, 15, 300_001)
    total = 0.0
    for m, v in zip(mean.ravel(), np.exp(log_variance).ravel()):
        log_q = -0.5 * ((x - m) ** 2 / v + np.log(2 * np.pi * v))
        log_p = -0.5 * (x**2 + np.log(2 * np.pi))
        total += np.trapezoid(np.exp(log_q) * (log_q - log_p), x)
    assert float(kl_divergence(mean, log_variance)) == pytest.approx(total, rel=1e-4)


def test_kl_is_zero_at_the_prior_only():
    zero = jnp.zeros((2, 3))
    assert float(kl_divergence(zero, zero)) == 0
    assert float(kl_divergence(zero + 0.1, zero)) > 0 and float(kl_divergence(zero, zero + 0.1)) > 0


def test_losses_against_numpy():
    """L1 and L2 per pixel value of decode(mean + sigma * noise) in -1..1, KL per picture."""
    cfg, _, loss, params = tiny()
    batch, key = pictures(), jax.random.key(3)
    model = Autoencoder(cfg.autoencoder)
    x = batch.images_BHWC / 127.5 - 1
    encode, decode = (jax.jit(functools.partial(model.apply, {"params": params}, method=name))
                      for name in ("encode", "decode"))
    mean, log_variance = encode(jnp.float32(x))
    noise = np.stack([jax.random.normal(jax.random.fold_in(key, row), (2, 2, 3)) for row in batch.row_ids_B])
    decoded = decode(mean + np.exp(0.5 * log_variance) * noise)
    error = np.asarray(decoded, np.float64) - x
    mean, log_variance = (np.asarray(v, np.float64) for v in (mean, log_variance))
    kl = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance).sum()
    expected = {"reconstruction_l1": (np.abs(error).sum(), x.size),
                "reconstruction_mse": ((error**2).sum(), x.size), "kl": (kl, 4)}
    losses = loss(params, batch, key)
    assert losses.keys() == expected.keys()
    for name, (total, count) in expected.items():
        assert float(losses[name][0]) == pytest.approx(total, rel=1e-4)
        assert int(losses[name][1]) == count


def test_loss_counts_are_the_objectives_counts():
    _, obj, loss, params = tiny()
    losses, counts = loss(params, pictures(), jax.random.key(0)), obj.counts(pictures())
    assert set(counts) == set(obj.weights)
    assert {name: int(losses[name][1]) for name in counts} == {k: int(v) for k, v in counts.items()}


def test_posterior_noise_is_keyed_by_the_global_row():
    """Same rows in another order: the same sums; the same pictures under other row numbers: not."""
    _, _, loss, params = tiny()
    batch, key = pictures(), jax.random.key(1)
    order = np.array([2, 0, 3, 1])
    name = "reconstruction_mse"
    plain, permuted, renumbered = (float(loss(params, each, key)[name][0]) for each in (
        batch, jax.tree.map(lambda x: x[order], batch), batch._replace(row_ids_B=batch.row_ids_B[order])))
    assert permuted == pytest.approx(plain, rel=1e-5)
    assert abs(renumbered / plain - 1) > 1e-4


def test_weights_are_one_one_and_kl_weight():
    cfg, obj, _, _ = tiny()
    assert obj.weights == {"reconstruction_l1": 1.0, "reconstruction_mse": 1.0, "kl": 0.25}
    other = dataclasses.replace(cfg, autoencoder=dataclasses.replace(cfg.autoencoder, kl_weight=2.0))
    assert make_objective(other).weights["kl"] == 2.0
