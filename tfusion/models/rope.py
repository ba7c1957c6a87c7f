"""Rotary position embedding in the half-split convention of Hugging Face's Llama.

B batch, T tokens, H heads, E head dimension.
"""

import jax.numpy as jnp
import numpy as np

THETA = 10_000.0  # Llama 1 and 2


def rope_tables(positions_BT, head_dim: int, num_positions: int):
    """(cos, sin), float32 (B, T, E/2), of the angle position * theta^(-2i/E); NaN from num_positions on.

    Read from tables of constants, as long as a row can be, however many positions are asked for: computed in
    place, sines would be computed anew in every layer that XLA fuses them into.
    """
    frequency = THETA ** (-np.arange(0, head_dim, 2) / head_dim)
    angle = np.arange(num_positions)[:, None] * frequency
    return tuple(jnp.asarray(f(angle), jnp.float32).at[positions_BT].get(mode="fill", fill_value=jnp.nan)
                 for f in (np.cos, np.sin))


def apply_rope(x_BTHE, tables):
    """Rotates the pairs (x[i], x[i + E/2]) by their position's angle, in float32; returned in x's dtype.

    bf16 tables would turn each position by up to 0.003 rad too far or too short, at the slowest frequencies
    a dozen positions. The halves are cast, not the whole: so XLA:TPU leaves the matmul before it its bf16
    output and fuses the casts with the rotation, by its own estimate (v5e) in as many cycles as bf16 tables.
    """
    cos, sin = (table[:, :, None, :] for table in tables)
    a, b = (half.astype(jnp.float32) for half in jnp.split(x_BTHE, 2, axis=-1))
    halves = a * cos - b * sin, b * cos + a * sin
    return jnp.concatenate([half.astype(x_BTHE.dtype) for half in halves], axis=-1)
