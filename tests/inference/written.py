"""What tests of decoding give and get: lists of ids are texts, arrays pictures (latents, or codes)."""

import numpy as np

from tfusion.data import layout


def parts_of(prompt):
    return [layout.image(x) if isinstance(x, np.ndarray) else layout.text(x) for x in prompt]


def generate(kind, cfg, params, prompts, rows: int, **options):
    """The values of the parts of each prompt, by a decoder's module; padded with empty prompts to the number of
    rows that is compiled."""
    padded = [parts_of(prompt) for prompt in prompts] + [[]] * (rows - len(prompts))
    made = kind.generate(cfg, params, padded, **options)
    return [[part.values for part in parts] for parts in made[: len(prompts)]]


def described(parts) -> list:
    """Text as lists of ids, pictures as 'image'."""
    return [part.tolist() if part.ndim == 1 else "image" for part in parts]
