r"""Rectified flow (Liu et al. 2022, arXiv 2209.03003): a straight line from image to noise, and its velocity.

    x_t = (1 - t) x0 + t eps,   the target is eps - x0,   x0 = x_t - t v,   eps = x_t + (1 - t) v

The Euler step from t to s keeps the velocity: x_s = x_t + (s - t) v = (1 - s) x0 + s eps, with the x0 and eps
that are estimated at t.

**Which t** (Esser et al. 2024, arXiv 2403.03206): u is uniform in [0, 1); t = 1 - u, or its logit is normal.
An image of more tokens shows as much of itself at more noise, so that t is shifted for it, in training and on
the sampler's grid alike: t' = s t / (1 + (s - 1) t), s = sqrt(tokens / tokens where s is 1). A noise limit
scales what comes of it, as ddpm's does.
"""

import dataclasses
from functools import cache

import jax.numpy as jnp
from jax.scipy.special import ndtri

from tfusion.config import choice, number, register
from tfusion.diffusion.process import Process, match
from tfusion.errors import UserError

MIN_T = 1e-4  # logit-normal t are hardly less; 0 is clean, and has no loss
SAMPLERS = ("euler",)


def shifted(t, shift: float):
    return shift * t / (1 + (shift - 1) * t)


def euler(x0, eps, x_t, z, t, s, large_variance=False):
    """x_s; nothing fresh is drawn."""
    del x_t, z, t, large_variance
    (s,) = match([s], x0)
    return (1 - s) * x0 + s * eps


@cache
def flow(times: str, shift: float) -> Process:
    """times: 'uniform' or 'logit_normal'."""
    def draw(u, max_t):
        t = 1 - u
        if times == "logit_normal":
            t = 1 / (1 + jnp.exp(-ndtri(jnp.clip(t, 1e-7, 1 - 1e-7))))
        return max_t * jnp.maximum(shifted(t, shift), MIN_T)

    def grid(num_inference_steps: int):
        return shifted(jnp.linspace(1, 0, num_inference_steps + 1), shift).astype(jnp.float32)

    def estimate(v, x_t, t):
        signal, noise = match((1 - t, t), x_t)
        return x_t - noise * v, x_t + signal * v

    return Process(
        times=draw, grid=grid, scales=lambda t: (1 - t, t), target=lambda x0, eps, t: eps - x0,
        estimate=estimate, step=lambda sampler: {"euler": euler}[sampler])


@register("process", "flow")
@dataclasses.dataclass(frozen=True)
class FlowConfig:
    kind: str
    times: str = choice("uniform", "logit_normal")
    shift: float = number()  # 1: none

    def make(self) -> Process:
        return flow(self.times, self.shift)

    def check_sampling(self, sampler: str, num_inference_steps: int) -> None:
        """Raises UserError where it has no such sampler."""
        del num_inference_steps
        if sampler not in SAMPLERS:
            raise UserError(f"sampling.sampler = {sampler!r}; choices: {', '.join(SAMPLERS)}")
