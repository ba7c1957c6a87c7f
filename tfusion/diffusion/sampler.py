r"""Reverse process: DDPM (ancestral) and DDIM on any number of respaced steps, and guidance.

With a = alphabar(t), b = alphabar(s) for a step t -> s < t, and beta = 1 - a / b:

    DDIM (Song et al. 2020, equation 12, eta = 0):   x_s = sqrt(b) x0 + sqrt(1 - b) eps
    DDPM (Ho et al. 2020, equations 6 and 7):        x_s = sqrt(b) beta / (1 - a) x0
                                                         + sqrt(a / b) (1 - b) / (1 - a) x_t + sigma z,
                                                     sigma^2 = beta (1 - b) / (1 - a)
    guidance (Ho & Salimans 2022):                   out = uncond + scale * (cond - uncond)

The sampler takes a denoiser `denoise(x, t) -> (x0, eps)` and knows no model.
"""

import jax
import jax.numpy as jnp

from tfusion.diffusion.process import match
from tfusion.diffusion.schedule import alpha_bar


def time_grid(num_inference_steps: int, num_timesteps: int):
    """t, float32 (num_inference_steps + 1,), from 1 down to 0, on the training grid n / num_timesteps."""
    n = jnp.round(jnp.linspace(num_timesteps, 0, num_inference_steps + 1))
    return (n / num_timesteps).astype(jnp.float32)


def ddim_step(x0, eps, x_t, z, a, b):
    """x_s by DDIM; the fresh noise z is not used."""
    del x_t, z
    return jnp.sqrt(match(b, x0)) * x0 + jnp.sqrt(1 - match(b, x0)) * eps


def ddpm_step(x0, eps, x_t, z, a, b):
    """x_s drawn from the posterior q(x_s | x_t, x0); z ~ N(0, I)."""
    del eps
    a, b = match(a, x0), match(b, x0)
    beta = 1 - a / b
    mean = jnp.sqrt(b) * beta / (1 - a) * x0 + jnp.sqrt(a / b) * (1 - b) / (1 - a) * x_t
    return mean + jnp.sqrt(beta * (1 - b) / (1 - a)) * z


STEPS = {"ddim": ddim_step, "ddpm": ddpm_step}


def guide(cond, uncond, guidance_scale: float):
    """Classifier-free guidance on the network's outputs; 1 = conditional only, 0 = unconditional."""
    return uncond + guidance_scale * (cond - uncond)


def sample(denoise, keys_B, shape, sampler: str, num_inference_steps: int, num_timesteps: int):
    """Draws x0 (B, *shape). keys_B: one PRNG key per sample, so a sample does not depend on its batch.

    denoise(x_B..., t_B) -> (x0, eps).
    """
    ts = time_grid(num_inference_steps, num_timesteps)
    normal = jax.vmap(lambda key, i: jax.random.normal(jax.random.fold_in(key, i), shape), (0, None))

    def body(i, x):
        t, s = (jnp.broadcast_to(ts[j], x.shape[:1]) for j in (i, i + 1))
        x0, eps = denoise(x, t)
        return STEPS[sampler](x0, eps, x, normal(keys_B, i + 1), alpha_bar(t), alpha_bar(s))

    return jax.lax.fori_loop(0, num_inference_steps, body, normal(keys_B, 0))
