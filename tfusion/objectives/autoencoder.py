"""The KL autoencoder's objective: L1 + L2 + kl_weight * KL(posterior || N(0, I)).

The paper's autoencoder adds LPIPS, a GAN and a MoCo term; at 32 x 32 pixels and a minute of training
the two pixel terms are what helps (docs/recipe.md).

B batch, H W C image, h w c latent.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tfusion.config import Config
from tfusion.models.autoencoder import Autoencoder, to_unit
from tfusion.objectives.base import Objective
from tfusion.types import ImageBatch


def kl_divergence(mean, log_variance):
    """KL(N(mean, exp(log_variance)) || N(0, 1)), summed over all elements."""
    return 0.5 * jnp.sum(mean**2 + jnp.exp(log_variance) - 1 - log_variance)


def make(cfg: Config) -> Objective:
    model = Autoencoder(cfg.autoencoder, cfg.model.latent_channels)
    size = cfg.image_size

    def init(key):
        return model.init(key, jnp.zeros((1, size, size, 3)))["params"]

    def loss(params, batch: ImageBatch, key):
        x = to_unit(batch.images_BHWC)
        mean, log_variance = model.apply({"params": params}, x, method="encode")
        noise = jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(key, row), mean.shape[1:]))
        z = mean + jnp.exp(0.5 * log_variance) * noise(batch.row_ids_B)
        error = model.apply({"params": params}, z, method="decode") - x
        images = x.shape[0]
        return {"reconstruction_l1": (jnp.sum(jnp.abs(error)), x.size),
                "reconstruction_mse": (jnp.sum(error**2), x.size),
                "kl": (kl_divergence(mean, log_variance), images)}

    def counts(batch: ImageBatch):
        pixels = np.prod(batch.images_BHWC.shape)
        return {"reconstruction_l1": pixels, "reconstruction_mse": pixels, "kl": len(batch.row_ids_B)}

    return Objective(
        init=init, loss=loss, counts=counts,
        weights={"reconstruction_l1": 1.0, "reconstruction_mse": 1.0, "kl": cfg.autoencoder.kl_weight},
        length=None, layout=None)
