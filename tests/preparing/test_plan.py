"""What makes prepared data other data, and what does not."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tfusion.data.sources.base import Source
from tfusion.data.sources.folder import FolderSource
from tfusion.data.sources.jsonl import JsonlSource
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
