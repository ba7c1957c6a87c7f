"""Transfusion (arXiv 2408.11039): one transformer over text tokens and image patches. Read this first.

            embed                                     hidden                         heads
  tokens   --- embedding ----------.                           .--- lm_head ------> next-token logits
                                    >--- x_BTD --- Decoder ---<
  latents  --- adapter.encode -----'       (sight)             '--- adapter.decode --> the diffusion target
                    '------------------ skips -------------------------'

A row holds documents `<bos> text <boi> patch x N <eoi> text <eos>`. At a patch's position the adapter's
vector takes the place of the token embedding. What a position sees is its sight (models/masks.py): causal,
plus full attention among the patches of one image, never across documents. The model is given noisy latents
and their t; it knows neither the noise nor the losses (objectives/transfusion.py).

B batch, T tokens, D d_model, I image slots, N patches per image, M = I * N, h w c latent; in `pick` R of S.
skips: what an adapter's encoder hands its decoder past the transformer: a U-Net's way down, of the linear ().
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tfusion.config import choice, component
from tfusion.models import adapters as _adapters  # noqa: F401 (registers)
from tfusion.models.language import LanguageConfig, LanguageModel
from tfusion.models.masks import row_sight
from tfusion.sharding import constrain
from tfusion.types import Batch


@dataclasses.dataclass(frozen=True)
class ModelConfig(LanguageConfig):
    image_attention: str = choice("bidirectional", "causal")
    adapter: Any = component("adapter")

    @property
    def num_patches(self) -> int:
        """N: patches per image."""
        return self.adapter.num_patches

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.adapter.latent_shape


class Places(NamedTuple):
    """Where the patches of a row stand; each of the two undoes the other."""

    positions_BM: jax.Array  # of every patch of every slot; >= T in unused slots
    patches_BT: jax.Array  # of every position, which patch of the M = I * N stands there; M = none


def patch_places(image_start_BI, num_patches: int, num_positions: int) -> Places:
    B, I = image_start_BI.shape
    positions_BIN = image_start_BI[:, :, None] + jnp.arange(num_patches)
    offset_BTI = jnp.arange(num_positions)[:, None] - image_start_BI[:, None]
    inside_BTI = (offset_BTI >= 0) & (offset_BTI < num_patches)
    patch_BT = jnp.sum(jnp.where(inside_BTI, jnp.arange(I) * num_patches + offset_BTI, 0), axis=-1)
    patch_BT = jnp.where(inside_BTI.any(axis=-1), patch_BT, I * num_patches)
    return Places(positions_BIN.reshape(B, -1), constrain(patch_BT, "batch", "length"))


@jax.custom_vjp
def pick(x_BSD, index_BR, inverse_BS):
    """x[index], row by row, zeros where the index is past the end; so picked by its inverse is the gradient.

    No scatter on the way there or back: on a TPU each would sort its indices (docs/architecture.md).
    """
    B, S, D = x_BSD.shape
    if not S:  # text alone: nothing to pick from
        return jnp.zeros((B, index_BR.shape[1], D), x_BSD.dtype)
    return jax.vmap(lambda x_SD, index_R: x_SD.at[index_R].get(mode="fill", fill_value=0))(x_BSD, index_BR)


def _pick_bwd(inverses, cotangent_BRD):
    index_BR, inverse_BS = inverses
    return pick(cotangent_BRD, inverse_BS, index_BR), None, None


pick.defvjp(lambda x, index, inverse: (pick(x, index, inverse), (index, inverse)), _pick_bwd)


def put_patches(x_BTD, patches_BIND, places: Places):
    """Puts each patch's vector at its position; those of unused slots go nowhere."""
    B, I, N, D = patches_BIND.shape
    patches_BTD = pick(patches_BIND.reshape(B, -1, D), places.patches_BT, places.positions_BM)
    return jnp.where((places.patches_BT < I * N)[..., None], patches_BTD, x_BTD)


def take_patches(h_BTD, places: Places, num_patches: int):
    """The inverse: (B, I, N, D), zeros in unused slots."""
    h_BMD = pick(h_BTD, places.positions_BM, places.patches_BT)
    B, M, D = h_BMD.shape
    return h_BMD.reshape(B, M // num_patches, num_patches, D)  # -1 would not do without slots


class Transfusion(LanguageModel):
    cfg: ModelConfig

    def setup(self):
        super().setup()
        self.image_adapter = self.cfg.adapter.make(self.cfg.d_model)

    def embed(self, tokens_BT, image_start_BI, x_t_BIhwc, t_BI):
        """(x_BTD in the compute dtype, the adapter's skips).

        image_start_BI: position of each slot's first patch, >= T where unused. x_t_BIhwc: float32 noisy
        latents. t_BI: float32 in [0, 1], 0 = clean.
        """
        x_BTD = self.embed_tokens(tokens_BT)
        patches_BIND, skips = self.image_adapter.encode(x_t_BIhwc.astype(x_BTD.dtype), t_BI)
        places = patch_places(image_start_BI, self.cfg.num_patches, x_BTD.shape[1])
        return put_patches(x_BTD, patches_BIND, places), skips

    def embed_rows(self, tokens_BT, image_start_BI, latents_BIhwc):
        """x_BTD of rows whose images are finished: clean, t = 0."""
        return self.embed(tokens_BT, image_start_BI, latents_BIhwc, jnp.zeros(image_start_BI.shape))[0]

    def predict(self, h_BTD, image_start_BI, t_BI, skips):
        """The diffusion target's estimate in every image slot, (B, I, h, w, c), float32."""
        num_patches = self.cfg.num_patches
        h_BIND = take_patches(h_BTD, patch_places(image_start_BI, num_patches, h_BTD.shape[1]), num_patches)
        return self.image_adapter.decode(h_BIND, t_BI, skips)

    def __call__(self, batch: Batch, x_t_BIhwc, t_BI):
        """(h_BTD, the diffusion target's estimate) of packed rows, whose clean latents are not read."""
        sight = row_sight(batch.positions_BT, batch.segment_ids_BT, batch.image_ids_BT,
                          self.cfg.image_attention)
        x_BTD, skips = self.embed(batch.tokens_BT, batch.image_start_BI, x_t_BIhwc, t_BI)
        h_BTD, _ = self.hidden(x_BTD, sight)
        return h_BTD, self.predict(h_BTD, batch.image_start_BI, t_BI, skips)
