"""The linear adapter: a patch is k x k latent pixels, one matrix in, one out (Transfusion, section 3).

B batch, I image slots, h w c latent, N patches, P values per patch, D d_model.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from tfusion.config import check_divides, choice, register
from tfusion.models.transformer import kernel, linear, linear_f32
from tfusion.sharding import constrain

TIME_FEATURES = 256


def patchify(x_BIhwc, k: int):
    """k x k windows, left to right, top to bottom, each flattened: (B, I, N, P)."""
    return rearrange(x_BIhwc, "b i (h k) (w l) c -> b i (h w) (k l c)", k=k, l=k)


def unpatchify(x_BINP, k: int, latent_size: int):
    """The inverse of `patchify`."""
    return rearrange(x_BINP, "b i (h w) (k l c) -> b i (h k) (w l) c", k=k, l=k, h=latent_size // k)


def timestep_features(t, num_features: int = TIME_FEATURES):
    """Sinusoids of 1000 t, float32 (..., num_features); t in [0, 1]. Periods 2 pi .. 2 pi 10^4, as DiT."""
    half = num_features // 2
    frequency = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = 1000.0 * t.astype(jnp.float32)[..., None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def zeros(module: nn.Module, name: str, shape, axes):
    init = nn.with_logical_partitioning(nn.initializers.zeros_init(), axes)
    return module.param(name, init, shape, jnp.float32)


def by_rows(x):
    """An activation of images (B, I, ...), split over devices by its rows alone: else the compiler may split it
    as the weights are, and gather the whole batch."""
    return constrain(x, "batch", "images", *[None] * (x.ndim - 2))


def plus(x, b):
    """x + b in x's dtype; b's gradient is summed, over devices too, in b's own float32."""
    return (x.astype(b.dtype) + b).astype(x.dtype)


@register("adapter", "linear")
@dataclasses.dataclass(frozen=True)
class LinearConfig:
    kind: str
    latent_size: int  # h = w of an image's latent
    latent_channels: int  # c
    patch_size: int  # k: a k x k window of latent pixels is one patch
    patch_positions: str = choice("none", "learned")  # learnt position of a patch within its image

    def check(self, name: str) -> None:
        check_divides(name, self, "patch_size", "latent_size")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (self.latent_size, self.latent_size, self.latent_channels)

    @property
    def num_patches(self) -> int:
        """N: patches per image."""
        return (self.latent_size // self.patch_size) ** 2

    @property
    def patch_values(self) -> int:
        """P: numbers in one patch."""
        return self.patch_size**2 * self.latent_channels

    def flops(self, d_model: int, patches, images):
        """Of forward and backward: in (the inputs need no gradient) and out."""
        return ((4.0 + 6.0) * self.patch_values * d_model * patches
                + (4.0 * TIME_FEATURES * d_model + 6.0 * d_model**2) * images)

    def make(self, d_model: int) -> nn.Module:
        return LinearAdapter(self, d_model)


class LinearAdapter(nn.Module):
    """One linear map per direction, the timestep's embedding added to every patch of the image.

    The embedding is DiT's MLP (256 -> D -> D): the only reading that gives the adapter sizes of
    Transfusion's table 7 (docs/recipe.md).
    """

    cfg: LinearConfig
    d_model: int

    def setup(self):
        D, P = self.d_model, self.cfg.patch_values
        self.time_in = kernel(self, "time_in_kernel", (TIME_FEATURES, D), ("time", "embed"))
        self.time_in_bias = zeros(self, "time_in_bias", (D,), ("norm",))
        self.time_out = kernel(self, "time_out_kernel", (D, D), (None, "embed"), std=0.02)
        self.time_out_bias = zeros(self, "time_out_bias", (D,), ("norm",))
        self.patch_in = kernel(self, "patch_in_kernel", (P, D), ("patch", "embed"))
        self.patch_in_bias = zeros(self, "patch_in_bias", (D,), ("norm",))
        self.patch_out = zeros(self, "patch_out_kernel", (D, P), ("embed", "patch"))
        self.patch_out_bias = zeros(self, "patch_out_bias", (P,), ("patch",))
        if self.cfg.patch_positions == "learned":
            self.positions = kernel(self, "patch_position_embedding", (self.cfg.num_patches, D),
                                    ("patch", "embed"), std=0.02)

    def encode(self, x_BIhwc, t_BI):
        h = by_rows(linear(timestep_features(t_BI).astype(x_BIhwc.dtype), self.time_in))
        h = by_rows(linear(jax.nn.silu(plus(h, self.time_in_bias)), self.time_out))
        h = plus(h, self.time_out_bias)
        x_BIND = by_rows(linear(patchify(x_BIhwc, self.cfg.patch_size), self.patch_in))
        x_BIND = plus(x_BIND, self.patch_in_bias) + h[:, :, None]
        if self.cfg.patch_positions == "learned":
            x_BIND = plus(x_BIND, self.positions)
        return x_BIND, ()

    def decode(self, h_BIND, t_BI, skips):
        del t_BI, skips
        out_BINP = by_rows(linear_f32(h_BIND, self.patch_out)) + self.patch_out_bias
        return unpatchify(out_BINP, self.cfg.patch_size, self.cfg.latent_size)
