"""The size and the cost of a run before it is trained: what a sweep's points are put on an axis by.

The axis is the paper's: 6 N D, with N the shared transformer and the embeddings of the *text* vocabulary,
whatever stands beside them (adapters, the codes of images), so that two recipes of one size have the same N.
What the mathematics of a recipe really costs is beside it; of a run that has trained summary.json counts it.
"""

from typing import NamedTuple

from tfusion.config import RunConfig
from tfusion.models.flops import block_params, six_n_d
from tfusion.models.transformer import TransformerConfig
from tfusion.objectives import kind_of


class Cost(NamedTuple):
    """Expected of a whole run."""

    flops: float  # of the model, forward and backward
    tokens: int | None = None  # D: positions, patches or codes among them
    params: int | None = None  # N
    six_n_d: float | None = None


def shared_params(m: TransformerConfig, text_vocab_size: int) -> int:
    """N: the blocks with their norms, and the two embeddings of the text vocabulary."""
    norms = (2 * m.num_layers + 1) * m.d_model
    return m.num_layers * block_params(m) + norms + 2 * text_vocab_size * m.d_model


def cost(cfg: RunConfig) -> Cost:
    """What training cfg will take; without a transformer the FLOPs alone."""
    kind, steps = kind_of(cfg), cfg.train.num_steps
    expected, trunk = kind.expected(cfg), kind.trunk(cfg)
    flops = float(sum(expected.flops.values())) * steps
    if trunk is None:
        return Cost(flops)
    n, tokens = shared_params(trunk.model, trunk.model.text_vocab_size), expected.positions * steps
    return Cost(flops, tokens, n, six_n_d(n, tokens))
