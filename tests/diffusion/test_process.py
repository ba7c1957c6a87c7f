"""The forward process, its three targets, and the way back from each."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tfusion.diffusion.process import ddpm, match
from tfusion.diffusion.schedule import alpha_bar

PREDICTIONS = ("eps", "v", "x0")
T = np.float32([1.0, 0.93, 0.6, 0.3, 0.01]).reshape(5, 1)
SHAPE = (5, 1, 3, 3, 2)  # (B, I, h, w, c), with t of shape (B, I)
A = np.asarray(alpha_bar(T), np.float64).reshape(5, 1, 1, 1, 1)


def x0_and_eps(seed: int = 0):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(SHAPE).astype(np.float32) for _ in range(2))


def corrupt(x0, eps, t):
    return ddpm("eps", 1000).corrupt(x0, eps, t)


def test_corrupt_is_ddpm_equation_4():
    x0, eps = x0_and_eps()
    expected = np.sqrt(A) * x0 + np.sqrt(1 - A) * eps
    np.testing.assert_allclose(corrupt(x0, eps, T), expected, rtol=1e-5, atol=1e-6)


def test_clean_stays_clean():
    x0, eps = x0_and_eps()
    np.testing.assert_array_equal(corrupt(x0, eps, jnp.zeros((5, 1))), x0)


def test_noise_keeps_unit_variance():
    """For x0 of variance 1 the noisy x_t has variance 1 at every noise level."""
    rng = np.random.default_rng(1)
    x0, eps = (rng.standard_normal((5, 50_000)).astype(np.float32) for _ in range(2))
    np.testing.assert_allclose(np.var(corrupt(x0, eps, T[:, 0]), axis=1), 1, atol=0.03)


def test_targets_are_their_definitions():
    """eps (DDPM, equation 14); v = sqrt(a) eps - sqrt(1 - a) x0 (Salimans & Ho); x0."""
    x0, eps = x0_and_eps()
    np.testing.assert_array_equal(ddpm("eps", 1000).target(x0, eps, T), eps)
    np.testing.assert_array_equal(ddpm("x0", 1000).target(x0, eps, T), x0)
    np.testing.assert_allclose(ddpm("v", 1000).target(x0, eps, T), np.sqrt(A) * eps - np.sqrt(1 - A) * x0,
                               rtol=1e-5, atol=1e-6)


def test_v_is_the_derivative_of_x_along_the_angle():
    """x(phi) = cos(phi) x0 + sin(phi) eps has dx/dphi = v: what the name 'velocity' means."""
    x0, eps = x0_and_eps()
    phi, d = np.arccos(np.sqrt(A)), 1e-4

    def x(phi):
        return np.cos(phi) * x0 + np.sin(phi) * eps

    np.testing.assert_allclose(
        ddpm("v", 1000).target(x0, eps, T), (x(phi + d) - x(phi - d)) / (2 * d), atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_and_eps_come_back_from_the_target(prediction):
    """Round trip. eps-prediction divides by sqrt(a), x0-prediction by sqrt(1 - a): their float32 errors grow up
    to 100-fold at either end."""
    (x0, eps), process = x0_and_eps(), ddpm(prediction, 1000)
    got_x0, got_eps = process.estimate(process.target(x0, eps, T), process.corrupt(x0, eps, T), T)
    np.testing.assert_allclose(got_eps, eps, atol=1e-4 if prediction == "x0" else 1e-5)
    np.testing.assert_allclose(got_x0, x0, atol=1e-4 if prediction == "eps" else 1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_and_eps_agree_with_x_t_for_any_output(prediction):
    """Whatever the network says, its x0 and eps mix back to the x_t it was shown."""
    (x_t, out), process = x0_and_eps(3), ddpm(prediction, 1000)
    np.testing.assert_allclose(process.corrupt(*process.estimate(out, x_t, T), T), x_t, atol=1e-4)


def test_a_process_is_a_value():
    """Equal arguments give one value, so that a program compiled for it is found again."""
    assert ddpm("v", 1000) is ddpm("v", 1000) and hash(ddpm("v", 1000)) is not None
    assert ddpm("v", 1000) != ddpm("eps", 1000) and ddpm("v", 1000) != ddpm("v", 10)


def test_unknown_names_are_errors():
    with pytest.raises(KeyError):
        ddpm("score", 1000)
    with pytest.raises(KeyError):
        ddpm("v", 1000).step("euler")(*x0_and_eps(), *x0_and_eps(), T, T)


@pytest.mark.parametrize("steps", [1000, 250, 50, 25, 10, 3, 1])
def test_grid_runs_down_the_training_grid(steps):
    """From 1 to 0, strictly, in steps as equal as whole numbers of 1/1000 allow."""
    t = np.asarray(ddpm("eps", 1000).grid(steps))
    n = np.round(t * 1000)
    assert t.dtype == np.float32 and len(t) == steps + 1 and t[0] == 1 and t[-1] == 0
    np.testing.assert_allclose(t, n / 1000, atol=1e-6)
    assert set(-np.diff(n)) <= {1000 // steps, -(-1000 // steps)}


def test_match_broadcasts_from_the_left():
    assert match([T, T], np.zeros(SHAPE))[1].shape == (5, 1, 1, 1, 1)
    assert match([jnp.float32(0.5)], np.zeros((2, 3)))[0].shape == (1, 1)


def test_nobody_else_knows_the_schedule():
    """Another process must be one value: the rest asks a Process for scales, targets and steps."""
    package = Path(__file__).parents[2] / "tfusion"
    others = {path: path.read_text() for path in package.rglob("*.py") if path.parent.name != "diffusion"}
    assert not [path for path, text in others.items() if "alpha_bar" in text or "diffusion.schedule" in text]
