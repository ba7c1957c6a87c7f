"""Every DDPM and DDIM step is diffusers', given the same alphabar, timesteps, x_t, network output and noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.external import inputs, write_references
from tfusion.diffusion import process
from tfusion.diffusion.schedule import alpha_bar

COMMITTED = np.load(inputs.REFERENCES)
TOLERANCE = 5e-7  # a few roundings in float32, of a step's largest number
ALPHAS = COMMITTED["alphas"]  # float32, alphabar(n / 1000) at n - 1


@pytest.fixture(params=["committed", "installed"])
def scheduler_steps(request):
    """case -> (timesteps, x_s): as the file holds them, as the software gives them now."""
    if request.param == "committed":
        return lambda case: (COMMITTED[f"timesteps_{case[-1]}"], COMMITTED[inputs.case_name(*case)])
    for name in ("torch", "diffusers"):
        pytest.importorskip(name, reason=f"{name} is not installed: {inputs.INSTALL}")
    return lambda case: write_references.scheduler_steps(case, ALPHAS)


def test_the_alphas_are_ours():
    """Steps are compared on the stored ones: another machine's cosine may differ in its last bit."""
    n = np.arange(1, inputs.NUM_TIMESTEPS + 1)
    np.testing.assert_allclose(alpha_bar(n / inputs.NUM_TIMESTEPS), ALPHAS, rtol=0, atol=2e-7)


@pytest.mark.parametrize("case", inputs.CASES, ids=lambda case: inputs.case_name(*case))
def test_every_step_equals_diffusers(scheduler_steps, case):
    """Within TOLERANCE of the largest number that goes into the step. Measured: 3.5e-7 in DDIM's 250 steps on
    eps, which divide it by sqrt(alphabar) and multiply it again, 2.3e-7 elsewhere.
    """
    name, variance, prediction, steps = case
    timesteps, theirs = scheduler_steps(case)
    grid = process.ddpm(prediction, inputs.NUM_TIMESTEPS).grid(steps)
    n = np.rint(np.asarray(grid) * inputs.NUM_TIMESTEPS).astype(int)
    np.testing.assert_array_equal(n[:-1], timesteps + 1)  # they count from 0, and go to "-1" last
    alphas = np.concatenate([[np.float32(1)], ALPHAS])
    a, b, (x_t, network, z) = alphas[n[:-1]], alphas[n[1:]], inputs.step_inputs(steps)

    @jax.jit
    def step(x_t, network, z, a, b):
        scales = process.match((jnp.sqrt(a), jnp.sqrt(1 - a)), x_t)
        x0, eps = process.ESTIMATES[prediction](network, x_t, *scales)
        return x0, process.STEPS[name](x0, eps, x_t, z, a, b, variance == "fixed_large")

    x0, ours = (np.asarray(x) for x in step(*map(jnp.asarray, (x_t, network, z, a, b))))
    np.testing.assert_array_equal(ours[-1], x0[-1])
    if variance == "fixed_large":  # their last step leaves beta's noise in the picture (docs/recipe.md, 20)
        theirs = np.concatenate([theirs[:-1], theirs[-1:] - np.sqrt(1 - a[-1]) * z[-1]])
    size = np.abs([x_t, network, theirs]).max(axis=(0, 2))
    assert (np.abs(ours - theirs).max(axis=1) <= TOLERANCE * size).all()
