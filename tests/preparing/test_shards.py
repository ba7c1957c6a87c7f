"""A range of a source becomes a shard: in order, in full batches, the same bytes whoever writes it."""

import numpy as np
import pytest

from tfusion.data import store
from tfusion.data.sources.base import Unreadable
from tfusion.data.store import Split
from tfusion.errors import UserError
from tfusion.preparing import shards
from tfusion.preparing.shards import Encoders, Job, encoded, jobs, write


def picture(value: int, size: int = 4):
    return np.full((size, size, 3), value, np.uint8)


class Encoder:
    """Of 4 x 4 pictures, 2 x 2 of their red divided by 10; keeps how many it was given."""

    def __init__(self):
        self.batches = []

    def __call__(self, images):
        self.batches.append(len(images))
        return images[:, ::2, ::2, :1] / np.float32(10)


def encode_text(texts):
    return [[ord(c) for c in text] for text in texts]


def read(root, split="train"):
    source = Split(root, "mixed", split)
    return [[part.values.tolist() if part.kind == "text" else round(float(part.values.mean() * 10))
             for part in parts] for shard in range(len(source.shards))
            for parts in source.read(shard, range(source.shards[shard].records))]


RECORDS = [["ab", picture(10)], ["c"], ["de", picture(20), "fgh", picture(30)], [picture(40)], [" ", "i"]]
READ = [[[97, 98], 10], [[99]], [[100, 101], 20, [102, 103, 104], 30], [40], [[105]]]


def test_records_become_ids_and_images_in_their_order(tmp_path):
    told = []
    write(tmp_path, Job("mixed", "train", 0, RECORDS, 99), Encoders(encode_text, Encoder()), told.append)
    assert read(tmp_path) == READ and sum(told) == 5


def test_shards_are_fixed_ranges_of_the_source(tmp_path):
    """Each alone, in any order, makes what all make."""
    every = jobs({("mixed", "train"): RECORDS, ("mixed", "heldout"): []}, 2)
    assert [(job.split, job.shard, list(job.records)) for job in every] == [
        ("train", 0, [0, 1]), ("train", 1, [2, 3]), ("train", 2, [4]), ("heldout", 0, [])]
    for job in reversed(every):
        write(tmp_path, job, Encoders(encode_text, Encoder()))
    assert read(tmp_path) == READ and read(tmp_path, "heldout") == []
    assert [shard.records for shard in Split(tmp_path, "mixed", "train").shards] == [2, 2, 1]


