"""The data card: counts by hand."""

import json

import numpy as np
import pytest

from tfusion.data.layout import image, text
from tfusion.data.store import Writer
from tfusion.errors import UserError
from tfusion.preparing import card


def fill(root):
    """Two shards of training pairs with a copy across them; held out, one that is in train too."""
    def pair(ids, *values):
        return [text(ids), *(image(np.full((1, 1, 2), value, np.float32)) for value in values)]

    with Writer(root, "pairs", "train", 0) as writer:
        for record in (pair([5, 6], 1), pair([5], -1), [text([7, 8, 9, 10])]):
            writer.add(record)
        writer.skip("damaged picture", "a.png")
    with Writer(root, "pairs", "train", 1) as writer:
        for record in (pair([5, 6], 1), pair([], 1, -1)):
            writer.add(record)
        for key in "bcd":
            writer.skip("damaged picture", key)
        writer.skip("empty", "record 7")
    with Writer(root, "pairs", "heldout", 0) as writer:
        writer.add(pair([5], -1))
        writer.add(pair([99], 1))


def test_by_hand(tmp_path):
    fill(tmp_path)
    made = card.make(tmp_path)
    assert json.loads(json.dumps(made)) == made and list(made) == ["pairs/heldout", "pairs/train"]
    train = made["pairs/train"]
    assert train.pop("bytes") > 0
    assert train == {
        "records": 5, "text_tokens": 9, "images": 5, "shards": 2, "pictures_without_text": 1, "copies": 1,
        "text_tokens_per_record": {"mean": 1.8, "min": 0, "p5": 0, "p50": 2, "p95": 4, "max": 4},
        "images_per_record": {"0": 1, "1": 3, "2": 1},
        "latents": {"mean": [0.2, 0.2], "std": [0.9798, 0.9798]},
        "skipped": {"damaged picture": [4, ["a.png", "b", "c"]], "empty": [1, ["record 7"]]}}
    heldout = made["pairs/heldout"]
    assert (heldout["records"], heldout["copies"], heldout["also_in_train"]) == (2, 0, 1)
    assert card.lines(made)[1:] == [
        "pairs/train: 5 records, 9 tokens, 5 images, 2 tokens a record (at most 4), 1 pictures without text, "
        "1 exact copies of others",
        "  skipped: 4 damaged picture (a.png, b, c, ...); 1 empty (record 7)"]
    assert "1 stand in train too" in card.lines(made)[0]


@pytest.mark.parametrize("at_once", [1, 3])
def test_copies_are_counted_in_bounded_memory(tmp_path, monkeypatch, at_once):
    fill(tmp_path)
    wanted = card.make(tmp_path)
    monkeypatch.setattr(card, "HASHES", at_once)
    assert card.make(tmp_path) == wanted


def test_a_source_of_which_nothing_can_be_used(tmp_path):
    for split in ("train", "heldout"):
        with Writer(tmp_path, "photos", split, 0) as writer:
            writer.skip("damaged picture", "a.png")
    made = card.make(tmp_path)
    with pytest.raises(UserError, match=r"^photos/train: none of 1 records can be used: 1 damaged picture \(a"):
        card.check(made)
    card.check({"photos/heldout": made["photos/heldout"]})  # of ten pictures one is held out
    assert "0 records" in card.lines(made)[0]


def test_held_out_records_are_looked_for_in_every_training_split(tmp_path):
    fill(tmp_path)
    with Writer(tmp_path, "texts", "train", 0) as writer:
        writer.add([text([7])])
    assert card.make(tmp_path)["pairs/heldout"]["also_in_train"] == 1
