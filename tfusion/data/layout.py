"""How a document becomes the positions of a row; training, prompts and unconditional rows all come by here.

    <bos> text ... <boi> patch x N <eoi> ... text <eos>

An image takes N positions between BOI and EOI: patches of latents, which hold the pad id, or codes, each with
an id of its own. Position p is scored on token p + 1: text yes, the token before BOI (it predicts BOI) and EOI
(it predicts what follows) too; BOI and patches no, for they predict no token. BOI predicts the first code and
each code the next, whether text is scored or not; after the last one EOI is forced, and nobody predicts it. The
last position of a document is not scored.

N patches per image, V text vocabulary, L positions of a document.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tfusion.types import BOS, EOS, PAD, Document, Example, Part

NO_LATENTS = (0, 0, 0)  # their shape where images are codes


class Sizes(NamedTuple):
    """What documents take (ints, or arrays of them)."""

    positions: Any
    scored: Any  # positions with an LM loss, of documents whose text is scored
    slots: Any  # image slots


class Layout(NamedTuple):
    """All that data/ needs to know of a kind of training."""

    sizes: Callable  # (text tokens, images) of a record -> Sizes
    lay: Callable  # (Document) -> Example
    images: Callable  # (packed row, no batch axis) -> (I, *image_shape): of each slot, as its codec made it


class Vocabulary(NamedTuple):
    """Ids beyond the text's own, and how many positions an image has."""

    text_vocab_size: int  # V; text ids are below
    num_patches: int  # N, patches or codes
    num_codes: int = 0  # K; 0 = images are latents, which no token stands for

    @property
    def boi(self) -> int:
        return self.text_vocab_size

    @property
    def eoi(self) -> int:
        return self.text_vocab_size + 1

    @property
    def first_code(self) -> int:
        """Code k is the id first_code + k."""
        return self.text_vocab_size + 2

    @property
    def vocab_size(self) -> int:
        return self.first_code + self.num_codes


def text(ids) -> Part:
    return Part("text", np.asarray(ids, np.int32))


def image(values, max_t: float = 1.0) -> Part:
    return Part("image", values, max_t)


def begin(vocabulary: Vocabulary, parts) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, image ids), int32 (L,), of a document that goes on: `<bos> parts`. Image ids: 0 = not a patch,
    k = a patch of the k-th image."""
    tokens, image_ids, images = [[BOS]], [[0]], 0
    for part in parts:
        if part.kind == "text":
            tokens.append(part.values)
            image_ids.append(np.zeros(len(part.values), np.int32))
        else:
            images += 1
            N = vocabulary.num_patches
            here = vocabulary.first_code + np.ravel(part.values) if vocabulary.num_codes else [PAD] * N
            tokens.append([vocabulary.boi, *here, vocabulary.eoi])
            image_ids.append([0, *[images] * N, 0])
    return tuple(np.concatenate(x).astype(np.int32) for x in (tokens, image_ids))


def lay(vocabulary: Vocabulary, document: Document) -> Example:
    """A whole document."""
    tokens, image_ids = begin(vocabulary, document.parts)
    tokens, image_ids = np.append(tokens, np.int32(EOS)), np.append(image_ids, np.int32(0))
    scored = (image_ids == 0) & (tokens != vocabulary.boi) & document.score_text
    scored[-1] = False
    images = [part for part in document.parts if part.kind == "image"]
    if vocabulary.num_codes:
        scored[:-1] |= image_ids[1:] > 0
        nothing = np.zeros(len(images), np.float32)
        return Example(tokens, image_ids, scored, nothing.reshape(-1, 1, 1, 1)[:, :0, :0, :0], nothing)
    latents = np.stack([part.values for part in images]) if images else np.zeros((0, *NO_LATENTS))
    return Example(tokens, image_ids, scored, latents.astype(np.float32),
                   np.array([part.max_t for part in images], np.float32))


def sizes(vocabulary: Vocabulary, text_tokens, images) -> Sizes:
    N = vocabulary.num_patches
    scored = text_tokens + images + 1 + (N * images if vocabulary.num_codes else 0)
    return Sizes(text_tokens + images * (N + 2) + 2, scored, images)


def latents_of(row):
    return row.latents_BIhwc


def latent_patches(vocabulary: Vocabulary) -> Layout:
    """Images as N patches of latents, which no token stands for."""
    return Layout(partial(sizes, vocabulary), partial(lay, vocabulary), latents_of)


def codes_of(vocabulary: Vocabulary, row):
    """int32 (I, h, w), zeros in unused slots."""
    side = math.isqrt(vocabulary.num_patches)
    places = row.image_start_BI[:, None] + np.arange(vocabulary.num_patches)
    used = row.image_start_BI[:, None] < len(row.tokens_BT)
    tokens = row.tokens_BT[np.where(used, places, 0)]
    return np.where(used, tokens - vocabulary.first_code, 0).reshape(-1, side, side)


def codes(vocabulary: Vocabulary) -> Layout:
    """Images as a square of N codes, row by row, each a token."""
    return Layout(partial(sizes, vocabulary), partial(lay, vocabulary), partial(codes_of, vocabulary))
