"""A small convolutional KL autoencoder: pixels <-> latents.

Space-to-depth by the whole downsampling factor, then residual blocks at the latent's resolution, and the
mirror image back: on a CPU this reaches in a minute what a pyramid of strided convolutions does not.

B batch, H W pixels, C 3 colours, h w latent size, c latent channels.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from tfusion.config import AutoencoderConfig

LOG_VARIANCE_RANGE = (-20.0, 10.0)


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
    latent_channels: int

    def setup(self):
        cfg = self.cfg
        self.encoder_in = _conv(cfg.width, 1, None)
        self.encoder_blocks = [ResidualBlock(cfg.width) for _ in range(cfg.num_blocks)]
        self.encoder_out = _conv(2 * self.latent_channels, 1, None)
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
