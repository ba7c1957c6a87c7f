"""A few records with images that no row holds are left out and counted; many are a mistake."""

import dataclasses

import numpy as np
import pytest

from tests.golden import write_split
from tfusion.data import pipeline, store
from tfusion.data.documents import Documents
from tfusion.data.heldout import HeldOut
from tfusion.data.tokenizers import load_tokenizer
from tfusion.errors import UserError
from tfusion.objectives import kind_of

T = 64
BAD = (0, 7, 8, 99)  # the first, two in turn, the last: too long, or too many pictures


def picture(value: int):
    return np.full((4, 4, 3), value, np.uint8)


def record(i: int, bad) -> list:
    if i in bad:
        return ["x" * 80, picture(i)] if i % 2 else [picture(i)] * 9
    return [chr(97 + i % 26), picture(i)] if i % 3 else ["a long text " * 10]  # in two pieces


@pytest.fixture
def make(cfg, tmp_path):
    def make(bad=BAD):
        for split in ("train", "heldout"):
            write_split(tmp_path, "mixed", split, [record(i, bad) for i in range(100)],
                        lambda xs: [[ord(c) for c in x] for x in xs],
                        lambda images: (images[..., [0, 1, 2, 0]] - 49.5) / 29, shards=3)
        store.write_meta(tmp_path, load_tokenizer("byte"), "none", cfg.model.latent_shape)
        data = dataclasses.replace(cfg.data, prepared=str(tmp_path), seq_len=T, image_share=0.4, window_rows=8,
                                   caption_dropout=0.0, image_first_fraction=0.0,
                                   sources={"mixed": cfg.data.sources["glosses"]})
        return dataclasses.replace(cfg, data=data)
    return make


def test_the_others_are_there_and_are_those_they_were(make, capsys):
    """By number, through the shards, and piece after piece."""
    format = make().rows
    documents = Documents(format, "mixed", "train")
    err = capsys.readouterr().err
    assert "4 of 68 records with images are left out: one has 9 images and needs 56 positions" in err
    assert "raise data.image_share to" in err and len(err.splitlines()) == 1 and "sample" not in err
    Documents(format, "mixed", "train")
    assert capsys.readouterr().err == ""  # said once
    of, pieces, lengths, images = documents.cut(np.arange(100))
    expected = [(i, piece) for i in range(100) if i not in BAD for piece in range(1 if i % 3 else 2)]
    assert list(zip(of.tolist(), pieces.tolist())) == expected
    assert documents.records.tolist() == sorted(set(range(100)) - set(BAD))
    for example, length, number in zip(documents.read(expected), lengths, images):
        assert len(example.tokens_L) == length <= T and len(example.max_t_I) == number


def test_rows_and_held_out_rows_hold_none_of_them(make):
    """And they are counted, of every window."""
    cfg = make()
    rows = kind_of(cfg).open_rows(cfg)
    seen = {record for window in range(30) for row in rows.plan(window).rows for _, _, record, _ in row}
    assert seen == set(range(100)) - set(BAD)
    left_out = [rows.stats(window * 8)["data/left_out_records/mixed"] for window in range(1, 101)]
    assert np.mean(left_out) == pytest.approx(0.04, abs=0.005)
    batch = next(pipeline.batches(rows, 0, 1, 16))
    rows.check(batch)
    held = HeldOut(cfg.rows, "mixed")
    assert held.num_documents == len(held.source.cut(np.arange(100)).of) == 96 + 34 - 2


def test_mean_lengths_are_of_those_that_are_left(make):
    """Per record, for windows count records: those that are left out take no position."""
    documents = Documents(make().rows, "mixed", "train")
    cut, (positions, in_images) = documents.cut(np.arange(100)), documents.means(0.0)
    assert positions == pytest.approx(cut.lengths.sum() / 100)
    assert in_images == pytest.approx(6 * cut.images.sum() / 100)


def test_many_are_an_error(make):
    message = (r"8 of 69 records with images are left out: one has 1 images and needs 88 positions; a row has "
               "64, and .* raise data.seq_len to 88")
    with pytest.raises(UserError, match=message):
        Documents(make(bad=range(1, 16, 2)).rows, "mixed", "train")


def test_nothing_left_out_is_not_told(make, capsys):
    documents = Documents(make(bad=()).rows, "mixed", "train")
    assert "left out" not in capsys.readouterr().err and len(documents) == len(documents.records) == 100
