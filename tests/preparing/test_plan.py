"""What makes prepared data other data, and what does not."""

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.data.sources.test_array_record import record, write
from tests.data.sources.test_tfds import write as write_tfds
from tfusion.data.sources.array_record import ArrayRecordSource
from tfusion.data.sources.base import Source
from tfusion.data.sources.folder import FolderSource
from tfusion.data.sources.jsonl import JsonlSource
from tfusion.data.sources.tfds import TfdsSource
from tfusion.data.tokenizers import ByteTokenizer, load_tokenizer
from tfusion.errors import UserError
from tfusion.preparing import plan

CODEC = SimpleNamespace(fingerprint="codec", image_size=8)


@dataclasses.dataclass(frozen=True)
class Spec(Source):
    number: int = 0


def made(records, spec=None, tokenizer=None, codec=CODEC):
    spec = spec or Spec("x", 0.5)
    return plan.make({"a": spec}, {("a", "train"): records}, tokenizer or ByteTokenizer(), codec)


def test_what_makes_them_other_data():
    records = [[f"text {i}"] for i in range(100)]
    same = [made(records), made(list(records)), made(records, Spec("x", 0.9))]  # a share decides nothing here
    assert same[0] == same[1] == same[2]
    other = [made(records[1:]), made([["other"], *records[1:]]), made(records, Spec("x", 0.5, 7)),
             made(records, tokenizer=load_tokenizer("default")), made(records, codec=None),
             made(records, codec=SimpleNamespace(fingerprint="codec", image_size=9)),
             made([[np.zeros((2, 2, 3), np.uint8)], *records[1:]])]
    assert all(a != b for i, a in enumerate([same[0], *other]) for b in other[i:])


def folder_with(tmp_path):
    for i in range(40):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:02d}.png")
        (tmp_path / f"{i:02d}.txt").write_text("a fox")
    return FolderSource("folder", 1.0, str(tmp_path), 0.0), tmp_path / "20.txt"


def lines_in(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('"a fox"\n' * 100)
    return JsonlSource("jsonl", 1.0, str(path), 0.0), path


def lines_with_pictures(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path = tmp_path / "a.jsonl"
    path.write_text('{"segments": [{"text": "a fox"}, {"image": "a.png"}]}\n' * 100)
    return JsonlSource("jsonl", 1.0, str(path), 0.0), tmp_path / "a.png"


def array_records_in(tmp_path, fraction=0.0):
    for name in "ab":
        write(tmp_path / f"{name}.array_record", *({"text": f"a fox {i}"} for i in range(100)))
    return ArrayRecordSource("array_record", 1.0, str(tmp_path), "none", fraction), tmp_path / "b.array_record"


def array_records_by_hash(tmp_path):
    return array_records_in(tmp_path, 0.1)


def array_records_of_their_own(tmp_path):
    spec, path = array_records_in(tmp_path / "train")
    write(tmp_path / "held" / "c.array_record", {"text": "an owl"})
    return dataclasses.replace(spec, heldout_path=str(tmp_path / "held")), path


def tfds_in(tmp_path):
    path = write_tfds(tmp_path, train=[{"key": f"{i}", "image": b"", "text": f"a fox {i}"} for i in range(40)])
    return TfdsSource("tfds", 1.0, str(path), "train", "none", 0.0, "none", "text", "key"), (
        Path(path) / "given-train.array_record-00000-of-00001")


@pytest.mark.parametrize("make", [array_records_in, array_records_by_hash, array_records_of_their_own, tfds_in,
                                  lines_with_pictures])
def test_a_file_written_again_is_noticed(tmp_path, make):
    """By size and time alone, whatever is in it."""
    spec, changed = make(tmp_path)
    before = made(spec.open("train", 8), spec)
    assert made(spec.open("train", 8), spec) == before and before["sources"]["a/train"]["fingerprint"]
    at = changed.stat().st_mtime_ns + 10**9
    os.utime(changed, ns=(at, at))
    assert made(spec.open("train", 8), spec) != before


def test_records_that_cannot_be_read_are_the_same_records_again(tmp_path):
    """What a library says of them may name an address in memory."""
    write(tmp_path / "a.array_record", *[record("a fox", b"no picture")] * 3)
    spec = ArrayRecordSource("array_record", 1.0, str(tmp_path), "none", 0.0)
    assert made(spec.open("train", 8), spec) == made(spec.open("train", 8), spec)


def test_an_image_that_is_not_asked_for_is_not_decoded(tmp_path):
    spec, _ = tfds_in(tmp_path)  # its images are no images
    assert [spec.open("train")[i] for i in (0, 39)] == [["a fox 0"], ["a fox 39"]]


def test_which_records_were_chosen_is_noticed(tmp_path):
    specs = [array_records_in(tmp_path, fraction)[0] for fraction in (0.1, 0.2)]
    os.utime(tmp_path / "a.array_record", (1, 1))
    os.utime(tmp_path / "b.array_record", (1, 1))
    opened = [spec.open(split) for spec in specs for split in ("train", "heldout")]
    assert len({source.fingerprint for source in opened}) == 4


@pytest.mark.parametrize("make", [folder_with, lines_in])
def test_a_source_that_has_changed_is_noticed(tmp_path, make):
    """Also where none of the records that are looked at has."""
    spec, changed = make(tmp_path)
    before = made(spec.open("train", 8), spec)
    assert made(spec.open("train", 8), spec) == before
    changed.write_text(changed.read_text().replace("fox", "cow", 1).replace("\n", "\n ", 1) + " ")
    after = made(spec.open("train", 8), spec)
    assert after["sources"]["a/train"]["fingerprint"] != before["sources"]["a/train"]["fingerprint"]


def test_an_empty_source_is_named():
    with pytest.raises(UserError, match=r"data\.sources\.a has no records to train on"):
        made([])


def test_pictures_without_a_codec_are_noticed_at_once():
    with pytest.raises(UserError, match="--codec=WORKDIR is needed"):
        made([["a"], [np.zeros((2, 2, 3), np.uint8)]], codec=None)
