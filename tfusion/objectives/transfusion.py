r"""The Transfusion objective: L = L_LM + lambda * L_DDPM (arXiv 2408.11039, equation 4).

L_LM is the mean over scored tokens of -log p(next token); L_DDPM the mean over latent elements of
(target - prediction)^2, with one t per image, noise added to the latent before it is cut into patches.

B batch, T tokens, V vocabulary, I image slots, h w c latent, L positions of a document.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tfusion.config import Config
from tfusion.diffusion import process, schedule
from tfusion.models.lm_head import next_token_loss
from tfusion.models.transfusion import Transfusion
from tfusion.objectives.base import Objective
from tfusion.types import BOS, EOS, PAD, Batch, Document, Example

NUM_BINS = 5  # of t, for the diffusion loss by noise level


def draw_noise(key, noise_ids_BI2, max_t_BI, latent_shape, num_timesteps: int):
    """(t_BI, eps_BIhwc), keyed by (key, noise_ids) and by nothing else.

    t = max_t * (1 - u) with u uniform in [0, 1), rounded up to the grid n / num_timesteps.
    """
    def one(noise_ids_2, max_t):
        slot_key = jax.random.fold_in(jax.random.fold_in(key, noise_ids_2[0]), noise_ids_2[1])
        u_key, eps_key = jax.random.split(slot_key)
        t = max_t * (1 - jax.random.uniform(u_key))
        return schedule.quantize(t, num_timesteps), jax.random.normal(eps_key, latent_shape)

    return jax.vmap(jax.vmap(one))(noise_ids_BI2, max_t_BI)


def diffusion_losses(prediction_BIhwc, target_BIhwc, t_BI, max_t_BI):
    """{'diffusion_loss': (sum, count of latent elements)} and the same for each of NUM_BINS bins of t."""
    error_BI = jnp.sum((prediction_BIhwc - target_BIhwc) ** 2, axis=(2, 3, 4))
    elements = np.float32(np.prod(prediction_BIhwc.shape[2:]))  # int32 would overflow
    scored_BI = (max_t_BI > 0).astype(jnp.float32)
    losses = {"diffusion_loss": (jnp.sum(error_BI * scored_BI), jnp.sum(scored_BI) * elements)}
    bin_BI = jnp.clip(jnp.ceil(t_BI * NUM_BINS) - 1, 0, NUM_BINS - 1)
    for i in range(NUM_BINS):
        in_bin = scored_BI * (bin_BI == i)
        losses[f"diffusion_loss_bin{i}"] = (jnp.sum(error_BI * in_bin), jnp.sum(in_bin) * elements)
    return losses


def layout(document: Document, num_patches: int, boi: int, eoi: int) -> Example:
    """Lays a document out as `<bos> ... <boi> patch x N <eoi> ... <eos>` (types.Batch, loss_mask)."""
    tokens, image_ids, latents = [np.array([BOS])], [np.zeros(1)], []
    for part in document.parts:
        if part.ndim == 1:
            tokens.append(part)
            image_ids.append(np.zeros(len(part)))
        else:
            latents.append(part)
            tokens.append(np.array([boi] + [PAD] * num_patches + [eoi]))
            image_ids.append(np.array([0] + [len(latents)] * num_patches + [0]))
    tokens = np.concatenate([*tokens, np.array([EOS])]).astype(np.int32)
    image_ids = np.concatenate([*image_ids, np.zeros(1)]).astype(np.int32)
    scored = (image_ids == 0) & (tokens != boi)  # BOI and patches predict no token; EOI does
    scored[-1] = False
    latents = np.stack(latents).astype(np.float32) if latents else np.zeros((0, 0, 0, 0), np.float32)
    return Example(tokens, image_ids, scored & document.score_text, latents,
                   np.full(len(latents), document.max_t, np.float32))


def make(cfg: Config) -> Objective:
    model_cfg, diffusion = cfg.model, cfg.diffusion
    model = Transfusion(model_cfg)

    def init(key):
        slots = jax.eval_shape(lambda: jnp.zeros((1, 1, *model_cfg.latent_shape)))
        T = model_cfg.num_patches
        row = jnp.zeros((1, T), jnp.int32)
        batch = Batch(row[:, 0], row, row, row, row, row, slots, row[:, :1], row[:, :1], None)
        return model.init(key, batch, jnp.zeros(slots.shape), jnp.zeros((1, 1)))["params"]

    def loss(params, batch: Batch, key):
        x0 = batch.latents_BIhwc
        t_BI, eps = draw_noise(key, batch.noise_ids_BI2, batch.max_t_BI, x0.shape[2:], diffusion.num_timesteps)
        a_BI = schedule.alpha_bar(t_BI)
        x_t = process.add_noise(x0, eps, a_BI)
        out = model.apply({"params": params}, batch, x_t, t_BI)
        target = process.target(diffusion.prediction, x0, eps, a_BI)
        lm_loss = next_token_loss(out.hidden_BTD, out.lm_head_DV, batch.tokens_BT, batch.loss_mask_BT,
                                  model_cfg.vocab_size)
        return {"lm_loss": lm_loss,
                **diffusion_losses(out.prediction_BIhwc, target, t_BI, batch.max_t_BI)}

    def counts(batch: Batch):
        elements = np.float32(np.prod(batch.latents_BIhwc.shape[2:]))
        return {"lm_loss": jnp.sum(batch.loss_mask_BT),
                "diffusion_loss": jnp.sum(batch.max_t_BI > 0) * elements}

    def length(text_tokens, images):
        return text_tokens + images * (model_cfg.num_patches + 2) + 2

    return Objective(
        init=init, loss=loss, counts=counts,
        weights={"lm_loss": 1.0, "diffusion_loss": diffusion.loss_weight},
        length=length,
        layout=lambda document: layout(document, model_cfg.num_patches, model_cfg.boi, model_cfg.eoi))
