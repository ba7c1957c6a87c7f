r"""The noise schedule: the cosine schedule of Nichol & Dhariwal (arXiv 2102.09672, equation 17).

    alphabar(t) = f(t) / f(0),   f(t) = cos^2((t + s) / (1 + s) * pi / 2),   s = 0.008,   t in [0, 1]

t = n / num_timesteps is DDPM's step n; t = 0 is clean.

**The last steps.** alphabar(1) = 0, so an error in a predicted eps reaches x0 multiplied by
sqrt((1 - alphabar) / alphabar) without bound (Nichol & Dhariwal clip beta at 0.999 and still reach
20,000x). Here alphabar never falls below ALPHA_BAR_MIN = 1e-4, in training and in sampling alike: the
factor is at most 100, only t > 0.993 differs from the formula, and sampling starts from pure noise where
training saw noise with 1 % of signal, a difference below the samplers' own error (tests/diffusion).
"""

import jax.numpy as jnp
import numpy as np

COSINE_S = 0.008
ALPHA_BAR_MIN = 1e-4


def alpha_bar(t):
    """Signal power alphabar(t), float32, for t in [0, 1]; 1 at t = 0, ALPHA_BAR_MIN at t = 1."""
    t = jnp.asarray(t, jnp.float32)
    f = jnp.cos((t + COSINE_S) / (1 + COSINE_S) * np.float32(np.pi / 2)) ** 2
    f0 = np.float32(np.cos(COSINE_S / (1 + COSINE_S) * np.pi / 2) ** 2)
    return jnp.where(t <= 0, 1.0, jnp.clip(f / f0, ALPHA_BAR_MIN, 1.0))


def quantize(t, num_timesteps: int):
    """Rounds t in (0, 1] up to the grid n / num_timesteps of discrete DDPM; 0 stays 0."""
    return jnp.ceil(t * num_timesteps) / num_timesteps
