"""Image tokenizers as diffusers computes them, on random weights.

  pip install '.[external]'
  python -m tests.external.codecs        writes tests/testdata/external_codecs.npz anew

In float32 on the CPU; torch and diffusers are imported where they are used. Stored are the names and shapes of
their weights, which numpy draws by name (inputs.normal), and what becomes of a picture.
"""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tests.external import inputs

REFERENCES = Path(__file__).parents[1] / "testdata" / "external_codecs.npz"
SIZE = 32
PLAIN = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
TINY = dict(block_out_channels=[8, 16], norm_num_groups=4, act_fn="silu", in_channels=3, out_channels=3)
CASES = {  # config.json, as diffusers saves it, without what does not matter
    "kl": dict(_class_name="AutoencoderKL", **TINY, **PLAIN, latent_channels=4, layers_per_block=1,
               scaling_factor=0.18215),
    "kl_bare": dict(_class_name="AutoencoderKL", **TINY, **PLAIN, latent_channels=3, layers_per_block=2,
                    scaling_factor=0.5, shift_factor=0.25, use_quant_conv=False, use_post_quant_conv=False,
                    mid_block_add_attention=False),
    "vq": dict(_class_name="VQModel", **TINY, latent_channels=4, layers_per_block=1, num_vq_embeddings=50,
               vq_embed_dim=3, down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
               up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]),
}


def draw(case: str, shapes: dict) -> dict[str, np.ndarray]:
    """{name: float32}; scales of norms about 1, matrices that keep their input's size."""
    out = {}
    for name, shape in shapes.items():
        x = inputs.normal(f"{case} {name}", shape)
        if len(shape) == 1:
            x = 0.2 * x + ("norm" in name and name.endswith("weight"))
        elif name != "quantize.embedding.weight":
            x = x / np.sqrt(np.prod(shape[1:]))
        out[name] = np.float32(x)
    return out


def picture() -> np.ndarray:
    """uint8 (1, SIZE, SIZE, 3), smooth and not symmetric."""
    y, x, c = np.meshgrid(np.arange(SIZE), np.arange(SIZE), np.arange(3), indexing="ij")
    return np.uint8(127 + 60 * np.sin(0.4 * x + c) + 60 * np.cos(0.03 * y * y - c))[None]


def references(case: str) -> dict[str, np.ndarray]:
    """shapes: JSON; encoded: normalised latents or codes; decoded: of these, float32 (1, SIZE, SIZE, 3)."""
    import diffusers
    import torch

    config = dict(CASES[case])
    kind = config.pop("_class_name")
    model = getattr(diffusers, kind)(**config).eval()
    shapes = {name: list(x.shape) for name, x in model.state_dict().items()}
    model.load_state_dict({name: torch.tensor(x) for name, x in draw(case, shapes).items()}, strict=True)
    x = torch.tensor(picture()).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        if kind == "VQModel":
            z, _, (_, _, codes) = model.quantize(model.encode(x).latents)
            encoded = codes.reshape(1, *z.shape[2:]).int()
            decoded = model.decode(z, force_not_quantize=True).sample
        else:
            mean, shift = model.encode(x).latent_dist.mean, config.get("shift_factor", 0.0)
            encoded = ((mean - shift) * config["scaling_factor"]).permute(0, 2, 3, 1)
            decoded = model.decode(mean).sample
    return {"shapes": np.array(json.dumps(shapes)), "encoded": encoded.numpy(),
            "decoded": decoded.permute(0, 2, 3, 1).numpy()}


def main() -> None:
    made = {f"{case}_{name}": x for case in CASES for name, x in references(case).items()}
    made["made_with"] = np.array([f"{name} {version(name)}" for name in ("torch", "diffusers", "numpy")])
    np.savez_compressed(REFERENCES, **made)
    print(f"{REFERENCES}: {REFERENCES.stat().st_size} bytes, {', '.join(made['made_with'])}")


if __name__ == "__main__":
    main()
