"""The network that the KL and the VQ autoencoder share: pixels <-> a small grid of vectors.

Space-to-depth by the whole downsampling factor, then residual blocks at the grid's resolution, and the mirror
image back: on a CPU this reaches in a minute what a pyramid of strided convolutions does not.

B batch, H W pixels, C 3 colours, h w grid, c channels.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from tfusion.config import check_divides, number


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """A subclass has `encoder_channels` and `decoder_channels`: what the encoder gives, the decoder takes."""

    image_size: int  # H = W of its pictures
    downsample: int  # pixels per grid point, each way
    width: int
    num_blocks: int = number(zero=True)

    def check(self, name: str) -> None:
        check_divides(name, self, "downsample", "image_size")

    @property
    def grid(self) -> tuple[int, int]:
        return (self.image_size // self.downsample,) * 2


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


class Network(nn.Module):
    cfg: NetworkConfig

    def setup(self):
        cfg = self.cfg
        self.encoder_in = _conv(cfg.width, 1, None)
        self.encoder_blocks = [ResidualBlock(cfg.width) for _ in range(cfg.num_blocks)]
        self.encoder_out = _conv(cfg.encoder_channels, 1, None)
        self.decoder_in = _conv(cfg.width, 3, None)
        self.decoder_blocks = [ResidualBlock(cfg.width) for _ in range(cfg.num_blocks)]
        self.decoder_out = _conv(3 * cfg.downsample**2, 1, None)

    def encode(self, x_BHWC):
        """(-1..1) -> (B, h, w, encoder_channels)."""
        f = self.cfg.downsample
        h = self.encoder_in(rearrange(x_BHWC, "b (h p) (w q) c -> b h w (p q c)", p=f, q=f))
        for block in self.encoder_blocks:
            h = block(h)
        return self.encoder_out(jax.nn.silu(h))

    def decode(self, z_Bhwc):
        """-> the image in -1..1, not clipped."""
        f = self.cfg.downsample
        h = self.decoder_in(z_Bhwc)
        for block in self.decoder_blocks:
            h = block(h)
        out = self.decoder_out(jax.nn.silu(h))
        return rearrange(out, "b h w (p q c) -> b (h p) (w q) c", p=f, q=f)


def to_arrays(params) -> dict:
    """{'params/...': array}, as a codec's file has them."""
    return {f"params/{name}": np.asarray(x) for name, x in flatten_dict(params, sep="/").items()}


def from_arrays(arrays: dict):
    """The inverse of `to_arrays`; other names are left out."""
    return unflatten_dict({name.removeprefix("params/"): x for name, x in arrays.items()
                           if name.startswith("params/")}, sep="/")
