"""A small convolutional KL autoencoder: pixels <-> latents; and, once trained, the codec of a run's pictures.

As a codec, the latent of a picture is the posterior's mean, normalised per channel to mean 0 and standard
deviation 1 over training pictures (the paper states neither choice; docs/recipe.md).

B batch, H W pixels, C 3 colours, h w latent size, c latent channels.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tfusion.config import number
from tfusion.models.codecs import base
from tfusion.models.codecs.network import Network, NetworkConfig, from_arrays, to_arrays, to_pixels, to_unit

LOG_VARIANCE_RANGE = (-20.0, 10.0)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(NetworkConfig):
    latent_channels: int
    kl_weight: float = number(zero=True, may_change=True)  # of the KL of an image, beside means over pixels

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (*self.grid, self.latent_channels)

    @property
    def encoder_channels(self) -> int:
        return 2 * self.latent_channels

    @property
    def decoder_channels(self) -> int:
        return self.latent_channels


class Autoencoder(Network):
    """`encode` gives the posterior's mean and log variance, `decode` the image in -1..1 (not clipped)."""

    def encode(self, x_BHWC):
        """(-1..1) -> mean, log variance, each (B, h, w, c)."""
        mean, log_variance = jnp.split(super().encode(x_BHWC), 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)

    def __call__(self, x_BHWC):
        mean, log_variance = self.encode(x_BHWC)
        return self.decode(mean), mean, log_variance


@base.register("kl")
class KLCodec(base.Arrays):
    """A trained autoencoder: pictures <-> normalised latents."""

    def __init__(self, cfg: AutoencoderConfig, params, mean, std):
        self.cfg, self.params, self.mean, self.std = cfg, params, mean, std
        self.shape, self.image_size = cfg.latent_shape, cfg.image_size
        apply = partial(Autoencoder(cfg).apply, {"params": params})
        self._encode = jax.jit(lambda x: (apply(to_unit(x), method="encode")[0] - mean) / std)
        self._decode = jax.jit(lambda z: to_pixels(apply(z * std + mean, method="decode")))

    def _arrays(self) -> dict:
        return to_arrays(self.params) | {"mean": np.asarray(self.mean), "std": np.asarray(self.std)}

    def _about(self) -> dict:
        cfg = dataclasses.asdict(self.cfg)
        del cfg["kl_weight"]  # only its training needs that
        return cfg

    @classmethod
    def read(cls, about: dict, arrays: dict) -> "KLCodec":
        cfg = AutoencoderConfig(**about["cfg"], kl_weight=0.0)
        return cls(cfg, from_arrays(arrays), arrays["mean"], arrays["std"])

    @classmethod
    def fit(cls, cfg: AutoencoderConfig, params, images) -> "KLCodec":
        """A trained autoencoder, its latents' normalisation measured on `images`, uint8 (n, H, W, 3)."""
        c = cfg.latent_channels
        latents = cls(cfg, params, jnp.zeros(c), jnp.ones(c)).encode(images)
        return cls(cfg, params, latents.mean((0, 1, 2)), latents.std((0, 1, 2)))
