r"""Processes: how an image becomes noise, what the network predicts of it, and the steps back.

Everything else (objective, decoder, baselines) goes through a `Process` value; another one, such as a
rectified flow, is another function that returns one, and its config, registered under "process", with
`make() -> Process` and `check_sampling(sampler, num_inference_steps)`. DDPM's:

    x_t = sqrt(a) x0 + sqrt(1 - a) eps,   eps ~ N(0, I),   a = alphabar(t)          (DDPM, equation 4)
    eps-prediction: the target is eps                                               (DDPM, equation 14)
    v-prediction:   the target is v = sqrt(a) eps - sqrt(1 - a) x0                  (Salimans & Ho, 2022)
    x0-prediction:  the target is x0

From x_t and any target both x0 and eps follow:

    eps: x0 = (x_t - sqrt(1 - a) eps) / sqrt(a)
    v:   x0 = sqrt(a) x_t - sqrt(1 - a) v,   eps = sqrt(1 - a) x_t + sqrt(a) v
    x0:  eps = (x_t - sqrt(a) x0) / sqrt(1 - a)

With a = alphabar(t), b = alphabar(s) for a step t -> s < t, and beta = 1 - a / b:

    DDIM (Song et al. 2020, equation 12, eta = 0):   x_s = sqrt(b) x0 + sqrt(1 - b) eps
    DDPM (Ho et al. 2020, equations 6 and 7):        x_s = sqrt(b) beta / (1 - a) x0
                                                         + sqrt(a / b) (1 - b) / (1 - a) x_t + sigma z
      fixed_small: sigma^2 = beta (1 - b) / (1 - a), the posterior's; exact where x0 is known (section 3.2)
      fixed_large: sigma^2 = beta; exact where the data are N(0, I)

What belongs to an image (t, a, b, scales) has shape (...) and broadcasts from the left against (..., h, w, c).
"""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax.numpy as jnp

from tfusion.config import choice, register
from tfusion.diffusion.schedule import alpha_bar, quantize
from tfusion.errors import UserError


class Process(NamedTuple):
    """Pure functions; t is float32 in [0, 1], 0 = clean, 1 = noise. Equal arguments give the same value, so
    that a jitted function may take it as a static argument."""

    times: Callable  # (u, max_t) -> t to train on, in (0, max_t]; u uniform in [0, 1)
    grid: Callable  # (num_inference_steps) -> t, float32 (num_inference_steps + 1,), from 1 down to 0
    scales: Callable  # (t) -> (signal, noise): x_t = signal x0 + noise eps
    target: Callable  # (x0, eps, t) -> what the network is trained on
    estimate: Callable  # (out, x_t, t) -> (x0, eps) that its output says, t > 0
    step: Callable  # (sampler) -> step(x0, eps, x_t, z, t, s, large_variance) -> x_s; z ~ N(0, I)

    def corrupt(self, x0, eps, t):
        """x_t."""
        signal, noise = match(self.scales(t), x0)
        return signal * x0 + noise * eps


def match(scales, x):
    """Reshapes each so that it broadcasts against x from the left."""
    return tuple(a.reshape(a.shape + (1,) * (x.ndim - a.ndim)) for a in scales)


TARGETS = {  # (x0, eps, signal, noise)
    "eps": lambda x0, eps, signal, noise: eps,
    "v": lambda x0, eps, signal, noise: signal * eps - noise * x0,
    "x0": lambda x0, eps, signal, noise: x0,
}
ESTIMATES = {  # (out, x_t, signal, noise) -> (x0, eps)
    "eps": lambda out, x_t, signal, noise: ((x_t - noise * out) / signal, out),
    "v": lambda out, x_t, signal, noise: (signal * x_t - noise * out, noise * x_t + signal * out),
    "x0": lambda out, x_t, signal, noise: (out, (x_t - signal * out) / noise),
}


def ddim_step(x0, eps, x_t, z, a, b, large_variance=False):
    """x_s by DDIM; the fresh noise z and its variance are not used."""
    del x_t, z, a, large_variance
    (b,) = match([b], x0)
    return jnp.sqrt(b) * x0 + jnp.sqrt(1 - b) * eps


def ddpm_step(x0, eps, x_t, z, a, b, large_variance=False):
    """x_s with the mean of the posterior q(x_s | x_t, x0), and its variance or beta.

    The last step, b = 1, returns x0 under either: what is left of beta there would stay in the picture.
    """
    del eps
    a, b = match([a, b], x0)
    beta = 1 - a / b
    mean = jnp.sqrt(b) * beta / (1 - a) * x0 + jnp.sqrt(a / b) * (1 - b) / (1 - a) * x_t
    variance = jnp.where(large_variance, jnp.where(b < 1, beta, 0.0), beta * (1 - b) / (1 - a))
    return mean + jnp.sqrt(variance) * z


STEPS = {"ddim": ddim_step, "ddpm": ddpm_step}


@cache
def ddpm(prediction: str, num_timesteps: int) -> Process:
    """DDPM with the schedule of diffusion/schedule.py, on the grid n / num_timesteps; prediction is 'eps', 'v'
    or 'x0'."""
    target, estimate = TARGETS[prediction], ESTIMATES[prediction]

    def grid(num_inference_steps: int):
        n = jnp.round(jnp.linspace(num_timesteps, 0, num_inference_steps + 1))
        return (n / num_timesteps).astype(jnp.float32)

    def scales(t):
        a = alpha_bar(t)
        return jnp.sqrt(a), jnp.sqrt(1 - a)

    def step(sampler: str, x0, eps, x_t, z, t, s, large_variance=False):
        return STEPS[sampler](x0, eps, x_t, z, alpha_bar(t), alpha_bar(s), large_variance)

    return Process(
        times=lambda u, max_t: quantize(max_t * (1 - u), num_timesteps), grid=grid, scales=scales,
        target=lambda x0, eps, t: target(x0, eps, *match(scales(t), x0)),
        estimate=lambda out, x_t, t: estimate(out, x_t, *match(scales(t), x_t)),
        step=lambda sampler: partial(step, sampler))


@register("process", "ddpm")
@dataclasses.dataclass(frozen=True)
class DDPMConfig:
    kind: str
    prediction: str = choice(*TARGETS)
    num_timesteps: int

    def make(self) -> Process:
        return ddpm(self.prediction, self.num_timesteps)

    def check_sampling(self, sampler: str, num_inference_steps: int) -> None:
        """Raises UserError where it has no such sampler, or not so many steps."""
        if sampler not in STEPS:
            raise UserError(f"sampling.sampler = {sampler!r}; choices: {', '.join(STEPS)}")
        if num_inference_steps > self.num_timesteps:
            raise UserError(f"sampling.num_inference_steps = {num_inference_steps} must be at most "
                            f"process.num_timesteps = {self.num_timesteps}")
