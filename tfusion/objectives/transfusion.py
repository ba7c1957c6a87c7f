r"""The Transfusion objective: L = L_LM + lambda * L_DDPM (arXiv 2408.11039, equation 4).

L_LM is the mean over scored tokens of -log p(next token); L_DDPM the mean over latent elements of
(target - prediction)^2, with one t per image, noise added to the latent before it is cut into patches.

B batch, T tokens, V vocabulary, I image slots, h w c latent, L positions of a document.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tfusion.config import RunConfig, component, group, number
from tfusion.data import layout
from tfusion.data.config import DataConfig, RowFormat
from tfusion.diffusion.losses import diffusion_losses, draw_noise
from tfusion.diffusion.sampler import SamplingConfig
from tfusion.models import flops, llama
from tfusion.models.lm_head import next_token_loss
from tfusion.models.masks import key_intervals, row_sight
from tfusion.models.transfusion import ModelConfig, Transfusion
from tfusion.objectives.base import Aux, Expected, Kind, Objective, Trunk, register
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


def open_rows(cfg: TransfusionConfig):
    from tfusion.data.rows import PackedRows  # here, so that who only uses a trained run needs no grain

    return PackedRows(cfg.rows, cfg.seed)


def open_heldout(cfg: TransfusionConfig, documents: int | None = None) -> dict:
    from tfusion.data.heldout import open_heldout

    return open_heldout(cfg.rows, documents)


def abstract_batch(cfg: TransfusionConfig) -> Batch:
    B, T, I = cfg.train.batch_size, cfg.data.seq_len, cfg.rows.image_slots
    int32, f32 = (partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.int32, jnp.float32))
    return Batch(
        row_ids_B=int32((B,)), tokens_BT=int32((B, T)), segment_ids_BT=int32((B, T)),
        image_ids_BT=int32((B, T)), positions_BT=int32((B, T)),
        loss_mask_BT=jax.ShapeDtypeStruct((B, T), jnp.bool_),
        latents_BIhwc=f32((B, I, *cfg.model.latent_shape)), image_start_BI=int32((B, I)), max_t_BI=f32((B, I)),
        noise_ids_BI2=jax.ShapeDtypeStruct((B, I, 2), jnp.uint32))


def model_flops(m: ModelConfig, n: flops.Counts) -> dict:
    """{part: FLOPs of forward and backward}."""
    parts = flops.transformer_flops(m, m.vocab_size, n)
    return parts | {"image adapter": m.adapter.flops(m.d_model, n.patches, n.images)}


def count(m: ModelConfig, batch: Batch) -> flops.Counts:
    def total(mask):
        return jnp.sum(mask, dtype=jnp.int32)

    patches = total(batch.image_ids_BT > 0)
    k_start_BT, k_end_BT = key_intervals(batch.segment_ids_BT, batch.image_ids_BT, m.image_attention)
    return flops.Counts(
        text=total(batch.segment_ids_BT > 0) - patches, patches=patches, scored=total(batch.loss_mask_BT),
        images=total(batch.image_start_BI < batch.tokens_BT.shape[1]),
        pairs=flops.visible_pairs(k_start_BT, k_end_BT, batch.segment_ids_BT))


def totals(cfg: TransfusionConfig, batch: Batch) -> dict:
    """tokens: positions that hold a token or a patch; images: those with a loss."""
    n = count(cfg.model, batch)
    return {"tokens": n.text + n.patches, "patches": n.patches, "images": jnp.sum(batch.max_t_BI > 0),
            "flops": sum(model_flops(cfg.model, n).values())}


def expected(cfg: TransfusionConfig) -> Expected:
    """Full rows, data.image_share of them in images: documents of one image and an equal share of text."""
    m, rows, T, N = cfg.model, cfg.train.batch_size, cfg.data.seq_len, cfg.model.num_patches
    per_row = min(cfg.rows.image_slots, round(cfg.data.image_share * T / (N + 2)))
    documents = max(per_row, 1)
    length = T / documents
    pairs = length * (length + 1) / 2
    if per_row and m.image_attention == "bidirectional":
        pairs += N * (N - 1) / 2
    text = T - per_row * N
    n = flops.Counts(text=rows * text, patches=rows * per_row * N,
                     scored=rows * (text - per_row - documents),  # not BOI, not EOS
                     images=rows * per_row, pairs=round(rows * documents * pairs))
    return Expected(rows * T, n.scored, n.pairs, model_flops(m, n),
                    "full rows, data.image_share of them in images, one image a document")


def trunk(cfg: TransfusionConfig) -> Trunk:
    return Trunk(cfg.model, cfg.data.seq_len, cfg.model.padded_vocab_size, cfg.model.image_attention)


def llama_form(cfg: TransfusionConfig) -> llama.Form:
    model = Transfusion(dataclasses.replace(cfg.model, compute_dtype="float32"), cfg.data.seq_len)

    def logits(params, tokens_BT):
        apply, zero_BT = partial(model.apply, {"params": params}), jnp.zeros_like(tokens_BT)
        positions_BT = zero_BT + jnp.arange(tokens_BT.shape[1])
        sight = row_sight(positions_BT, zero_BT + 1, zero_BT)
        h_BTD, _ = apply(apply(tokens_BT, method="embed_tokens"), sight, method="hidden")
        return apply(h_BTD, method="logits")[..., : cfg.model.vocab_size]

    symbols = {"boi_token_id": cfg.vocabulary.boi, "eoi_token_id": cfg.vocabulary.eoi}
    return llama.Form(cfg.model, cfg.data.seq_len, cfg.model.text_vocab_size, symbols, logits)


register("transfusion", Kind(
    config=TransfusionConfig, make=make, open_rows=open_rows, open_heldout=open_heldout,
    abstract_batch=abstract_batch, totals=totals, expected=expected,
    row_format=lambda cfg: cfg.rows, trunk=trunk, llama=llama_form))
