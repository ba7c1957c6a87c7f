"""What the diffusion loss is made of: the noise that is drawn, and the errors by noise level.

B rows, I image slots, h w c image.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tfusion.diffusion.process import Process

NUM_BINS = 5  # of t, for the diffusion loss by noise level


def draw_noise(process: Process, key, noise_ids_BI2, max_t_BI, latent_shape):
    """(t_BI, eps_BIhwc), keyed by (key, noise_ids) and by nothing else."""
    def one(noise_ids_2, max_t):
        slot_key = jax.random.fold_in(jax.random.fold_in(key, noise_ids_2[0]), noise_ids_2[1])
        u_key, eps_key = jax.random.split(slot_key)
        return process.times(jax.random.uniform(u_key), max_t), jax.random.normal(eps_key, latent_shape)

    return jax.vmap(jax.vmap(one))(noise_ids_BI2, max_t_BI)


def diffusion_losses(prediction_BIhwc, target_BIhwc, t_BI, max_t_BI):
    """{'diffusion_loss': (sum, count of latent elements)} and the same for each of NUM_BINS bins of t."""
    error_BI = jnp.sum((prediction_BIhwc - target_BIhwc) ** 2, axis=(2, 3, 4))
    elements = np.float32(np.prod(prediction_BIhwc.shape[2:]))  # int32 would overflow
    scored_BI = (max_t_BI > 0).astype(jnp.float32)
    losses = {"diffusion_loss": (jnp.sum(error_BI * scored_BI), jnp.sum(scored_BI) * elements)}
    bin_BI = jnp.clip(jnp.ceil(t_BI * NUM_BINS) - 1, 0, NUM_BINS - 1)
    for i in range(NUM_BINS):
        in_bin = scored_BI * (bin_BI == i)
        losses[f"diffusion_loss_bin{i}"] = (jnp.sum(error_BI * in_bin), jnp.sum(in_bin) * elements)
    return losses
