"""Model FLOPs of one training step, by part: what the mathematics needs, whatever the program recomputes.

A multiply-add is 2 FLOPs. A matrix costs its size times 2 forward and 4 backward (gradient of the input and of
the weights); where the input needs no gradient (the adapter's two inputs, latents and timestep features) only
2 backward. Attention costs 2 multiply-adds per visible (query, key) pair, head and head dimension, thrice.
Counted: positions that hold a token or a patch, the LM head where it is scored, slots that hold an image.

`six_n_d` is the paper's figure beside it: 6 N D with N = all parameters, both embeddings included (only so has
its 7B 6.74 B), D = text tokens and patches.
"""

import math
from typing import NamedTuple

import jax
import numpy as np

from tfusion.config import Config, ModelConfig
from tfusion.models.image_adapters import TIME_FEATURES
from tfusion.types import Batch


class Counts(NamedTuple):
    """What a batch holds."""

    text: int  # positions with a token
    patches: int
    scored: int  # positions with an LM loss
    images: int
    pairs: int  # visible (query, key) pairs, padding excluded


def block_params(m: ModelConfig) -> int:
    """Parameters in one block's matrices."""
    return m.d_model * m.head_dim * (2 * m.num_heads + 2 * m.num_kv_heads) + 3 * m.d_model * m.d_ff


def matmul_params(cfg: Config) -> int:
    """Parameters in the blocks' matrices and the LM head."""
    return cfg.model.num_layers * block_params(cfg.model) + cfg.model.d_model * cfg.model.vocab_size


def num_params(params) -> int:
    """N of 6 N D: every parameter of a tree of arrays or shapes, embeddings included."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def six_n_d(n: int, positions: float) -> float:
    """The paper's FLOPs of training N parameters on `positions` tokens and patches."""
    return 6.0 * n * positions


def visible_pairs(batch: Batch, image_attention: str = "bidirectional") -> int:
    """How many (query, key) pairs the mask leaves visible, padding excluded."""
    pairs = 0
    for segments, images in zip(batch.segment_ids_BT, batch.image_ids_BT):
        lengths = np.bincount(segments)[1:].astype(np.int64)
        patches = np.bincount(images)[1:].astype(np.int64)
        pairs += int((lengths * (lengths + 1) // 2).sum())
        if image_attention == "bidirectional":
            pairs += int((patches * (patches - 1) // 2).sum())
    return pairs


def count(cfg: Config, batch: Batch) -> Counts:
    patches = int((batch.image_ids_BT > 0).sum())
    return Counts(
        text=int((batch.segment_ids_BT > 0).sum()) - patches, patches=patches,
        scored=int(batch.loss_mask_BT.sum()),
        images=int((batch.image_start_BI < batch.tokens_BT.shape[1]).sum()),
        pairs=visible_pairs(batch, cfg.model.image_attention))


def model_flops(cfg: Config, n: Counts) -> dict[str, float]:
    """{part: FLOPs of forward and backward}."""
    m = cfg.model
    per_position = 6.0 * m.num_layers * block_params(m)
    return {
        "text matmuls": per_position * n.text,
        "patch matmuls": per_position * n.patches,
        "lm head": 6.0 * m.d_model * m.vocab_size * n.scored,
        "image adapter": (4.0 + 6.0) * m.patch_values * m.d_model * n.patches  # in (no input gradient), out
                         + (4.0 * TIME_FEATURES * m.d_model + 6.0 * m.d_model**2) * n.images,
        "attention": 12.0 * m.num_layers * m.num_heads * m.head_dim * n.pairs,
    }


def training_flops(cfg: Config, batch) -> float:
    """FLOPs of forward and backward on one host batch; 0 for the autoencoder's batches."""
    if not isinstance(batch, Batch):
        return 0.0
    return sum(model_flops(cfg, count(cfg, batch)).values())
