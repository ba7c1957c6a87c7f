"""Rectified flow against the same truth as ddpm's: a Gaussian mixture whose velocity is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion.test_sampler import COVARIANCE, MEAN, MEANS, NUM_SAMPLES, WEIGHTS, keys, posterior_mean
from tfusion.diffusion import losses, sampler
from tfusion.diffusion.flow import FlowConfig, flow
from tfusion.diffusion.process import DDPMConfig
from tfusion.errors import UserError


def denoiser(process):
    """What a network that knows the velocity E[eps - x0 | x_t] would tell the sampler."""
    def denoise(x, t):
        scale = jnp.sqrt((1 - t[0]) ** 2 + t[0] ** 2)  # x_t over it has signal power a and noise power 1 - a
        x0 = posterior_mean(x / scale, ((1 - t[0]) / scale) ** 2)
        eps = (x - (1 - t[0]) * x0) / t[0]
        return process.estimate(process.target(x0, eps, t), x, t)

    return denoise


@pytest.mark.parametrize("shift, steps", [(1.0, 250), (3.0, 250), (1.0, 50)])
def test_truth_exact_velocity(shift, steps):
    """Mean within 0.02, covariance within 0.03 and shares within 0.01, as for ddpm's samplers; with 50 steps
    Euler's own error is more than that in the covariance, and within 0.06."""
    process = flow("uniform", shift)
    draw = jax.jit(lambda keys_B: sampler.sample(process, denoiser(process), keys_B, (2,), "euler", steps))
    x = np.asarray(draw(keys(NUM_SAMPLES)), np.float64)
    nearest = np.argmin(((x[:, None] - MEANS) ** 2).sum(-1), axis=1)
    shares = np.bincount(nearest, minlength=3) / NUM_SAMPLES
    assert np.abs(x.mean(0) - MEAN).max() < 0.02 and np.abs(shares - WEIGHTS).max() < 0.01
    assert np.abs(np.cov(x.T) - COVARIANCE).max() < (0.03 if steps == 250 else 0.06)


def test_corruption_target_and_estimate_are_one_line():
    """x_t between x0 and eps, d x_t / dt the target, and both ends come back from x_t and the velocity."""
    process, t = flow("uniform", 1.0), jnp.float32([0.25, 1.0])
    x0, eps = jax.random.normal(jax.random.key(0), (2, 2, 3, 3, 1))
    x_t, v = process.corrupt(x0, eps, t), process.target(x0, eps, t)
    np.testing.assert_allclose(x_t[0], 0.75 * x0[0] + 0.25 * eps[0], rtol=1e-6)
    np.testing.assert_array_equal(x_t[1], eps[1])
    np.testing.assert_allclose((process.corrupt(x0, eps, t + 0.1) - x_t) / 0.1, v, atol=2e-6)
    for got, want in zip(process.estimate(v, x_t, t), (x0, eps)):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_an_euler_step_keeps_the_velocity_and_the_last_returns_x0():
    process, t, s = flow("uniform", 1.0), jnp.full(2, 0.8), jnp.float32([0.5, 0.0])
    x0, eps = jax.random.normal(jax.random.key(1), (2, 2, 4))
    x_t = process.corrupt(x0, eps, t)
    out = process.step("euler")(x0, eps, x_t, jnp.nan, t, s)
    np.testing.assert_allclose(out, x_t + (s - t)[:, None] * (eps - x0), atol=1e-6)
    np.testing.assert_array_equal(out[1], x0[1])


def test_logit_normal_times_are_that_and_shifted_ones_too():
    """Quartiles of logit(t): those of a normal, +- 0.6745; a shift moves the logit by its logarithm."""
    u = jnp.linspace(0, 1, 100_001)[:-1]
    for shift in (1.0, 3.0):
        t = np.asarray(flow("logit_normal", shift).times(u, 1.0), np.float64)
        quartiles = np.quantile(np.log(t / (1 - t)), (0.25, 0.5, 0.75)) - np.log(shift)
        np.testing.assert_allclose(quartiles, (-0.6745, 0, 0.6745), atol=2e-3)


@pytest.mark.parametrize("times", ["uniform", "logit_normal"])
def test_times_stay_within_the_limit_and_above_nothing(times):
    u = jnp.float32([0.0, 0.3, 0.999_999_9])
    t = np.asarray(flow(times, 2.0).times(u, jnp.float32(0.4)))
    assert (t > 0).all() and (t <= 0.4).all() and (np.diff(t) < 0).all()
    assert flow(times, 2.0).times(0.3, 0.0) == 0


def test_the_grid_goes_from_one_to_zero_and_is_shifted_as_training_is():
    grid = flow("uniform", 3.0).grid(4)
    np.testing.assert_allclose(grid, [1, 0.9, 0.75, 0.5, 0], atol=1e-6)
    trained = flow("uniform", 3.0).times(jnp.float32([0.25, 0.5, 0.75]), 1.0)
    np.testing.assert_allclose(grid[1:4], trained, atol=1e-6)


def test_evaluation_meets_the_same_noise_under_any_process():
    """Keyed by names alone: u and eps are those of ddpm, whatever t becomes of u."""
    ids, limit = jnp.uint32([[[3, 1], [4, 1]]]), jnp.ones((1, 2))
    draws = [losses.draw_noise(process, jax.random.key(0), ids, limit, (2, 2, 1))
             for process in (flow("uniform", 1.0), DDPMConfig("ddpm", "v", 1000).make())]
    np.testing.assert_array_equal(draws[0][1], draws[1][1])
    np.testing.assert_allclose(draws[0][0], draws[1][0], atol=1e-3)


def test_samplers_of_the_other_process_are_refused():
    check = functools.partial(FlowConfig("flow", "uniform", 1.0).check_sampling, num_inference_steps=50)
    check("euler")
    with pytest.raises(UserError, match=r"sampling.sampler = 'ddim'; choices: euler"):
        check("ddim")
