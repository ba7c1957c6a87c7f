"""A language model: token embedding, transformer, head. Transfusion is one with a second way in and out; images
that are tokens need no more than this.

B batch, T tokens, D d_model, V vocabulary.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from tfusion.models import lm_head
from tfusion.models.attention import Cache
from tfusion.models.masks import Sight
from tfusion.models.rope import rope_tables
from tfusion.models.transformer import Decoder, TransformerConfig, kernel
from tfusion.sharding import constrain


@dataclasses.dataclass(frozen=True)
class LanguageConfig(TransformerConfig):
    text_vocab_size: int  # V; BOI and EOI come on top

    image_attention = "causal"  # inside an image; a kind may have it otherwise

    @property
    def vocab_size(self) -> int:
        return self.text_vocab_size + 2

    @property
    def padded_vocab_size(self) -> int:
        """Rounded up to 128 so that the vocabulary shards; the added ids get no probability."""
        return math.ceil(self.vocab_size / 128) * 128


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed_tokens(table_VD, tokens_BT, dtype: str):
    """(B, T, D) in dtype: the table is cast, gathered over fsdp, once, and looked up. The gradient adds up in
    the table's own float32, on each device and over them: some tokens are everywhere."""
    table_VD = constrain(table_VD.astype(dtype), "vocab", "embed")  # else it is gathered, then cast
    return constrain(table_VD, "vocab", None)[tokens_BT]


def _embed_tokens_bwd(dtype, inputs, cotangent):
    table_VD, tokens_BT = inputs
    zeros_VD = jnp.zeros(table_VD.shape, table_VD.dtype)
    return constrain(zeros_VD, "vocab", None).at[tokens_BT].add(cotangent.astype(table_VD.dtype)), None


embed_tokens.defvjp(lambda table, tokens, dtype: (embed_tokens(table, tokens, dtype), (table, tokens)),
                    _embed_tokens_bwd)


class LanguageModel(nn.Module):
    cfg: LanguageConfig
    seq_len: int  # positions that a document can have: RoPE's tables

    def setup(self):
        cfg = self.cfg
        self.token_embedding = kernel(self, "token_embedding", (cfg.padded_vocab_size, cfg.d_model),
                                      ("vocab", "embed"), std=cfg.embedding_std)
        self.lm_head_kernel = kernel(self, "lm_head_kernel", (cfg.d_model, cfg.padded_vocab_size),
                                     ("embed", "vocab"), std=0.02)
        self.decoder = Decoder(cfg)

    def embed_tokens(self, tokens_BT):
        """x_BTD in the compute dtype."""
        return embed_tokens(self.token_embedding, tokens_BT, self.cfg.compute_dtype)

    def embed_rows(self, tokens_BT, image_start_BI, latents_BIhwc):
        """x_BTD of rows whose images are finished; here they are tokens."""
        del image_start_BI, latents_BIhwc
        return self.embed_tokens(tokens_BT)

    def hidden(self, x_BTD, sight: Sight, cache: Cache | None = None):
        """(the last hidden states h_BTD, after the final norm, in the compute dtype; the cache, with these
        positions' keys and values in it).

        Without a cache x is whole rows. With one it is any positions of them, which see what the cache holds.
        """
        x_BTD = constrain(x_BTD, "batch", "length", "hidden")
        rope = rope_tables(sight.positions_BT, self.cfg.head_dim, self.seq_len)
        return self.decoder(x_BTD, rope, sight, cache)

    def lm_head(self):
        """head_DV, float32; models/lm_head.py applies it where tokens are scored."""
        return self.lm_head_kernel

    def logits(self, h):
        """(..., D) -> the next token's, float32 (..., V padded)."""
        return lm_head.logits(h, self.lm_head_kernel, self.cfg.vocab_size)

    def __call__(self, tokens_BT, sight: Sight):
        """h_BTD of whole rows."""
        return self.hidden(self.embed_tokens(tokens_BT), sight)[0]
