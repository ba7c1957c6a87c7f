"""PSNR by hand, and the config of one source alone."""

import dataclasses
import math

import numpy as np
import pytest

from tfusion.evals import losses


def test_psnr_by_hand():
    dark = np.full((2, 4, 4, 3), 100, np.uint8)
    bright = np.full((2, 4, 4, 3), 110, np.uint8)
    want = 20 * math.log10(255 / 10)  # 28.13 dB: an error of 10 everywhere
    assert losses.psnr(dark, bright) == pytest.approx(want)
    assert losses.psnr(bright, dark) == pytest.approx(want)  # bytes must not wrap around
    black, white = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
    assert losses.psnr(black, white) == pytest.approx(0)
    half = dark.copy()
    half[0] += 20  # 400 in one picture, 0 in the other: the errors are averaged, not the decibels
    assert losses.psnr(dark, half) == pytest.approx(10 * math.log10(255**2 / 200))


def test_only_one_source_captions_first(cfg):
    tree = dataclasses.asdict(cfg)
    assert len(tree["data"]["mixture"]) > 1 and tree["data"]["caption_dropout"] > 0
    assert tree["data"]["image_first_fraction"] > 0
    tree["data"].update(mixture={"glosses": 1.0}, caption_dropout=0.0, image_first_fraction=0.0)
    before = dataclasses.asdict(cfg)
    assert dataclasses.asdict(losses.only(cfg, "glosses")) == tree  # and nothing else
    assert dataclasses.asdict(cfg) == before


def test_read_gives_documents_of_that_source_alone(cfg):
    for split in ("train", "heldout"):
        batches = list(losses.read(losses.only(cfg, "glosses"), split, 2))
        assert len(batches) == 2 and all(len(b.row_ids_B) == cfg.train.batch_size for b in batches)
        assert not any(b.image_ids_BT.any() for b in batches)
    assert any(b.image_ids_BT.any() for b in losses.read(losses.only(cfg, "scenes"), "heldout", 2))
