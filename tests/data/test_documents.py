"""Plan and layout agree: whatever the records, a row is laid out as its plan counted it."""

import dataclasses

import numpy as np
import pytest

from tfusion.data import packing, pipeline, prepared
from tfusion.objectives import make_objective

SPLITS = ("train", "heldout")


def picture(rng):
    return rng.integers(0, 256, (4, 4, 4), np.uint8)


def text(rng, low: int, high: int) -> str:
    return "".join(chr(c) for c in rng.integers(97, 123, rng.integers(low, high)))


KINDS = {  # records of every kind: (rng) -> parts
    "pair": lambda r: [text(r, 1, 20), picture(r)],
    "pair without a caption": lambda r: ["", picture(r)],
    "pictures alone": lambda r: [picture(r), picture(r)],
    "story": lambda r: [text(r, 1, 9), picture(r), text(r, 1, 9), picture(r), text(r, 0, 9)],
    "text": lambda r: [text(r, 1, 60)],
    "two texts": lambda r: [text(r, 1, 30), text(r, 1, 30)],
    "empty text": lambda r: [""],
    "nothing": lambda r: [],
}


def write(root, cfg, **sources):
    """Sources of the given records, the same in both splits: a byte a token, pictures their own latents."""
    for name, records in sources.items():
        for split in SPLITS:
            prepared.write_source(root / name / split, records, lambda xs: [[ord(c) for c in x] for x in xs],
                                  lambda images: images / 255)
    prepared.write_meta(root, "byte", "tok", "none", cfg.model.latent_shape)
    data = dataclasses.replace(cfg.data, prepared=str(root), mixture=dict.fromkeys(sources, 1.0))
    return dataclasses.replace(cfg, data=data)


def open_rows(cfg, **data):
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **data))
    return pipeline.open_rows(cfg, make_objective(cfg), "train")


@pytest.mark.parametrize("seed", range(6))
def test_plan_and_layout_agree(cfg, tmp_path, seed):
    """Positions used are those planned, and the batch keeps the contract; with dropped captions and without."""
    rng = np.random.default_rng(seed)
    records = [KINDS[kind](rng) for kind in rng.choice(list(KINDS), 200)]
    cfg = write(tmp_path, cfg, mixed=records)
    rows = open_rows(cfg, caption_dropout=0.3 * (seed % 2), image_first_fraction=0.4, seq_len=96)
    R = cfg.data.window_rows
    batch = packing.stack_rows([rows[row] for row in range(2 * R)])
    rows.check(batch)
    for window in range(2):
        for row, documents in enumerate(rows.plan(window).rows, start=window * R):
            lengths = [len(rows.example(*document).tokens_L) for document in documents]
            assert sum(lengths) == (batch.segment_ids_BT[row] > 0).sum() <= 96
