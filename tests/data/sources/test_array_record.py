"""ArrayRecord files that were written elsewhere."""

import io
import json
import os
import re
import threading

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from tests.data.sources.conftest import same
from tfusion.data import readers
from tfusion.data.sources import records, shards
from tfusion.data.sources.array_record import ArrayRecordSource
from tfusion.data.sources.folder import FolderSource
from tfusion.errors import UserError


def write(path, *lines):
    """lines: bytes, or what JSON holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for line in lines:
        writer.write(line if isinstance(line, bytes) else json.dumps(line).encode())
    writer.close()
    return path


def picture(value=0, **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (value, value, value)).save(file, "PNG", **options)
    return file.getvalue()


def record(*parts, **more) -> bytes:
    """Of texts and the contents of pictures."""
    segments = [{"text": part} if isinstance(part, str) else {"image": len(part)} for part in parts]
    return json.dumps({"segments": segments, **more}).encode() + b"\n" + b"".join(
        part for part in parts if isinstance(part, bytes))


def open_it(path, split="train", fraction=0.0, heldout="none", image_size=4):
    return ArrayRecordSource("array_record", 1.0, str(path), str(heldout), fraction).open(split, image_size)


def read(path, split="train", **options):
    return list(records(open_it(path, split, **options), "pairs"))


def greys(read):
    return [part if isinstance(part, str) else int(part[0, 0, 0]) for record in read for part in record]


def write_photos(photos, folder, of=3):
    """The folder's pictures, in its order, over several files."""
    lines = []
    for item in FolderSource("folder", 1.0, str(photos), 0.0).open("train").items:
        caption = [(photos / item.caption).read_text().strip()] if item.caption else []
        lines.append(record(*caption, (photos / item.file).read_bytes(), id=item.key))
    for i in range(of):
        some = slice(i * len(lines) // of, (i + 1) * len(lines) // of)
        write(folder / f"pairs-{i:05d}-of-{of:05d}.array_record", *lines[some])
    return folder


@pytest.mark.parametrize("size", [None, 16])
def test_the_same_documents_as_the_folder(photos, tmp_path, size):
    folder = write_photos(photos, tmp_path)
    for split in ("train", "heldout"):
        wanted = FolderSource("folder", 1.0, str(photos), 0.3).open(split, size)
        found = open_it(folder, split, fraction=0.3, image_size=size)
        assert len(found) == len(wanted) > 3
        assert all(same(found[i], wanted[i]) for i in range(len(wanted)))


def test_texts_and_pictures_in_their_order(tmp_path):
    path = write(tmp_path / "a.array_record", record("first", picture(1), "", picture(2), "then"),
                 {"text": "alone"}, b'"a text"', record(picture(3)), {"text": "two\nlines ", "url": "x"})
    source = open_it(path)
    assert greys(records(source, "pairs")) == ["first", 1, 2, "then", "alone", "a text", 3, "two\nlines "]
    assert greys([source[4], source[0]])[:3] == ["two\nlines ", "first", 1]
    with pytest.raises(IndexError):
        source[5]


def test_files_of_a_folder_or_a_pattern_are_one_after_the_other(tmp_path):
    for i, name in enumerate(("b.array_record", "in/a.array_record", "c.array_record-00000-of-00001", "x.txt")):
        write(tmp_path / name, *({"text": f"{i} {j}"} for j in range(i)))  # the first holds none
    assert greys(read(tmp_path)) == ["2 0", "2 1", "1 0"]
    os.symlink(tmp_path / "in" / "a.array_record", tmp_path / "again.array_record")
    assert sorted(greys(read(tmp_path / "**" / "*a*.array_record"))) == ["1 0"]
    assert greys(read(tmp_path / "x.txt")) == ["3 0", "3 1", "3 2"]


def test_held_out_by_id_wherever_the_records_stand(tmp_path):
    lines = [{"text": f"{i}", "id": f"id {i}"} for i in range(40)]
    write(tmp_path / "one.array_record", *lines)
    write(tmp_path / "two" / "0.array_record", *lines[25:])
    write(tmp_path / "two" / "1.array_record", *lines[:25])
    one, two = ({split: set(greys(read(tmp_path / name, split, fraction=0.2)))
                 for split in ("train", "heldout")} for name in ("one.array_record", "two"))
    assert one == two and one["train"] | one["heldout"] == {str(i) for i in range(40)}
    assert not one["train"] & one["heldout"] and 2 < len(one["heldout"]) < 16


def test_an_id_may_hold_half_a_letter(tmp_path, capsys):
    """As JSON can; it has a side, and can be told."""
    lines = [rb'{"id": "\ud83e %d", "text": "%d"}' % (i, i) for i in range(40)]
    path = write(tmp_path / "a.array_record", *lines)
    assert {*greys(read(path, "train", fraction=0.2)), *greys(read(path, "heldout", fraction=0.2))} == {
        str(i) for i in range(40)}


@pytest.mark.parametrize("name", ["fold-1-of-5/pairs.array_record", "1-of-3/x-0-of-1.array_record"])
def test_a_folder_with_a_number_is_no_file_with_one(tmp_path, name):
    write(tmp_path / name, {"text": "one"})
    assert greys(read(tmp_path)) == greys(read(tmp_path / name)) == ["one"]


def test_files_are_numbered_in_their_own_folders(tmp_path):
    for folder, numbers in (("a", (0, 1)), ("b", (0,))):
        for i in numbers:
            write(tmp_path / folder / f"x-{i}-of-2.array_record", {"text": f"{folder}{i}"})
    with pytest.raises(UserError, match=r"b/x\*: 1 of 2 files are missing, the first has the number 1"):
        read(tmp_path)


def test_without_ids_the_place_decides_and_a_damaged_record_has_a_side(tmp_path):
    path = write(tmp_path / "a.array_record", *({"text": str(i)} for i in range(40)), b"\xff", b"{")
    sides = [open_it(path, split, fraction=0.2) for split in ("train", "heldout")]
    assert sorted(np.concatenate([side.records for side in sides])) == list(range(42)) and len(sides[1]) > 2


def test_held_out_files_of_their_own_need_no_keys(tmp_path, monkeypatch):
    for name in ("train", "val"):
        write(tmp_path / name / "0.array_record", *({"text": f"{name} {i}"} for i in range(3)))
    monkeypatch.setattr(shards.Shards, "__getitem__", lambda self, record: pytest.fail("read at opening"))
    sides = [open_it(tmp_path / "train", split, heldout=tmp_path / "val") for split in ("train", "heldout")]
    none = [open_it(tmp_path / "train", split) for split in ("train", "heldout")]
    monkeypatch.undo()
    assert [greys(records(side, "x")) for side in sides] == [[f"{name} {i}" for i in range(3)]
                                                             for name in ("train", "val")]
    assert [len(side) for side in none] == [3, 0]
    with pytest.raises(UserError, match=r"train/0.array_record is held out and trained on: path = "):
        open_it(tmp_path / "train", heldout=tmp_path / "*" / "*.array_record")


def test_many_files_from_many_threads_with_few_open(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "OPEN", 4)
    for i in range(20):
        write(tmp_path / f"{i:02d}.array_record", *({"text": f"{i} {j}"} for j in range(5)))
    source, wrong, most = open_it(tmp_path), [], []
    before = len(os.listdir("/proc/self/fd"))

    def ask(seed):
        for record in np.random.default_rng(seed).permutation(100):
            if source[int(record)] != [f"{record // 5} {record % 5}"]:
                wrong.append(record)
            most.append(len(os.listdir("/proc/self/fd")) - before)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(most) == 400 and max(most) <= 4 + 4 + 4  # kept, being read, being listed


DAMAGED = {
    "not a picture": (record("a fox", b"no picture"), r" cannot be read as a picture"),
    "empty picture": (b'{"segments": [{"image": 0}]}', r": a picture of 0 bytes is announced, 0 are left"),
    "cut": (record("a fox", picture())[:-1], r": a picture of \d+ bytes is announced, \d+ are left"),
    "more than announced": (record("a fox", picture()) + b"x", r": 1 bytes follow the last picture"),
    "negative": (b'{"segments": [{"image": -1}]}\nxx', r": a picture of -1 bytes is announced, 2 are left"),
    "a path": (b'{"segments": [{"image": "a.png"}]}', r'.* is neither {"text": "..."} nor {"image": BYTES}'),
    "true": (b'{"segments": [{"image": true}]}\nx', r'.* is neither {"text": "..."} nor {"image": BYTES}'),
    "not JSON": (b"\x0a\x05example", r": Expecting value"),
    "not UTF-8": (b'{"text": "F\xfcchsin"}', r": 'utf-8' codec can't decode"),
    "another form": (b'{"caption": "a fox"}', r': "a text", {"text": ...} or .*{"image": BYTES}, ...\]} is w'),
    "blank": (b'{"text": " "}', r": it holds neither text nor picture"),
    "empty": (b"", r": Expecting value"),
    "deep": (b"[" * 100_000, r": "),
}


@pytest.mark.parametrize("line, message", DAMAGED.values(), ids=DAMAGED)
def test_one_bad_record_stops_nothing(tmp_path, capsys, line, message):
    path = write(tmp_path / "a.array_record", {"text": "one"}, line, record("three", picture(3)))
    assert greys(read(path)) == ["one", "three", 3]
    head, why = capsys.readouterr().err.splitlines()
    assert head == "warning: pairs: 1 of 3 records cannot be read and are left out:"
    assert re.search(f"a.array_record, record 1{message}", why)
    first = "none of 1 records can be read. The first: .*b.array_record, record 0"
    with pytest.raises(UserError, match=first + message):
        read(write(tmp_path / "b.array_record", line))


def test_a_damaged_place_in_a_file_is_one_record(tmp_path, capsys):
    path = write(tmp_path / "a.array_record", *({"text": f"{i} " + os.urandom(100).hex()} for i in range(50)))
    content = bytearray(path.read_bytes())
    content[4000] ^= 255
    path.write_bytes(content)
    assert len(read(path)) == 49 and "a.array_record, record 1" in capsys.readouterr().err


def cut(path):
    write(path / "0.array_record", {"text": "one"})
    whole = write(path / "1.array_record", *({"text": str(i)} for i in range(9)))
    whole.write_bytes(whole.read_bytes()[:-7])
    return path


def missing(path):
    for i in (0, 1, 3):
        write(path / f"x-{i:05d}-of-00005.array_record", {"text": "one"})
    return path


def other(path):
    path.joinpath("0.array_record").write_bytes(b"PK" * 50_000)
    return path


ERRORS = {
    "nothing": (lambda path: path / "nope", r"nope: no such file, no folder with \*.array_record\* in it"),
    "empty folder": (lambda path: path, r": no such file, no folder with \*.array_record\* in it"),
    "no match": (lambda path: path / "*.array_record", r"no pattern that names some; --config.data"),
    "cut": (cut, r"1.array_record is no whole ArrayRecord file \("),
    "another format": (other, r"0.array_record is no whole ArrayRecord file \("),
    "empty file": (lambda path: (path.joinpath("0.array_record").touch(), path)[1], r"no whole ArrayRecord fi"),
    "missing shards": (missing, r"x\*: 2 of 5 files are missing, the first has the number 2: bring them back"),
}


@pytest.mark.parametrize("make, message", ERRORS.values(), ids=ERRORS)
def test_mistakes_are_one_line(tmp_path, make, message):
    with pytest.raises(UserError, match=message) as error:
        read(make(tmp_path))
    assert "\n" not in str(error.value)


def test_a_shard_that_goes_while_it_is_read_is_named(tmp_path):
    write(tmp_path / "0.array_record", {"text": "one"})
    source = open_it(tmp_path)
    os.remove(tmp_path / "0.array_record")
    with pytest.raises(UserError, match=r"0.array_record is missing: bring it back"):
        list(records(source, "pairs"))


def test_two_rules_of_what_is_held_out_are_refused():
    with pytest.raises(UserError, match=r"^x.heldout_path = 'val' and x.heldout_fraction = 0.1: set one"):
        ArrayRecordSource("array_record", 1.0, "a", "val", 0.1).check("x")
