"""Model FLOPs of one training step: the paper's 6ND, and attention by visible pairs.

N counts the parameters that a position is multiplied with (blocks and LM head, not the embedding
table), D the positions that hold a token or a patch; attention costs 2 multiply-adds per visible
(query, key) pair, head and head dimension, thrice (forward, and twice that backward).
"""

import numpy as np

from tfusion.config import Config
from tfusion.types import Batch


def matmul_params(cfg: Config) -> int:
    """N: parameters in the blocks' matrices and the LM head."""
    m = cfg.model
    attention = m.d_model * m.head_dim * (2 * m.num_heads + 2 * m.num_kv_heads)
    return m.num_layers * (attention + 3 * m.d_model * m.d_ff) + m.d_model * m.vocab_size


def visible_pairs(batch: Batch) -> int:
    """How many (query, key) pairs the bidirectional mask leaves visible, padding excluded."""
    pairs = 0
    for segments, images in zip(batch.segment_ids_BT, batch.image_ids_BT):
        lengths = np.bincount(segments)[1:].astype(np.int64)
        patches = np.bincount(images)[1:].astype(np.int64)
        pairs += int((lengths * (lengths + 1) // 2).sum() + (patches * (patches - 1) // 2).sum())
    return pairs


def training_flops(cfg: Config, batch) -> float:
    """FLOPs of forward and backward on one host batch; 0 for the autoencoder's batches."""
    if not isinstance(batch, Batch):
        return 0.0
    positions = int((batch.segment_ids_BT > 0).sum())
    attention = 12 * cfg.model.num_layers * cfg.model.num_heads * cfg.model.head_dim
    return 6.0 * matmul_params(cfg) * positions + attention * visible_pairs(batch)
