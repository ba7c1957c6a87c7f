"""Transfusion (arXiv 2408.11039): one transformer over text tokens and image patches. Read this first.

  tokens   --- embedding ----------.                           .--- lm_head ------> next-token logits
                                    >--- x_BTD --- Decoder ---<
  latents  --- adapter.encode -----'      (hybrid mask)        '--- adapter.decode --> eps (or v)

A row holds documents `<bos> text <boi> patch x N <eoi> text <eos>`. At a patch's position the adapter's
vector takes the place of the token embedding. The mask (models/masks.py) is causal, plus full attention
among the patches of one image, never across documents. The model is given noisy latents and their t; it
knows neither the noise nor the losses (objectives/transfusion.py).

B batch, T tokens, D d_model, V vocabulary, I image slots, N patches per image, h w c latent.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from tfusion.config import choice, component
from tfusion.models import adapters  # noqa: F401 (registers)
from tfusion.models.masks import key_intervals
from tfusion.models.rope import rope_tables
from tfusion.models.transformer import Decoder, TransformerConfig, kernel
from tfusion.sharding import constrain
from tfusion.types import Batch, ModelOutput


@dataclasses.dataclass(frozen=True)
class ModelConfig(TransformerConfig):
    text_vocab_size: int  # V; BOI and EOI come on top
    image_attention: str = choice("bidirectional", "causal")
    adapter: Any = component("adapter")

    @property
    def vocab_size(self) -> int:
        return self.text_vocab_size + 2

    @property
    def padded_vocab_size(self) -> int:
        """Rounded up to 128 so that the vocabulary shards; the added ids get no probability."""
        return math.ceil(self.vocab_size / 128) * 128

    @property
    def num_patches(self) -> int:
        """N: patches per image."""
        return self.adapter.num_patches

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.adapter.latent_shape


def patch_positions(image_start_BI, num_patches: int):
    """(B, I * N): the row position of every patch of every slot; >= T in unused slots."""
    positions_BIN = image_start_BI[:, :, None] + jnp.arange(num_patches)
    return positions_BIN.reshape(image_start_BI.shape[0], -1)


def scatter_patches(x_BTD, patches_BIND, positions):
    """Puts each patch's vector at its position; unused slots (positions >= T) are dropped."""
    B, D = x_BTD.shape[0], x_BTD.shape[-1]
    return x_BTD.at[jnp.arange(B)[:, None], positions].set(
        patches_BIND.reshape(B, -1, D), mode="drop")


def gather_patches(h_BTD, positions, num_patches: int):
    """The inverse: (B, I, N, D), zeros in unused slots."""
    B, D = h_BTD.shape[0], h_BTD.shape[-1]
    h = h_BTD.at[jnp.arange(B)[:, None], positions].get(mode="fill", fill_value=0)
    return h.reshape(B, positions.shape[1] // num_patches, num_patches, D)  # -1 would not do without slots


class Transfusion(nn.Module):
    cfg: ModelConfig

    @nn.compact
    def __call__(self, batch: Batch, x_t_BIhwc, t_BI) -> ModelOutput:
        """The last hidden states, the LM head (models/lm_head.py applies it where tokens are scored), and
        the diffusion target's estimate for every image slot.

        batch: packed rows; its clean latents are not read. x_t_BIhwc: float32 noisy latents.
        t_BI: float32 in [0, 1], 0 = clean.
        """
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.compute_dtype)
        adapter = cfg.adapter.make(cfg.d_model, name="image_adapter")
        embedding_VD = kernel(self, "token_embedding", (cfg.padded_vocab_size, cfg.d_model),
                              ("vocab", "embed"), std=cfg.d_model**-0.5)
        head_DV = kernel(self, "lm_head_kernel", (cfg.d_model, cfg.padded_vocab_size), ("embed", "vocab"),
                         std=0.02)

        positions = patch_positions(batch.image_start_BI, cfg.num_patches)
        table_VD = constrain(embedding_VD.astype(dtype), "vocab", None)  # gathered over fsdp, once
        x_BTD = table_VD[batch.tokens_BT]
        patches_BIND, skips = adapter.encode(x_t_BIhwc.astype(dtype), t_BI)
        x_BTD = scatter_patches(x_BTD, patches_BIND, positions)
        x_BTD = constrain(x_BTD, "batch", "length", "hidden")

        rope = rope_tables(batch.positions_BT, cfg.head_dim)
        intervals = key_intervals(batch.segment_ids_BT, batch.image_ids_BT, cfg.image_attention)
        h_BTD = Decoder(cfg, name="decoder")(x_BTD, rope, intervals)

        h_BIND = gather_patches(h_BTD, positions, cfg.num_patches)
        return ModelOutput(h_BTD, head_DV, adapter.decode(h_BIND, t_BI, skips))