@pytest.mark.parametrize("pictures, texts", [(1, 1), (3, 2), (4, 100), (100, 3), (100, 100)])
def test_pictures_are_encoded_in_full_batches_across_records(monkeypatch, pictures, texts):
    """And records come out as they went in, with their own pictures."""
    monkeypatch.setattr(shards, "PICTURES", pictures)
    monkeypatch.setattr(shards, "TEXTS", texts)
    draw = np.random.default_rng(0)
    records = [[part for i in range(draw.integers(1, 4))
                for part in (chr(97 + i), *[picture(int(draw.integers(250)))] * draw.integers(3))]
               for _ in range(40)]
    encoder = Encoder()
    out = list(encoded(records, Encoders(encode_text, encoder)))
    assert len(out) == len(records)
    for parts, record in zip(out, records):
        for got, part in zip(parts, record, strict=True):
            wanted = encode_text([part])[0] if isinstance(part, str) else encoder(part[None])[0]
            np.testing.assert_array_equal(got.values, wanted)
    total = sum(not isinstance(part, str) for record in records for part in record)
    assert encoder.batches[: total // pictures] == [pictures] * (total // pictures)


def test_no_more_waits_than_a_batch_needs(monkeypatch):
    """Memory: records go on as soon as their pictures are encoded."""
    monkeypatch.setattr(shards, "PICTURES", 4)
    taken = []

    def records():
        for number in range(100):
            taken.append(number)
            yield [picture(number)]

    for number, _ in enumerate(encoded(records(), Encoders(encode_text, Encoder()))):
        assert len(taken) <= number + 4


@pytest.mark.parametrize("first", [[], [picture(1)]], ids=["texts alone", "behind a picture"])
def test_few_letters_are_tokenised_at_once(monkeypatch, first):
    """Memory: a thousand long texts are too much; in what batches pictures are encoded is the same."""
    monkeypatch.setattr(shards, "LETTERS", 1000)
    asked, taken, encoder = [], [], Encoder()

    def records():
        yield ["first", *first]
        for number in range(100):
            taken.append(number)
            yield ["x" * 300]
        yield ["last", picture(2)]

    def encode(texts):
        asked.append(sum(map(len, texts)))
        return encode_text(texts)

    for number, _ in enumerate(encoded(records(), Encoders(encode, encoder))):
        assert first or number == 101 or len(taken) <= number + 4
    assert number == 101 and max(asked) < 1000 + 300 and encoder.batches == [1 + len(first)]


class Damaged(list):
    def __getitem__(self, record):
        if record in (1, 3):
            raise Unreadable(f"{record}.png is damaged", "damaged picture", f"{record}.png")
        if record == 4:
            raise Unreadable("what has no name")
        return super().__getitem__(record)


def test_what_cannot_be_used_is_skipped_and_counted(tmp_path):
    """One bad record stops nothing."""
    source = Damaged([["a"], [], [" \n", ""], [], [], ["b"], []])
    write(tmp_path, Job("mixed", "train", 0, source, 99), Encoders(encode_text, None))
    assert read(tmp_path) == [[[97]], [[98]]]
    line, = store.ledger(tmp_path / "mixed" / "train").values()
    assert line["skipped"] == {"damaged picture": [2, ["1.png", "3.png"]], "unreadable": [1, ["record 4"]],
                               "empty": [2, ["record 2", "record 6"]]}


BAD_PARTS = {
    "floats from 0 to 1": (np.full((4, 4, 3), 0.5, np.float32), "a part is float32"),
    "with alpha": (np.zeros((4, 4, 4), np.uint8), r"a part is uint8 \(4, 4, 4\)"),
    "grey": (np.zeros((4, 4), np.uint8), r"a part is uint8 \(4, 4\)"),
    "a number": (7, "a part is int"),
    "bytes": (b"caption", "a part is bytes"),
}


@pytest.mark.parametrize("part, text", BAD_PARTS.values(), ids=BAD_PARTS)
def test_a_part_that_is_neither_text_nor_picture_is_named(tmp_path, part, text):
    source = [["a", picture(1)], ["b"], ["c"], ["d", part]]
    with pytest.raises(UserError, match=f"mixed/train, record 3: {text}"):
        write(tmp_path, Job("mixed", "train", 1, source, 2), Encoders(encode_text, Encoder()))
    assert store.finished(tmp_path, "mixed", "train") == set()


def test_pictures_of_two_sizes_are_refused(tmp_path):
    job = Job("mixed", "train", 0, [["a", picture(1)], [picture(1, 8)]], 99)
    with pytest.raises(UserError, match=r"pictures of \(4, 4, 3\) and \(8, 8, 3\) in one source"):
        write(tmp_path, job, Encoders(encode_text, Encoder()))


def test_an_encoder_that_loses_pictures_is_named(tmp_path):
    with pytest.raises(UserError, match=r"made \(3, 2, 2, 1\) of 4 pictures"):
        write(tmp_path, Job("mixed", "train", 0, RECORDS, 99),
              Encoders(encode_text, lambda x: Encoder()(x)[1:]))


def test_pictures_without_a_codec_are_refused(tmp_path):
    with pytest.raises(UserError, match="--codec=WORKDIR is needed"):
        write(tmp_path, Job("mixed", "train", 0, RECORDS, 99), Encoders(encode_text, None))
