"""What may be wrong with a record: each fault has one outcome, and stops nothing beside it."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from tests.data.sources.test_array_record import picture, record
from tests.data.sources.test_array_record import write as write_records
from tests.data.sources.test_tfds import write as write_tfds
from tfusion.data import store
from tfusion.data.sources.array_record import ArrayRecordSource
from tfusion.data.sources.folder import FolderSource
from tfusion.data.sources.jsonl import JsonlSource
from tfusion.data.sources.tfds import TfdsSource
from tfusion.data.store import Split
from tfusion.data.tokenizers import load_tokenizer
from tfusion.errors import UserError
from tfusion.preparing import card
from tfusion.preparing.shards import Encoders, Job, write


def draw(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


def encode(images):
    return np.zeros((len(images), 1, 1, 1), np.float32)


def prepared(tmp_path, spec, tokenizer="byte"):
    """(records as (text or None, number of pictures), what the ledger has skipped)."""
    tokenizer = load_tokenizer(tokenizer)
    write(tmp_path / "data", Job("s", "train", 0, spec.open("train", 4), 4096),
          Encoders(tokenizer.encode_batch, encode))
    source = Split(tmp_path / "data", "s", "train")
    found = []
    for parts in source.read(0, range(len(source))) if source.shards else []:
        texts = [tokenizer.decode(part.values) for part in parts if part.kind == "text"]
        found.append((" ".join(texts) if texts else None, sum(part.kind == "image" for part in parts)))
    line, = store.ledger(source.folder).values()
    return found, line["skipped"]


def bomb(path):
    """A PNG that says it has 40,000 x 40,000 pixels."""
    draw(path)
    data = bytearray(path.read_bytes())
    data[16:24] = (40_000).to_bytes(4) * 2
    path.write_bytes(data)


def test_of_a_folder(tmp_path):
    root = tmp_path / "photos"
    for name in ("good", "noise", "latin", "blank", "long", "alone", "odd"):
        draw(root / f"{name}.png")
    (root / "noise.png").write_bytes(b"GIF89a and nothing more")
    bomb(root / "bomb.png")
    for name, text in (("good", b"a fox"), ("noise", b"b"), ("bomb", b"c"),
                       ("latin", "Füchsin".encode("latin1")), ("blank", b" \n"), ("long", b"x" * 100_000),
                       ("odd", b"a\0b\x07c\x1b[1m")):
        (root / f"{name}.txt").write_bytes(text)
    found, skipped = prepared(tmp_path, FolderSource("folder", 1.0, str(root), 0.0))
    assert found == [(None, 1), (None, 1), ("a fox", 1), ("a\0b\x07c\x1b[1m", 1)]  # alone, blank, good, odd
    assert skipped == {"damaged picture": [2, ["bomb.png", "noise.png"]], "long caption": [1, ["long.png"]],
                       "unreadable caption": [1, ["latin.png"]]}


@pytest.mark.parametrize("tokenizer", ["byte", "default"])
def test_nul_and_control_characters_are_text(tmp_path, tokenizer):
    """They neither end a text nor the run; SentencePiece writes some kinds of blanks as one."""
    (tmp_path / "a.jsonl").write_text(json.dumps("fox\0apple\x01moon\x7fsun") + "\n")
    (text, _), = prepared(tmp_path, JsonlSource("jsonl", 1.0, str(tmp_path / "a.jsonl"), 0.0), tokenizer)[0]
    assert all(word in text for word in ("fox", "apple", "moon", "sun"))


@pytest.mark.parametrize("place", ["../secret/a.png", "/etc/passwd", "in/../../secret/a.png",
                                   "/dev/zero"])
def test_a_path_that_leads_out_of_the_folder(tmp_path, place):
    """Whoever wrote the table could else read any picture of this machine."""
    draw(tmp_path / "secret" / "a.png")
    draw(tmp_path / "photos" / "in" / "a.png")
    for name, line in (("photos/metadata.jsonl", {"file_name": place, "text": "a"}),
                       ("photos/metadata.jsonl", {"file_name": "in/../in/a.png", "text": "b"}),
                       ("lines/a.jsonl", {"segments": [{"image": place}]}), ("lines/a.jsonl", {"text": "c"})):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with (tmp_path / name).open("a") as file:
            file.write(json.dumps(line) + "\n")
    for case, spec, wanted in (
            ("f", FolderSource("folder", 1.0, str(tmp_path / "photos"), 0.0), [("b", 1)]),
            ("l", JsonlSource("jsonl", 1.0, str(tmp_path / "lines/a.jsonl"), 0.0), [("c", 0)])):
        (tmp_path / case).mkdir()
        found, skipped = prepared(tmp_path / case, spec)
        assert found == wanted and list(skipped) == ["path out of the folder"]


def test_no_way_back_from_where_a_link_leads(tmp_path):
    """A link that lies in the folder may be followed, for it is the user's; `..` goes back in the text."""
    draw(tmp_path / "elsewhere/in/a.png")
    draw(tmp_path / "elsewhere/b.png")
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines/link").symlink_to(tmp_path / "elsewhere/in")
    (tmp_path / "lines/a.jsonl").write_text("".join(json.dumps({"segments": [{"text": text}, {"image": image}]})
                                                   + "\n" for text, image in (("a", "link/a.png"),
                                                                              ("b", "link/../b.png"))))
    found, skipped = prepared(tmp_path, JsonlSource("jsonl", 1.0, str(tmp_path / "lines/a.jsonl"), 0.0))
    assert found == [("a", 1)]
    assert skipped == {"missing picture": [1, [str(tmp_path / "lines/b.png")]]}


