"""A VQ autoencoder: the KL autoencoder's network, each grid vector replaced by the nearest of K codes; and,
once trained, the codec that turns pictures into codes.

B batch, H W pixels, C 3 colours, h w grid, K codes, c code_dim.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tfusion.config import number
from tfusion.models.codecs import base
from tfusion.models.codecs.network import Network, NetworkConfig, from_arrays, to_arrays, to_pixels, to_unit


@dataclasses.dataclass(frozen=True)
class VQConfig(NetworkConfig):
    num_codes: int  # K
    code_dim: int  # c: what the encoder's output is projected to, and compared in
    commitment_weight: float = number(zero=True, may_change=True)  # beta, beside the codebook loss of weight 1

    @property
    def encoder_channels(self) -> int:
        return self.code_dim

    decoder_channels = encoder_channels


class VQAutoencoder(Network):
    """`encode` gives the vectors before they are replaced, `decode` takes codes' vectors."""

    def setup(self):
        super().setup()
        shape = (self.cfg.num_codes, self.cfg.code_dim)
        self.codebook = self.param("codebook", nn.initializers.zeros_init(), shape)

    def __call__(self, x_BHWC):
        return self.decode(self.encode(x_BHWC))


def nearest(z, codebook_Kc):
    """(..., c) -> int32 (...): the code at the least squared distance; of equals, the first.

    In float32 on every device: a TPU's own precision for float32 matrices, bfloat16, picks others for some 5 %.
    """
    product = jnp.einsum("...c,Kc->...K", z, codebook_Kc, precision="highest")
    distance = jnp.sum(codebook_Kc**2, axis=-1) - 2 * product
    return jnp.argmin(distance, axis=-1).astype(jnp.int32)


@base.register("vq")
class VQCodec(base.Arrays):
    """A trained VQ autoencoder: pictures <-> codes, 0 to num_codes - 1, as the rows of a grid."""

    dtype = np.int32

    def __init__(self, cfg: VQConfig, params):
        self.cfg, self.params = cfg, params
        self.shape, self.image_size, self.num_codes = cfg.grid, cfg.image_size, cfg.num_codes
        apply, book = partial(VQAutoencoder(cfg).apply, {"params": params}), jnp.asarray(params["codebook"])
        self._encode = jax.jit(lambda x: nearest(apply(to_unit(x), method="encode"), book))
        self._decode = jax.jit(lambda codes: to_pixels(apply(book[codes], method="decode")))

    def _arrays(self) -> dict:
        return to_arrays(self.params)

    def _about(self) -> dict:
        cfg = dataclasses.asdict(self.cfg)
        del cfg["commitment_weight"]  # only its training needs that
        return cfg

    @classmethod
    def read(cls, about: dict, arrays: dict) -> "VQCodec":
        return cls(VQConfig(**about["cfg"], commitment_weight=0.0), from_arrays(arrays))
