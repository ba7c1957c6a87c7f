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
from tfusion.models.codecs.kl import Autoencoder, AutoencoderConfig
from tfusion.models.codecs.network import NetworkConfig, to_unit
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


RECONSTRUCTION = {"reconstruction_l1": 1.0, "reconstruction_mse": 1.0}  # weights


def reconstruction(error) -> dict:
    """The losses of decoded - picture, in -1..1."""
    return {"reconstruction_l1": (jnp.sum(jnp.abs(error)), error.size),
            "reconstruction_mse": (jnp.sum(error**2), error.size)}


def reconstruction_counts(batch: ImageBatch) -> dict:
    return dict.fromkeys(RECONSTRUCTION, np.prod(batch.images_BHWC.shape))


def row_noise(key, row_ids_B, draw):
    """(B, ...): draw(key of the row), whichever rows stand together."""
    return jax.vmap(lambda row: draw(jax.random.fold_in(key, row)))(row_ids_B)


def make(cfg: AutoencoderRunConfig) -> Objective:
    model = Autoencoder(cfg.autoencoder)
    size = cfg.autoencoder.image_size

    def init(key):
        return model.init(key, jnp.zeros((1, size, size, 3)))["params"]

    def loss(params, aux: Aux, batch: ImageBatch, key):
        del aux
        x = to_unit(batch.images_BHWC)
        mean, log_variance = model.apply({"params": params}, x, method="encode")
        noise = row_noise(key, batch.row_ids_B, lambda key: jax.random.normal(key, mean.shape[1:]))
        z = mean + jnp.exp(0.5 * log_variance) * noise
        error = model.apply({"params": params}, z, method="decode") - x
        return reconstruction(error) | {"kl": (kl_divergence(mean, log_variance), x.shape[0])}

    def counts(batch: ImageBatch):
        return reconstruction_counts(batch) | {"kl": len(batch.row_ids_B)}

    return Objective(init=init, loss=loss, counts=counts,
                     weights=RECONSTRUCTION | {"kl": cfg.autoencoder.kl_weight})


def open_rows(cfg: AutoencoderRunConfig):
    from tfusion.data.rows import ImageRows  # here, so that who only uses a trained run needs no grain

    return ImageRows(cfg.data.sources, cfg.autoencoder.image_size, cfg.seed)


def open_heldout(cfg: AutoencoderRunConfig, documents: int | None = None) -> dict:
    from tfusion.data.heldout import HeldOutPictures

    try:
        return {"pictures": HeldOutPictures(cfg.data.sources, cfg.autoencoder.image_size, documents)}
    except NoPictures as e:
        print(f"nothing is evaluated in training: {e}")
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


def convolution_flops(a: NetworkConfig) -> float:
    """Of forward and backward, per picture; that the first layer's input needs no gradient is left out, and the
    search for the nearest code."""
    pixels, P = a.grid[0] * a.grid[1], 3 * a.downsample**2
    block = 10 * a.width**2  # 3 x 3 and 1 x 1
    weights = (P * a.width + a.width * a.encoder_channels + 9 * a.decoder_channels * a.width + a.width * P
               + 2 * a.num_blocks * block)
    return 6.0 * pixels * weights


register("autoencoder", Kind(
    config=AutoencoderRunConfig, make=make, open_rows=open_rows, open_heldout=open_heldout,
    abstract_batch=abstract_batch, totals=totals, expected=expected))
