"""Decoding with keys and values kept: whole rows once, then one token of each row at a time.

A row holds one document that starts at position 0, so a token's place in the cache is its position. What lies
past a row's end is whatever was written there; nobody sees it before it is written anew.

B rows, T positions of a call, S of the cache, D d_model.
"""

import jax.numpy as jnp

from tfusion.models.attention import Cache
from tfusion.models.language import LanguageModel
from tfusion.models.masks import Sight
from tfusion.sharding import constrain


def empty(model: LanguageModel, num_rows: int, length: int) -> Cache:
    """Room for `length` positions of each row."""
    m = model.cfg
    zeros = jnp.zeros((m.num_layers, num_rows, length, m.num_kv_heads, m.head_dim), m.compute_dtype)
    return Cache(*2 * [constrain(zeros, None, "batch", None, "kv_heads", "head_dim")])


def prefill(model: LanguageModel, params, x_BTD, sight: Sight):
    """(h_BTD, a cache of T positions) of whole rows, embedded; images are in sight as in training."""
    cache = empty(model, *x_BTD.shape[:2])
    return model.apply({"params": params}, x_BTD, sight, cache, method="hidden")


def step(model: LanguageModel, params, cache: Cache, tokens_B, positions_B):
    """(h_BD, cache) of one text token per row, which sees its row up to itself."""
    at_B1 = positions_B[:, None]
    x_B1D = model.apply({"params": params}, tokens_B[:, None], method="embed_tokens")
    sight = Sight(at_B1, jnp.zeros_like(at_B1), at_B1 + 1)
    h_B1D, cache = model.apply({"params": params}, x_B1D, sight, cache, method="hidden")
    return h_B1D[:, 0], cache
