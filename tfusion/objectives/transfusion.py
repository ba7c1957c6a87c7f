r"""The Transfusion objective: L = L_LM + lambda * L_DDPM (arXiv 2408.11039, equation 4).

L_LM is the mean over scored tokens of -log p(next token); L_DDPM the mean over latent elements of
(target - prediction)^2, with one t per image, noise added to the latent before it is cut into patches.

B batch, T tokens, V vocabulary, I image slots, h w c latent, L positions of a document.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tfusion.config import RunConfig, component, group, number
from tfusion.data import layout
from tfusion.data.config import DataConfig, RowFormat
from tfusion.diffusion.losses import diffusion_losses, draw_noise
from tfusion.diffusion.sampler import SamplingConfig
from tfusion.models import flops
from tfusion.models.lm_head import next_token_loss
from tfusion.models.transfusion import ModelConfig, Transfusion
from tfusion.objectives import packed
from tfusion.objectives.base import Aux, Objective, register
from tfusion.types import Batch


@dataclasses.dataclass(frozen=True)
class TransfusionConfig(RunConfig):
    model: ModelConfig
    process: Any = component("process")
    loss_weight: float = number(zero=True, may_change=True)  # lambda in L = L_LM + lambda * L_DDPM
    data: DataConfig
    sampling: SamplingConfig = group(may_change=True)

    def check(self, name: str) -> None:
        del name
        self.process.check_sampling(self.sampling.sampler, self.sampling.num_inference_steps)

    @property
    def vocabulary(self) -> layout.Vocabulary:
        return layout.Vocabulary(self.model.text_vocab_size, self.model.num_patches)

    @property
    def rows(self) -> RowFormat:
        """What it asks of packed rows."""
        return RowFormat(self.data, self.vocabulary, self.model.latent_shape,
                         layout.latent_patches(self.vocabulary))


def make(cfg: TransfusionConfig) -> Objective:
    model_cfg, process = cfg.model, cfg.process.make()
    model = Transfusion(model_cfg, cfg.data.seq_len)

    def init(key):
        slots = jax.eval_shape(lambda: jnp.zeros((1, 1, *model_cfg.latent_shape)))
        T = model_cfg.num_patches
        row = jnp.zeros((1, T), jnp.int32)
        batch = Batch(
            row_ids_B=None, tokens_BT=row, segment_ids_BT=row, image_ids_BT=row, positions_BT=row,
            loss_mask_BT=None, latents_BIhwc=None, image_start_BI=row[:, :1], max_t_BI=None, noise_ids_BI2=None)
        return model.init(key, batch, jnp.zeros(slots.shape), jnp.zeros((1, 1)))["params"]

    def loss(params, aux: Aux, batch: Batch, key):
        del aux
        x0 = batch.latents_BIhwc
        t_BI, eps = draw_noise(process, key, batch.noise_ids_BI2, batch.max_t_BI, x0.shape[2:])
        x_t = process.corrupt(x0, eps, t_BI)
        h_BTD, prediction = model.apply({"params": params}, batch, x_t, t_BI)
        target = process.target(x0, eps, t_BI)
        head_DV = model.apply({"params": params}, method="lm_head")
        lm_loss = next_token_loss(h_BTD, head_DV, batch.tokens_BT, batch.loss_mask_BT, model_cfg.vocab_size)
        return {"lm_loss": lm_loss,
                **diffusion_losses(prediction, target, t_BI, batch.max_t_BI)}

    def counts(batch: Batch):
        elements = np.float32(np.prod(batch.latents_BIhwc.shape[2:]))
        return {"lm_loss": jnp.sum(batch.loss_mask_BT),
                "diffusion_loss": jnp.sum(batch.max_t_BI > 0) * elements}

    return Objective(init=init, loss=loss, counts=counts,
                     weights={"lm_loss": 1.0, "diffusion_loss": cfg.loss_weight})


def model_flops(cfg: TransfusionConfig, n: flops.Counts) -> dict:
    """{part: FLOPs of forward and backward}."""
    m = cfg.model
    parts = flops.transformer_flops(m, m.vocab_size, n)
    return parts | {"image adapter": m.adapter.flops(m.d_model, n.patches, n.images)}


register("transfusion", packed.kind(TransfusionConfig, make, model_flops))
