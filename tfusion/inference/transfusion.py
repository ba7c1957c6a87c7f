"""Decoding (Transfusion, section 3): LM mode until BOI, then diffusion mode: N patches of pure noise are
appended and denoised together, EOI is appended, and LM mode goes on (writing.py), until EOS.

A step of diffusion runs the whole sequence. Compiled functions take as static what makes another program
(model, process, sampler, number of steps, whether there is guidance), and all else as arrays: another
temperature, guidance scale or variance compiles nothing anew.

B rows, T positions of the buffer, I image slots, N patches per image, h w c latent.
"""

import functools
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tfusion.data import layout
from tfusion.diffusion import sampler
from tfusion.diffusion.process import Process
from tfusion.inference import writing
from tfusion.inference.writing import DRAW, IMAGE_STREAM, WRITE, Rows, append, sight, vocabulary, with_new_image
from tfusion.models.transfusion import Transfusion
from tfusion.objectives.transfusion import TransfusionConfig


def predict(model: Transfusion, params, rows: Rows, x_BIhwc, t_BI):
    """The diffusion target's estimate in every image slot, where x are the noisy latents and t theirs."""
    apply = partial(model.apply, {"params": params})
    x_BTD, skips = apply(rows.tokens_BT, rows.image_start_BI, x_BIhwc, t_BI, method="embed")
    h_BTD, _ = apply(x_BTD, sight(model, rows), method="hidden")
    return apply(h_BTD, rows.image_start_BI, t_BI, skips, method="predict")


def _unconditional(model: Transfusion, rows: Rows) -> Rows:
    """The rows that guidance compares with: one image alone, as trained by caption dropout."""
    B = len(rows.mode_B)
    tokens, image_ids = (x[:-1] for x in layout.begin(vocabulary(model), [layout.image(None)]))  # less EOI
    first = int(np.argmax(image_ids))  # of its patches
    return Rows(jnp.tile(tokens, (B, 1)), jnp.tile(image_ids, (B, 1)), jnp.full(B, len(tokens)),
                rows.latents_BIhwc[:, :1], jnp.full((B, 1), first), rows.mode_B, rows.key_B)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def draw_images(model: Transfusion, process: Process, sampler_name: str, num_inference_steps: int,
                guided: bool, params, rows: Rows, large_variance, guidance_scale) -> Rows:
    """Diffusion mode: every row that draws gets one image and its EOI, and is back in LM mode.

    guided: False where guidance_scale is 1, which needs no unconditional model.
    """
    drawing = rows.mode_B == DRAW
    rows, slot_B = with_new_image(rows, model.cfg.num_patches)
    alone, each = _unconditional(model, rows), jnp.arange(len(slot_B))

    def denoise(x_Bhwc, t_B):
        x_BI = rows.latents_BIhwc.at[each, slot_B].set(x_Bhwc)
        t_BI = jnp.zeros(rows.image_start_BI.shape).at[each, slot_B].set(t_B)
        out = predict(model, params, rows, x_BI, t_BI)[each, slot_B]
        if guided:
            uncond = predict(model, params, alone, x_Bhwc[:, None], t_B[:, None])[:, 0]
            out = sampler.guide(out, uncond, guidance_scale)
        return process.estimate(out, x_Bhwc, t_B)

    keys = writing.keys(rows, IMAGE_STREAM, slot_B)
    x0 = sampler.sample(process, denoise, keys, model.cfg.latent_shape, sampler_name, num_inference_steps,
                        large_variance)
    latents = rows.latents_BIhwc.at[each, slot_B].set(
        jnp.where(drawing[:, None, None, None], x0, rows.latents_BIhwc[each, slot_B]))
    rows = append(rows._replace(latents_BIhwc=latents), vocabulary(model).eoi, drawing)
    return rows._replace(mode_B=jnp.where(drawing, WRITE, rows.mode_B))


@functools.cache
def warn_once(text: str | None) -> None:
    """One line on stderr, the first time that the process comes by with it."""
    if text:
        print(f"warning: {text}", file=sys.stderr)


def generate(cfg: TransfusionConfig, params, prompts: list, **options) -> list:
    """Continues each prompt to its EOS; options: of writing.generate."""
    s, model = cfg.sampling, Transfusion(cfg.model, cfg.data.seq_len)

    def draw(rows: Rows) -> Rows:
        warn_once(sampler.warning(s.sampler, s.variance, s.num_inference_steps))
        return draw_images(model, cfg.process.make(), s.sampler, s.num_inference_steps, s.guidance_scale != 1,
                           params, rows, jnp.bool_(s.variance == "fixed_large"), jnp.float32(s.guidance_scale))

    return writing.generate(cfg, params, prompts, model, draw, **options)
