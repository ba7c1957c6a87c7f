"""A small convolutional KL autoencoder: pixels <-> latents; and, once trained, the codec of a run's pictures.

Space-to-depth by the whole downsampling factor, then residual blocks at the latent's resolution, and the
mirror image back: on a CPU this reaches in a minute what a pyramid of strided convolutions does not.

As a codec, the latent of a picture is the posterior's mean, normalised per channel to mean 0 and standard
deviation 1 over training pictures (the paper states neither choice; docs/recipe.md).

B batch, H W pixels, C 3 colours, h w latent size, c latent channels.
"""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from tfusion.config import check_divides, number
from tfusion.models.codecs import base

LOG_VARIANCE_RANGE = (-20.0, 10.0)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    image_size: int  # H = W of its pictures
    latent_channels: int
    downsample: int  # pixels per latent pixel, each way
    width: int
    num_blocks: int = number(zero=True)
    kl_weight: float = number(zero=True, may_change=True)  # of the KL of an image, beside means over pixels

    def check(self, name: str) -> None:
        check_divides(name, self, "downsample", "image_size")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (self.image_size // self.downsample,) * 2 + (self.latent_channels,)


def to_unit(images_uint8):
    """uint8 0..255 -> float32 -1..1."""
    return images_uint8.astype(jnp.float32) / 127.5 - 1.0


def to_pixels(x):
    """float -1..1 -> uint8 0..255."""
    return jnp.clip(jnp.round((x + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def _conv(features: int, size: int, name: str, gain: float = 1.0) -> nn.Conv:
    init = nn.initializers.variance_scaling(gain**2, "fan_in", "normal")
    return nn.Conv(features, (size, size), kernel_init=init, name=name)


class ResidualBlock(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        h = _conv(self.width, 3, "conv_in")(x)
        return x + _conv(self.width, 1, "conv_out", gain=0.1)(jax.nn.silu(h))


class Autoencoder(nn.Module):
    """`encode` gives the posterior's mean and log variance, `decode` the image in -1..1 (not clipped)."""

    cfg: AutoencoderConfig

    def setup(self):
        cfg = self.cfg
        self.encoder_in = _conv(cfg.width, 1, None)
        self.encoder_blocks = [ResidualBlock(cfg.width) for _ in range(cfg.num_blocks)]
        self.encoder_out = _conv(2 * cfg.latent_channels, 1, None)
        self.decoder_in = _conv(cfg.width, 3, None)
        self.decoder_blocks = [ResidualBlock(cfg.width) for _ in range(cfg.num_blocks)]
        self.decoder_out = _conv(3 * cfg.downsample**2, 1, None)

    def encode(self, x_BHWC):
        """(-1..1) -> mean, log variance, each (B, h, w, c)."""
        f = self.cfg.downsample
        h = self.encoder_in(rearrange(x_BHWC, "b (h p) (w q) c -> b h w (p q c)", p=f, q=f))
        for block in self.encoder_blocks:
            h = block(h)
        mean, log_variance = jnp.split(self.encoder_out(jax.nn.silu(h)), 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)

    def decode(self, z_Bhwc):
        f = self.cfg.downsample
        h = self.decoder_in(z_Bhwc)
        for block in self.decoder_blocks:
            h = block(h)
        out = self.decoder_out(jax.nn.silu(h))
        return rearrange(out, "b h w (p q c) -> b (h p) (w q) c", p=f, q=f)

    def __call__(self, x_BHWC):
        mean, log_variance = self.encode(x_BHWC)
        return self.decode(mean), mean, log_variance


@base.register("kl")
class KLCodec:
    """A trained autoencoder: pictures <-> normalised latents."""

    dtype = np.float32

    def __init__(self, cfg: AutoencoderConfig, params, mean, std):
        self.cfg, self.params, self.mean, self.std = cfg, params, mean, std
        self.shape, self.image_size = cfg.latent_shape, cfg.image_size
        apply = partial(Autoencoder(cfg).apply, {"params": params})
        self._encode = jax.jit(lambda x: (apply(to_unit(x), method="encode")[0] - mean) / std)
        self._decode = jax.jit(lambda z: to_pixels(apply(z * std + mean, method="decode")))

    def encode(self, images):
        base.check_pictures(images, self.image_size)
        return base.in_chunks(self._encode, images)

    def decode(self, latents):
        return base.in_chunks(self._decode, np.asarray(latents, np.float32))

    @property
    def fingerprint(self) -> str:
        return base.fingerprint(self._arrays())

    def _arrays(self) -> dict:
        flat = flatten_dict(self.params, sep="/")
        return {**{f"params/{k}": np.asarray(v) for k, v in flat.items()},
                "mean": np.asarray(self.mean), "std": np.asarray(self.std)}

    def save(self, path: Path) -> None:
        cfg = dataclasses.asdict(self.cfg)
        del cfg["kl_weight"]  # only its training needs that
        base.write(path, {"kind": "kl", "cfg": cfg}, self._arrays())

    @classmethod
    def read(cls, about: dict, arrays: dict) -> "KLCodec":
        flat = {k.removeprefix("params/"): v for k, v in arrays.items() if k.startswith("params/")}
        cfg = AutoencoderConfig(**about["cfg"], kl_weight=0.0)
        return cls(cfg, unflatten_dict(flat, sep="/"), arrays["mean"], arrays["std"])

    @classmethod
    def fit(cls, cfg: AutoencoderConfig, params, images) -> "KLCodec":
        """A trained autoencoder, its latents' normalisation measured on `images`, uint8 (n, H, W, 3)."""
        c = cfg.latent_channels
        latents = cls(cfg, params, jnp.zeros(c), jnp.ones(c)).encode(images)
        return cls(cfg, params, latents.mean((0, 1, 2)), latents.std((0, 1, 2)))
