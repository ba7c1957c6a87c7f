"""What both sides are given: the weights and documents of a small Llama, noisy samples and network outputs.

Drawn by numpy from names, so that nothing of it need be stored. RandomState's streams are frozen for ever
(NEP 19); those of default_rng are not.

L layers, D d_model, H heads, K kv_heads, E head_dim, F d_ff, V vocabulary, T positions of a row.
"""

import zlib
from pathlib import Path

import numpy as np

REFERENCES = Path(__file__).parents[1] / "testdata" / "external_references.npz"
INSTALL = "pip install '.[external]'"

L, D, H, K, E, F = 3, 64, 4, 2, 16, 96
V, PADDED_V = 48, 128
SHAPES = {  # as tfusion names them; stacked over layers
    "token_embedding": (PADDED_V, D),
    "decoder/blocks/attention_norm_scale": (L, D),
    "decoder/blocks/attention/wq_kernel": (L, D, H * E),
    "decoder/blocks/attention/wk_kernel": (L, D, K * E),
    "decoder/blocks/attention/wv_kernel": (L, D, K * E),
    "decoder/blocks/attention/wo_kernel": (L, H * E, D),
    "decoder/blocks/mlp_norm_scale": (L, D),
    "decoder/blocks/mlp/gate_kernel": (L, D, F),
    "decoder/blocks/mlp/up_kernel": (L, D, F),
    "decoder/blocks/mlp/down_kernel": (L, F, D),
    "decoder/final_norm_scale": (D,),
    "lm_head_kernel": (D, PADDED_V),
}
T = 160
ROWS = ((120, 33), (3, 17, 40, 60))  # lengths of the documents in each packed row; the rest is padding

NUM_TIMESTEPS = 1000
STEPS = (250, 25)  # divisors of 1000: for others diffusers' DDIM steps beside its own grid
VALUES = 4  # of a sample
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}  # ours: diffusers'
SAMPLERS = (("ddpm", "fixed_small"), ("ddpm", "fixed_large"), ("ddim", None))
CASES = [(name, variance, prediction, steps) for name, variance in SAMPLERS for prediction in PREDICTIONS
         for steps in STEPS]


def normal(name: str, shape):
    """Standard normal, float64: of this name and shape always the same."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def weights() -> dict[str, np.ndarray]:
    """{name: float32}. Small embeddings, so that the norms' epsilon matters; scales that are not 1."""
    out = {}
    for name, shape in SHAPES.items():
        x = normal(name, shape)
        fan_in = D if name == "token_embedding" else shape[-2] if len(shape) > 1 else 0
        out[name] = np.float32(1 + 0.2 * x if name.endswith("scale") else x / np.sqrt(fan_in))
    return out


def documents() -> list[list[np.ndarray]]:
    """Token ids, int32, of the documents of each row."""
    rng = np.random.RandomState(0)
    return [[np.int32(rng.randint(0, V, size=n)) for n in lengths] for lengths in ROWS]


def step_inputs(steps: int):
    """(x_t, network's output, fresh noise), float32, each (steps, VALUES): one step a row."""
    return np.float32(normal(f"steps {steps}", (3, steps, VALUES)))


def case_name(name, variance, prediction, steps) -> str:
    return "_".join(str(x) for x in (name, variance, prediction, steps) if x is not None)
