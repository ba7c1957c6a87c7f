"""Rotary position embedding in the half-split convention of Hugging Face's Llama.

B batch, T tokens, H heads, E head dimension.
"""

import jax.numpy as jnp

THETA = 10_000.0  # Llama 1 and 2


def rope_tables(positions_BT, head_dim: int):
    """(cos, sin), float32 (B, T, E/2), of the angle position * theta^(-2i/E)."""
    frequency = THETA ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions_BT.astype(jnp.float32)[..., None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x_BTHE, tables):
    """Rotates the pairs (x[i], x[i + E/2]) by their position's angle."""
    cos, sin = (table[:, :, None, :].astype(x_BTHE.dtype) for table in tables)
    a, b = jnp.split(x_BTHE, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
