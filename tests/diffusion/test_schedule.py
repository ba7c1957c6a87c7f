"""The cosine schedule: formula, floor, ends; and the grid of discrete steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfusion.diffusion.schedule import ALPHA_BAR_MIN, COSINE_S, alpha_bar, quantize

T = np.arange(1, 1001) / 1000


def cosine_formula(t):
    """Nichol & Dhariwal, equation 17, in float64."""
    def f(t):
        return np.cos((t + 0.008) / (1 + 0.008) * np.pi / 2) ** 2

    return f(t) / f(0)


def test_alpha_bar_is_the_cosine_formula_above_its_floor():
    np.testing.assert_allclose(alpha_bar(T), np.maximum(cosine_formula(T), 1e-4), rtol=2e-4, atol=1e-7)
    assert COSINE_S == 0.008 and ALPHA_BAR_MIN == 1e-4


def test_alpha_bar_ends():
    """Clean at 0 exactly; at 1 the floor, so that an error in eps grows at most 100-fold."""
    assert float(alpha_bar(0.0)) == 1.0
    assert float(alpha_bar(1.0)) == pytest.approx(1e-4, rel=1e-5)
    amplification = np.sqrt((1 - np.asarray(alpha_bar(T))) / np.asarray(alpha_bar(T)))
    assert amplification.max() <= 100


def test_alpha_bar_falls_strictly_until_its_floor():
    steps = np.diff(np.asarray(alpha_bar(np.concatenate([[0], T]))))
    assert (steps <= 0).all() and (steps[:993] < 0).all()


def test_floor_touches_the_last_steps_only():
    assert np.all(cosine_formula(T[T <= 0.993]) > 1e-4)
    assert (np.asarray(alpha_bar(T[T > 0.995])) == np.float32(1e-4)).all()


def test_alpha_bar_is_float32_of_any_shape_under_jit():
    t = jnp.asarray(T.reshape(10, 100), jnp.bfloat16)
    assert alpha_bar(t).dtype == jnp.float32
    np.testing.assert_allclose(jax.jit(alpha_bar)(t), alpha_bar(t), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("num_timesteps", [1, 10, 1000])
def test_quantize_rounds_up_to_the_grid(num_timesteps):
    """t in (0, 1] goes to the next n / num_timesteps, n >= 1; 0 stays 0, or a clean image would be noised."""
    u = np.random.default_rng(0).random(10_000).astype(np.float32)
    t = np.concatenate([1 - u, np.float32([1e-7, 1.0])])
    q = np.asarray(quantize(jnp.asarray(t), num_timesteps))
    n = q * num_timesteps
    np.testing.assert_allclose(n, np.round(n), atol=1e-4)
    assert (n > 0.5).all() and q.max() == 1
    assert ((q >= t - 1e-6) & (q < t + 1 / num_timesteps + 1e-6)).all()
    assert float(quantize(jnp.float32(0), num_timesteps)) == 0


def test_quantize_reaches_every_step_equally():
    """t = 1 - u uniform: each of 1000 steps is as likely as any other."""
    t = jnp.asarray((np.arange(100_000) + 0.5) / 100_000, jnp.float32)
    n = np.round(np.asarray(quantize(t, 1000)) * 1000).astype(int)
    counts = np.bincount(n, minlength=1001)
    assert counts[0] == 0 and counts[1:].min() >= 99 and counts[1:].max() <= 101
