"""The KL autoencoder's objective: L1 + L2 + kl_weight * KL(posterior || N(0, I)).

The paper's autoencoder adds LPIPS, a GAN and a MoCo term; at 32 x 32 pixels and a minute of training
the two pixel terms are what helps (docs/recipe.md).

B batch, H W C image, h w c latent.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tfusion.config import RunConfig, components
from tfusion.data.config import check_sources
from tfusion.data.sources import NoPictures
from tfusion.models.codecs.kl import Autoencoder, AutoencoderConfig, to_unit
from tfusion.objectives.base import Aux, Expected, Kind, Objective, register
from tfusion.types import ImageBatch


@dataclasses.dataclass(frozen=True)
class PicturesConfig:
    sources: dict = components("source", fixed=("share",))

    def check(self, name: str) -> None:
        check_sources(self.sources, name)


@dataclasses.dataclass(frozen=True)
class AutoencoderRunConfig(RunConfig):
    autoencoder: AutoencoderConfig
    data: PicturesConfig


def kl_divergence(mean, log_variance):
    """KL(N(mean, exp(log_variance)) || N(0, 1)), summed over all elements."""
    return 0.5 * jnp.sum(mean**2 + jnp.exp(log_variance) - 1 - log_variance)


def make(cfg: AutoencoderRunConfig) -> Objective:
    model = Autoencoder(cfg.autoencoder)
    size = cfg.autoencoder.image_size

    def init(key):
        return model.init(key, jnp.zeros((1, size, size, 3)))["params"]

    def loss(params, aux: Aux, batch: ImageBatch, key):
        del aux
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
        weights={"reconstruction_l1": 1.0, "reconstruction_mse": 1.0, "kl": cfg.autoencoder.kl_weight})


def open_rows(cfg: AutoencoderRunConfig):
    from tfusion.data.rows import ImageRows  # here, so that who only uses a trained run needs no grain

    return ImageRows(cfg.data.sources, cfg.autoencoder.image_size, cfg.seed)


def open_heldout(cfg: AutoencoderRunConfig, documents: int | None = None) -> dict:
    from tfusion.data.heldout import HeldOutPictures

    try:
        return {"pictures": HeldOutPictures(cfg.data.sources, cfg.autoencoder.image_size, documents)}
    except NoPictures:
        print("data.sources holds out no pictures: nothing is evaluated in training")
        return {}


def abstract_batch(cfg: AutoencoderRunConfig) -> ImageBatch:
    B, size = cfg.train.batch_size, cfg.autoencoder.image_size
    return ImageBatch(jax.ShapeDtypeStruct((B,), jnp.int32),
                      jax.ShapeDtypeStruct((B, size, size, 3), jnp.uint8))


def totals(cfg: AutoencoderRunConfig, batch: ImageBatch) -> dict:
    images = batch.images_BHWC.shape[0]
    return {"images": images, "flops": convolution_flops(cfg.autoencoder) * images}


def expected(cfg: AutoencoderRunConfig) -> Expected:
    return Expected(0, 0, 0, {"convolutions": convolution_flops(cfg.autoencoder) * cfg.train.batch_size}, "")


def convolution_flops(a: AutoencoderConfig) -> float:
    """Of forward and backward, per picture; that the first layer's input needs no gradient is left out."""
    pixels, P = (a.image_size // a.downsample) ** 2, 3 * a.downsample**2
    block = 10 * a.width**2  # 3 x 3 and 1 x 1
    weights = (P * a.width + 2 * a.width * a.latent_channels + 9 * a.latent_channels * a.width + a.width * P
               + 2 * a.num_blocks * block)
    return 6.0 * pixels * weights


register("autoencoder", Kind(
    config=AutoencoderRunConfig, make=make, open_rows=open_rows, open_heldout=open_heldout,
    abstract_batch=abstract_batch, totals=totals, expected=expected))
