"""What kinds of training on packed rows share: their rows, what these hold, and what of the model is a Llama.

cfg: a run's config with `model` (models.language.LanguageConfig), `data` (data.config.DataConfig) and `rows`
(data.config.RowFormat). B batch, T tokens, I image slots, N patches or codes per image.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from tfusion.models import flops, llama
from tfusion.models.language import LanguageConfig, LanguageModel
from tfusion.models.masks import key_intervals, row_sight
from tfusion.objectives.base import Expected, Kind, Trunk
from tfusion.types import Batch


def kind(config: type, make: Callable, model_flops: Callable) -> Kind:
    """A kind of training on packed rows. model_flops: (cfg, flops.Counts) -> {part: FLOPs of both passes}."""
    def totals(cfg, batch: Batch) -> dict:
        """tokens: positions that hold one, a patch or a code; patches: the latter two."""
        n = count(cfg.model, batch)
        return {"tokens": n.text + n.patches, "patches": n.patches, "images": n.images,
                "flops": sum(model_flops(cfg, n).values())}

    return Kind(config=config, make=make, open_rows=open_rows, open_heldout=open_heldout,
                abstract_batch=abstract_batch, totals=totals, expected=partial(expected, model_flops),
                row_format=lambda cfg: cfg.rows, trunk=trunk, llama=llama_form)


def open_rows(cfg):
    from tfusion.data.rows import PackedRows  # here, so that who only uses a trained run needs no grain

    return PackedRows(cfg.rows, cfg.seed)


def open_heldout(cfg, documents: int | None = None) -> dict:
    from tfusion.data.heldout import open_heldout

    return open_heldout(cfg.rows, documents)


def abstract_batch(cfg) -> Batch:
    B, T, I = cfg.train.batch_size, cfg.data.seq_len, cfg.rows.image_slots
    int32, f32 = (partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.int32, jnp.float32))
    return Batch(
        row_ids_B=int32((B,)), tokens_BT=int32((B, T)), segment_ids_BT=int32((B, T)),
        image_ids_BT=int32((B, T)), positions_BT=int32((B, T)),
        loss_mask_BT=jax.ShapeDtypeStruct((B, T), jnp.bool_),
        latents_BIhwc=f32((B, I, *cfg.rows.latent_shape)), image_start_BI=int32((B, I)), max_t_BI=f32((B, I)),
        noise_ids_BI2=jax.ShapeDtypeStruct((B, I, 2), jnp.uint32))


def count(m: LanguageConfig, batch: Batch) -> flops.Counts:
    def total(mask):
        return jnp.sum(mask, dtype=jnp.int32)

    patches = total(batch.image_ids_BT > 0)
    k_start_BT, k_end_BT = key_intervals(batch.segment_ids_BT, batch.image_ids_BT, m.image_attention)
    return flops.Counts(
        text=total(batch.segment_ids_BT > 0) - patches, patches=patches, scored=total(batch.loss_mask_BT),
        images=total(batch.image_start_BI < batch.tokens_BT.shape[1]),
        pairs=flops.visible_pairs(k_start_BT, k_end_BT, batch.segment_ids_BT))


def expected(model_flops: Callable, cfg) -> Expected:
    """Full rows, data.image_share of them in images: documents of one image and an equal share of text."""
    rows, T, N = cfg.train.batch_size, cfg.data.seq_len, cfg.rows.vocabulary.num_patches
    per_row = min(cfg.rows.image_slots, round(cfg.data.image_share * T / (N + 2)))
    documents = max(per_row, 1)
    length = T / documents
    pairs = length * (length + 1) / 2
    if per_row and cfg.model.image_attention == "bidirectional":
        pairs += N * (N - 1) / 2
    text = T - per_row * N
    scored = text - per_row - documents  # not BOI, not EOS
    if cfg.rows.vocabulary.num_codes:
        scored += per_row * N  # BOI, and every code but the last
    n = flops.Counts(text=rows * text, patches=rows * per_row * N, scored=rows * scored, images=rows * per_row,
                     pairs=round(rows * documents * pairs))
    return Expected(rows * T, n.scored, n.pairs, model_flops(cfg, n),
                    "full rows, data.image_share of them in images, one image a document")


def trunk(cfg) -> Trunk:
    return Trunk(cfg.model, cfg.data.seq_len, cfg.model.padded_vocab_size, cfg.model.image_attention)


def llama_form(cfg) -> llama.Form:
    """The transformer on tokens."""
    m: LanguageConfig = dataclasses.replace(cfg.model, compute_dtype="float32")
    apply = LanguageModel(m, cfg.data.seq_len).apply

    def logits(params, tokens_BT):
        zero_BT = jnp.zeros_like(tokens_BT)
        sight = row_sight(zero_BT + jnp.arange(tokens_BT.shape[1]), zero_BT + 1, zero_BT)
        h_BTD = apply({"params": params}, tokens_BT, sight)
        return apply({"params": params}, h_BTD, method="logits")[..., : m.vocab_size]

    known = cfg.rows.vocabulary
    return llama.Form(cfg.model, cfg.data.seq_len, m.text_vocab_size,
                      {"boi_token_id": known.boi, "eoi_token_id": known.eoi}, logits, known.num_codes)
