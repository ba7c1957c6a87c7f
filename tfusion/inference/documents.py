"""What a run on packed rows can do, in words and pictures: draw, describe, go on with documents.

Of many prompts CHUNK go at once, the last chunk filled up, so that one compiled shape serves any number;
draws are keyed by a prompt's number among all of them.
"""

import numpy as np
from tqdm import tqdm

from tfusion.data import layout
from tfusion.inference import chameleon, transfusion
from tfusion.inference.base import Decoder, register
from tfusion.inference.trained import Trained
from tfusion.models.codecs import num_codes

CHUNK = 64
KINDS = {"transfusion": transfusion, "chameleon": chameleon}
MAX_CAPTION_TOKENS = 128  # of a description, as far as the row has room


def decoder(run: Trained) -> Decoder:
    """Without a codec there are no pictures; without a tokenizer, nothing."""
    if run.tokenizer is None:
        return Decoder()
    if run.codec is None:
        return Decoder(go_on=go_on)
    number = num_codes(run.codec)
    return Decoder(draw, describe, go_on, reconstruct, codes if number else None, number,
                   image_size=run.codec.image_size)


def generate(run: Trained, prompts: list, **options) -> list:
    return KINDS[run.cfg.objective].generate(run.cfg, run.params, prompts, **options)


def in_chunks(run: Trained, prompts: list, title: str, **options) -> list:
    """`generate` over CHUNK prompts at a time, with a progress bar."""
    out = []
    for start in tqdm(range(0, len(prompts), CHUNK), desc=title, unit="chunk"):
        chunk = prompts[start : start + CHUNK]
        filled = chunk + [chunk[-1]] * (CHUNK - len(chunk))
        out += generate(run, filled, first_row=start, **options)[: len(chunk)]
    return out


def draw(run: Trained, texts: list[str], seed: int):
    """A picture for each text, uint8 (n, H, W, 3): drawn straight after it."""
    prompts = [[layout.text([*run.tokenizer.encode(text), run.cfg.vocabulary.boi])] for text in texts]
    room = max(len(p[0].values) for p in prompts) + run.cfg.model.num_patches + 2
    parts = in_chunks(run, prompts, "draw", seed=seed, max_new_tokens=0, max_images=1, max_len=room)
    return run.codec.decode(np.stack([p[0].values for p in parts]))


def describe(run: Trained, pictures) -> list[str]:
    """Greedy captions of pictures, uint8 (n, H, W, 3)."""
    prompts = [[layout.image(latent)] for latent in run.codec.encode(pictures)]
    room = min(run.cfg.model.num_patches + 3 + MAX_CAPTION_TOKENS, run.cfg.data.seq_len)
    parts = in_chunks(run, prompts, "describe", max_images=0, max_len=room)
    return [run.tokenizer.decode(p[0].values.tolist()) if p else "" for p in parts]


def go_on(run: Trained, documents: list[list], *, seed: int = 0, temperature: float = 0.0,
          max_images: int | None = None, draw_first: bool = False) -> list[list]:
    """Goes on from each document to its end; the new parts of each.

    documents: lists of parts, each a str or a picture, uint8 (H, W, 3). draw_first: with a picture, at once.
    """
    pictures = [part for parts in documents for part in parts if not isinstance(part, str)]
    latents = iter(run.codec.encode(np.stack(pictures)) if pictures else ())
    begin = [layout.text([run.cfg.vocabulary.boi])] if draw_first else []
    prompts = [[layout.text(run.tokenizer.encode(part)) if isinstance(part, str) else
                layout.image(next(latents)) for part in parts] + begin for parts in documents]
    rows = generate(run, prompts, seed=seed, temperature=temperature,
                    max_images=max_images if run.codec else 0)
    drawn = [part.values for parts in rows for part in parts if part.kind == "image"]
    images = iter(run.codec.decode(np.stack(drawn)) if drawn else ())
    return [[next(images) if part.kind == "image" else run.tokenizer.decode(part.values.tolist())
             for part in parts] for parts in rows]


def reconstruct(run: Trained, pictures):
    """Pictures encoded and decoded, uint8 (n, H, W, 3)."""
    return run.codec.decode(run.codec.encode(pictures))


def codes(run: Trained, pictures):
    """int32 (n, h, w)."""
    return run.codec.encode(pictures)


for kind in KINDS:
    register(kind, decoder)
