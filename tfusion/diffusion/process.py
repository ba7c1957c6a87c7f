r"""The forward process and what the network predicts of it.

    x_t = sqrt(a) x0 + sqrt(1 - a) eps,   eps ~ N(0, I),   a = alphabar(t)          (DDPM, equation 4)
    eps-prediction: the target is eps                                               (DDPM, equation 14)
    v-prediction:   the target is v = sqrt(a) eps - sqrt(1 - a) x0                  (Salimans & Ho, 2022)

From x_t and either target both x0 and eps follow:

    eps: x0 = (x_t - sqrt(1 - a) eps) / sqrt(a)
    v:   x0 = sqrt(a) x_t - sqrt(1 - a) v,   eps = sqrt(1 - a) x_t + sqrt(a) v

Every `a` here broadcasts against x from the left: shape (...) against (..., h, w, c).
"""

import dataclasses

import jax.numpy as jnp

from tfusion.config import choice, register


@register("process", "ddpm")
@dataclasses.dataclass(frozen=True)
class DDPMConfig:
    kind: str
    prediction: str = choice("eps", "v")
    num_timesteps: int


def match(a, x):
    """Reshapes a so that it broadcasts against x from the left."""
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim))


def add_noise(x0, eps, a):
    """x_t."""
    a = match(a, x0)
    return jnp.sqrt(a) * x0 + jnp.sqrt(1 - a) * eps


def target(prediction: str, x0, eps, a):
    """What the network is trained on: prediction is 'eps' or 'v'."""
    a = match(a, x0)
    return {"eps": lambda: eps, "v": lambda: jnp.sqrt(a) * eps - jnp.sqrt(1 - a) * x0}[prediction]()


def to_x0_eps(prediction: str, out, x_t, a):
    """The network's output -> its estimates of (x0, eps)."""
    a = match(a, x_t)
    if prediction == "eps":
        return (x_t - jnp.sqrt(1 - a) * out) / jnp.sqrt(a), out
    return jnp.sqrt(a) * x_t - jnp.sqrt(1 - a) * out, jnp.sqrt(1 - a) * x_t + jnp.sqrt(a) * out
