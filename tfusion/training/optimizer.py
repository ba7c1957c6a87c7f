"""AdamW as in the paper: betas 0.9/0.95 (b2 from the config), eps 1e-8, weight decay on matrices and
embeddings but not on norm scales and biases, global-norm clip at 1.0, warm-up and cosine to 5 % of the peak.
"""

import jax
import optax

from tfusion.config import OptimizerConfig

B1, EPS, CLIP_NORM, FINAL_FRACTION = 0.9, 1e-8, 1.0, 0.05


def learning_rate_schedule(cfg: OptimizerConfig, num_steps: int):
    """step -> learning rate: linear from 0 over warmup_steps, cosine to 5 % of the peak at num_steps."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, cfg.learning_rate, cfg.warmup_steps, max(num_steps, cfg.warmup_steps + 1),
        FINAL_FRACTION * cfg.learning_rate)
    return lambda step: schedule(step + 1)  # the first step already moves


def decays(params):
    """bool tree: True where weight decay applies, by the parameter's name (scanning adds an axis)."""

    def one(path, _):
        name = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)][-1]
        return name.rsplit("_", 1)[-1] in ("kernel", "embedding")

    return jax.tree_util.tree_map_with_path(one, params)


def make_optimizer(cfg: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.adamw(learning_rate_schedule(cfg, num_steps), B1, cfg.b2, EPS,
                    weight_decay=cfg.weight_decay, mask=decays))
