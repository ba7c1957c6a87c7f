"""The forward process, its two targets, and the way back from each."""

import jax.numpy as jnp
import numpy as np
import pytest

from tfusion.diffusion.process import add_noise, match, target, to_x0_eps

A = np.float32([1e-4, 0.01, 0.3, 0.7, 0.999]).reshape(5, 1)
SHAPE = (5, 1, 3, 3, 2)  # (B, I, h, w, c), with a of shape (B, I)


def x0_and_eps(seed: int = 0):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(SHAPE).astype(np.float32) for _ in range(2))


def wide(a):
    return a.astype(np.float64).reshape(5, 1, 1, 1, 1)


def test_add_noise_is_ddpm_equation_4():
    x0, eps = x0_and_eps()
    expected = np.sqrt(wide(A)) * x0 + np.sqrt(1 - wide(A)) * eps
    np.testing.assert_allclose(add_noise(x0, eps, A), expected, rtol=1e-5, atol=1e-6)


def test_clean_stays_clean():
    x0, eps = x0_and_eps()
    np.testing.assert_array_equal(add_noise(x0, eps, jnp.ones((5, 1))), x0)


def test_noise_keeps_unit_variance():
    """For x0 of variance 1 the noisy x_t has variance 1 at every noise level."""
    rng = np.random.default_rng(1)
    x0, eps = (rng.standard_normal((5, 50_000)).astype(np.float32) for _ in range(2))
    np.testing.assert_allclose(np.var(add_noise(x0, eps, A[:, 0]), axis=1), 1, atol=0.03)


def test_targets_are_their_definitions():
    """eps (DDPM, equation 14); v = sqrt(a) eps - sqrt(1 - a) x0 (Salimans & Ho)."""
    x0, eps = x0_and_eps()
    np.testing.assert_array_equal(target("eps", x0, eps, A), eps)
    expected = np.sqrt(wide(A)) * eps - np.sqrt(1 - wide(A)) * x0
    np.testing.assert_allclose(target("v", x0, eps, A), expected, rtol=1e-5, atol=1e-6)


def test_v_is_the_derivative_of_x_along_the_angle():
    """x(phi) = cos(phi) x0 + sin(phi) eps has dx/dphi = v: what the name 'velocity' means."""
    x0, eps = x0_and_eps()
    phi, d = np.arccos(np.sqrt(wide(A))), 1e-4

    def x(phi):
        return np.cos(phi) * x0 + np.sin(phi) * eps

    np.testing.assert_allclose(
        target("v", x0, eps, A), (x(phi + d) - x(phi - d)) / (2 * d), atol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_x0_and_eps_come_back_from_the_target(prediction):
    """Round trip; eps-prediction divides by sqrt(a), so its float32 error grows up to 100-fold."""
    x0, eps = x0_and_eps()
    out = target(prediction, x0, eps, A)
    got_x0, got_eps = to_x0_eps(prediction, out, add_noise(x0, eps, A), A)
    np.testing.assert_allclose(got_eps, eps, atol=1e-5)
    np.testing.assert_allclose(got_x0, x0, atol=1e-4 if prediction == "eps" else 1e-5)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_x0_and_eps_agree_with_x_t_for_any_output(prediction):
    """Whatever the network says, its x0 and eps mix back to the x_t it was shown."""
    x_t, out = x0_and_eps(3)
    x0, eps = to_x0_eps(prediction, out, x_t, A)
    np.testing.assert_allclose(add_noise(x0, eps, A), x_t, atol=1e-4)


def test_unknown_prediction_is_an_error():
    with pytest.raises(KeyError):
        target("x0", *x0_and_eps(), A)


def test_match_broadcasts_from_the_left():
    assert match(A, np.zeros(SHAPE)).shape == (5, 1, 1, 1, 1)
    assert match(jnp.float32(0.5), np.zeros((2, 3))).shape == (1, 1)