def test_what_is_no_file_is_not_read(tmp_path):
    """From a pipe nothing may ever come."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    lines = [{"segments": [{"text": "a"}, {"image": image}]} for image in (
        "pipe.png", "folder.png", "none.png", "a\0.png", "x" * 300 + ".png")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, "good"]))
    found, skipped = prepared(tmp_path, JsonlSource("jsonl", 1.0, str(tmp_path / "a.jsonl"), 0.0))
    assert found == [("good", 0)]
    assert {reason: [name.rsplit("/", 1)[1] for name in names] for reason, (_, names) in skipped.items()} == {
        "unreadable picture": ["pipe.png", "folder.png", "x" * 300 + ".png"], "missing picture": ["none.png"],
        "damaged picture": ["a\0.png"]}


def test_a_picture_of_a_table_that_is_not_there(tmp_path):
    draw(tmp_path / "photos" / "a.png")
    (tmp_path / "photos/metadata.csv").write_text("file_name,text\na.png,a fox\ngone.png,an owl\n")
    found, skipped = prepared(tmp_path, FolderSource("folder", 1.0, str(tmp_path / "photos"), 0.0))
    assert found == [("a fox", 1)] and skipped == {"missing picture": [1, ["gone.png"]]}


def test_keys_that_are_not_utf8_can_be_told(tmp_path):
    """Names of an old archive: prepare ends by printing them."""
    (draw(tmp_path / "photos" / "a.png").parent / os.fsdecode(b"\xe9.png")).write_bytes(b"")
    _, skipped = prepared(tmp_path, FolderSource("folder", 1.0, str(tmp_path / "photos"), 0.0))
    assert skipped == {"damaged picture": [1, ["\ufffd.png"]]}
    card.told(skipped).encode()


def test_of_array_records(tmp_path):
    """By its id, or its file and number there."""
    write_records(tmp_path / "a.array_record", b"no JSON", record("x", b"no picture", id="fox"),
                  record("y", b"no picture"), {"text": "good"})
    found, skipped = prepared(tmp_path, ArrayRecordSource("array_record", 1.0, str(tmp_path / "a.array_record"),
                                                          "none", 0.0))
    assert found == [("good", 0)] and skipped == {
        "malformed record": [1, ["a.array_record:0"]], "damaged picture": [2, ["fox", "a.array_record:2"]]}


def test_a_record_that_its_file_cannot_give(tmp_path):
    path = write_records(tmp_path / "a.array_record", *(
        {"text": f"{i} " + os.urandom(100).hex()} for i in range(50)))
    content = bytearray(path.read_bytes())
    content[4000] ^= 255
    path.write_bytes(content)
    found, skipped = prepared(tmp_path, ArrayRecordSource("array_record", 1.0, str(path), "none", 0.0))
    (number, (key,)), = skipped.values()
    assert len(found) == 49 and list(skipped) == ["damaged record"] and number == 1
    assert key.startswith("a.array_record:")


def test_of_tfds(tmp_path):
    path = write_tfds(tmp_path / "tfds", train=[
        {"key": "a", "image": b"no picture", "text": "a fox"},
        {"key": "b", "image": picture(4), "text": b"F\xfcchsin"},
        {"key": "c", "image": picture(5), "text": "good"}])
    for key, names in (("key", ["a", "b"]), ("none", [f"given-train.array_record-00000-of-00001:{i}"
                                                      for i in range(2)])):
        (tmp_path / key).mkdir()
        spec = TfdsSource("tfds", 1.0, str(path), "train", "none", 0.0, "image", "text", key)
        found, skipped = prepared(tmp_path / key, spec)
        assert found == [("good", 1)] and skipped == {
            "damaged picture": [1, names[:1]], "text not UTF-8": [1, names[1:]]}


def test_pictures_beside_the_folders_of_lines(tmp_path):
    """A folder of jsonl files is one root: its files may share pictures."""
    draw(tmp_path / "all/pictures/a.png")
    (tmp_path / "all/lines").mkdir()
    line = json.dumps({"segments": [{"image": "../pictures/a.png"}]})
    (tmp_path / "all/lines/a.jsonl").write_text(line + "\n")
    assert prepared(tmp_path, JsonlSource("jsonl", 1.0, str(tmp_path / "all"), 0.0)) == ([(None, 1)], {})


@pytest.mark.parametrize("line", [b'{"text": ', '"Füchsin"'.encode("latin1"), b'"a\0b"',
                                  b'{"segments": [{"text": "a"}, {"image": " "}]}'])
def test_a_line_that_is_no_record_is_a_mistake_of_the_file(tmp_path, line):
    """No JSON, no UTF-8, a bare NUL, a picture without a name."""
    (tmp_path / "a.jsonl").write_bytes(b'"a"\n' + line + b"\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: "):
        prepared(tmp_path, JsonlSource("jsonl", 1.0, str(tmp_path / "a.jsonl"), 0.0))
