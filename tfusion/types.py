"""The data contract: what every part of the code agrees on. Shapes use one letter per axis.

B batch rows, T tokens per row, I image slots per row, h w c latent height, width, channels,
H W pixel height, width, V text vocabulary size.

Ids: 0/1/2/3 = pad/bos/eos/unk, text ids below V, then BOI = V and EOI = V + 1, then V + 2 + k for code k.
"""

from typing import NamedTuple

import numpy as np

FORMAT_VERSION = 5  # of checkpoints and exports, not of prepared data (data/store.py); configs of 4 lack keys

PAD, BOS, EOS = 0, 1, 2


class Batch(NamedTuple):
    """Packed rows. A row holds documents `<bos> text <boi> patch x N <eoi> text <eos>`, then padding."""

    row_ids_B: np.ndarray  # int32: global row number in the run
    tokens_BT: np.ndarray  # int32: text ids; the pad id at patches of latents, a code's id at those of codes
    segment_ids_BT: np.ndarray  # int32: document number in the row, from 1; 0 = padding
    image_ids_BT: np.ndarray  # int32: 0 = not a patch, k = a patch of the row's k-th image
    positions_BT: np.ndarray  # int32: RoPE position, restarting at each document
    loss_mask_BT: np.ndarray  # bool: position p is scored on tokens[p + 1]
    latents_BIhwc: np.ndarray  # float32: clean normalised latents; slot = image id - 1; empty for codes
    image_start_BI: np.ndarray  # int32: row position of the slot's first patch; T = unused slot
    max_t_BI: np.ndarray  # float32: t = max_t * (1 - u), u in [0, 1); 0 = the slot has no loss
    noise_ids_BI2: np.ndarray  # uint32: what the slot's noise is keyed by, folded into the step's key one
    # after the other: (global row, slot) in training, the picture's own name in evaluation


class ImageBatch(NamedTuple):
    """What the autoencoder trains on."""

    row_ids_B: np.ndarray  # int32: global row number in the run; keys the posterior noise
    images_BHWC: np.ndarray  # uint8


class Part(NamedTuple):
    """A piece of a document."""

    kind: str  # "text" or "image"
    values: np.ndarray  # int32 (n,) text ids; an image as its codec makes it, such as float32 (h, w, c) latents
    max_t: float = 1.0  # of an image: its noise limit, in [0, 1]


class Document(NamedTuple):
    """One document before it is laid out as tokens."""

    parts: tuple[Part, ...]  # in order
    score_text: bool = True  # False where the caption was dropped for guidance: no LM loss on text


class Example(NamedTuple):
    """One document laid out as L positions; what `Layout.lay` returns (data/layout.py)."""

    tokens_L: np.ndarray  # int32
    image_ids_L: np.ndarray  # int32: 0 = not a patch, k = a patch of the document's k-th image
    loss_mask_L: np.ndarray  # bool
    latents_Ihwc: np.ndarray  # float32: one per image of the document
    max_t_I: np.ndarray  # float32
