"""AdamW as in the paper: betas 0.9/0.95 (b2 from the config), eps 1e-8, weight decay on matrices and
embeddings but not on norm scales and biases, global-norm clip at 1.0, warm-up and cosine to 5 % of the peak.

Or, with decay_steps, warm-up, plateau and decay: until it decays a run is the same for any number of steps, so
that runs of several lengths branch from one.
"""

import jax
import jax.numpy as jnp
import optax

from tfusion.config import OptimizerConfig

B1, EPS, CLIP_NORM, FINAL_FRACTION = 0.9, 1e-8, 1.0, 0.05


def learning_rate_schedule(cfg: OptimizerConfig, num_steps: int):
    """step -> learning rate: linear from 0 over warmup_steps, then to 5 % of the peak at num_steps: by a
    cosine, or at the peak and linear in the last decay_steps."""
    peak, end = cfg.learning_rate, FINAL_FRACTION * cfg.learning_rate
    if cfg.decay_steps:
        def schedule(step):
            up = step / max(cfg.warmup_steps, 1)
            down = jnp.minimum((num_steps - step) / cfg.decay_steps, 1.0)
            return jnp.minimum(peak * up, end + (peak - end) * down)
    else:
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, peak, cfg.warmup_steps, max(num_steps, cfg.warmup_steps + 1), end)
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
