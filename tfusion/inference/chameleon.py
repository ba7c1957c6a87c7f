"""Decoding of images that are codes: after BOI exactly N of them, drawn one by one among the ids of codes, and
then EOI, which nobody predicts. Keys and values are kept, as for text (writing.py).

Guidance compares, on the logits of codes, with a row `<bos> <boi>` and the same codes, as training has it where
a caption was dropped.

B rows, T positions of the buffer, N codes per image, K codes.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tfusion.data import layout
from tfusion.diffusion.sampler import guide
from tfusion.inference import cache, writing
from tfusion.inference.writing import DRAW, IMAGE_STREAM, WRITE, Rows, append, vocabulary, with_new_image
from tfusion.models.language import LanguageModel
from tfusion.objectives.chameleon import ChameleonConfig


def nucleus(logits_K, top_p):
    """(codes, logits) by falling logits, -inf behind those that first reach top_p together: one stays at least.
    """
    order_K = jnp.argsort(-logits_K)
    sorted_K = logits_K[order_K]
    p_K = jax.nn.softmax(sorted_K)
    return order_K, jnp.where(jnp.cumsum(p_K) - p_K < top_p, sorted_K, -jnp.inf)


def draw_code(key, logits_K, temperature, top_p):
    """The likeliest at temperature 0."""
    order_K, kept_K = nucleus(logits_K / jnp.maximum(temperature, 1e-6), top_p)
    return order_K[jnp.where(temperature > 0, jax.random.categorical(key, kept_K), 0)]


@partial(jax.jit, static_argnums=(0, 1))
def draw_images(model: LanguageModel, guided: bool, params, rows: Rows, temperature, top_p,
                guidance_scale) -> Rows:
    """Every row that draws gets one image and its EOI, and is back in LM mode. guided: whether the scale is
    another than 1; without, the rows to compare with are left out."""
    known, drawing, begin_B = vocabulary(model), rows.mode_B == DRAW, rows.length_B
    each, first = jnp.arange(len(begin_B)), known.first_code
    alone = layout.begin(known, [layout.text([known.boi])])[0]
    key_B = writing.keys(rows, IMAGE_STREAM, jnp.argmax(rows.image_start_BI == rows.tokens_BT.shape[1], axis=1))

    def codes(kept, token_B, at_B):
        """(logits of the codes that may follow a token, what is kept)."""
        h_BD, kept = cache.step(model, params, kept, token_B, at_B)
        return model.apply({"params": params}, h_BD, method="logits")[:, first : first + known.num_codes], kept

    def body(i, state):
        rows, kept, compared = state
        at_B = rows.length_B - 1
        token_B = rows.tokens_BT[each, at_B]
        logits_BK, kept = codes(kept, token_B, at_B)
        if guided:
            other_B = jnp.where(drawing, token_B, known.boi)
            plain_BK, compared = codes(compared, other_B, jnp.full_like(at_B, len(alone) - 1 + i))
            logits_BK = guide(logits_BK, plain_BK, guidance_scale)
        keys_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, i)
        code_B = jax.vmap(draw_code, (0, 0, None, None))(keys_B, logits_BK, temperature, top_p)
        return append(rows, (first + code_B).astype(jnp.int32), drawing), kept, compared

    compared = ()
    if guided:
        compared = cache.empty(model, len(begin_B), len(alone) + known.num_patches)
        for at, token in enumerate(np.asarray(alone)[:-1]):
            _, compared = codes(compared, jnp.full_like(begin_B, token), jnp.full_like(begin_B, at))
    start = rows, writing.read(model, params, rows), compared
    drawn = jax.lax.fori_loop(0, known.num_patches, body, start)[0]
    rows = with_new_image(rows, known.num_patches)[0]._replace(tokens_BT=drawn.tokens_BT)
    rows = append(rows, known.eoi, drawing)
    return rows._replace(mode_B=jnp.where(drawing, WRITE, rows.mode_B))


def generate(cfg: ChameleonConfig, params, prompts: list, **options) -> list:
    """Continues each prompt to its EOS; options: of writing.generate, whose temperature is that of text."""
    s, model = cfg.sampling, LanguageModel(cfg.model, cfg.data.seq_len)

    def draw(rows: Rows) -> Rows:
        return draw_images(model, s.guidance_scale != 1, params, rows, jnp.float32(s.temperature),
                           jnp.float32(s.top_p), jnp.float32(s.guidance_scale))

    return writing.generate(cfg, params, prompts, model, draw, **options)
