"""Lines of JSON as people have them."""

import gzip
import json
import os
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from tfusion.data.sources import records
from tfusion.data.sources.jsonl import JsonlSource
from tfusion.errors import UserError


def write(path, *lines, end="\n"):
    """Lines that are no str or bytes yet are written as JSON."""
    lines = [line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
             for line in lines]
    data = b"".join(line + end.encode() for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def open_it(path, split="train", fraction=0.0, image_size=4):
    return JsonlSource("jsonl", 1.0, str(path), fraction).open(split, image_size)


def read(path, split="train", fraction=0.0):
    return list(records(open_it(path, split, fraction), "notes"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "odd.txt"])
def test_texts(tmp_path, name):
    path = write(tmp_path / name, b"\xef\xbb\xbf" + b'{"text": "one"}', "", '  "two"', {"text": "drei ü 🦊"},
                 "  ", {"text": " \n "}, {"text": "four\nlines ", "url": "x", "n": [1]}, end="\r\n")
    source = open_it(path)
    assert list(records(source, "notes")) == [["one"], ["two"], ["drei ü 🦊"], ["four\nlines "]]
    assert [source[i] for i in (3, 0, 2)] == [["four\nlines "], ["one"], ["drei ü 🦊"]]


def test_the_last_line_needs_no_end(tmp_path):
    assert read(write(tmp_path / "a.jsonl", b'"one"\n"two"', end="")) == [["one"], ["two"]]


def test_texts_and_pictures_in_their_order(tmp_path):
    for i in range(3):
        (tmp_path / "in" / "pictures").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 6), (i, i, i)).save(tmp_path / "in" / "pictures" / f"{i}.png")
    path = write(tmp_path / "in" / "a.jsonl",
                 {"segments": [{"text": "first"}, {"image": "pictures/0.png"}, {"text": ""}, {"text": "then"},
                               {"image": "pictures/1.png"}]},
                 {"segments": [{"image": str(tmp_path / "in" / "pictures" / "2.png")}]}, {"segments": []})
    first, second = read(path)
    assert [part if isinstance(part, str) else int(part[0, 0, 0]) for part in first] == ["first", 0, "then", 1]
    assert second[0].shape == (4, 4, 3) and second[0].dtype == np.uint8
    assert open_it(path, image_size=None)[1][0].shape == (6, 9, 3)


def test_a_record_whose_picture_is_damaged_is_left_out(tmp_path, capsys):
    write(tmp_path / "a.png", b"")
    path = write(tmp_path / "a.jsonl", {"segments": [{"text": "a"}, {"image": "a.png"}]}, {"text": "b"},
                 {"segments": [{"image": "none.png"}, {"text": "c"}]})
    assert read(path) == [["b"]]
    err = capsys.readouterr().err
    assert "2 of 3 records cannot be read" in err and f"{tmp_path}/none.png cannot be read: No such file" in err


def test_folders_and_patterns(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "deep/c.jsonl", ".hidden.jsonl", "__MACOSX/x.jsonl", "d.json"):
        write(tmp_path / name, {"text": name}, {"text": f"{name}, too"})
    os.symlink(tmp_path, tmp_path / "deep" / "back")
    (tmp_path / "zero.jsonl").touch()

    def names(path):
        return [text for (text,) in read(path)][::2]

    assert names(tmp_path) == ["a.jsonl.gz", "b.jsonl", "deep/c.jsonl"]
    assert names(tmp_path / "*.jsonl*") == ["a.jsonl.gz", "b.jsonl"]
    assert names(tmp_path / "**" / "c.jsonl") == ["deep/c.jsonl"]


def test_several_packed_files_are_read_at_random(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.jsonl.gz", *({"text": f"{name}{i}"} for i in range(50)))
    source = open_it(tmp_path)
    order = np.random.default_rng(0).permutation(150)
    assert [source[i] for i in order] == [[f"{'abc'[i // 50]}{i % 50}"] for i in order]


def test_every_line_is_read_from_its_own_file(tmp_path):
    """Also where some are held out, and a file has none."""
    for name, number in (("a", 5), ("b", 0), ("c.gz", 9), ("d", 40), ("e", 1)):
        stem, _, packed = name.partition(".")
        write(tmp_path / f"{stem}.jsonl{'.gz' * bool(packed)}", " ", *(f'"{stem} {i}"' for i in range(number)))
    both = [read(tmp_path, split, 0.3) for split in ("train", "heldout")]
    assert min(map(len, both)) > 8 and all(some == sorted(some, key=lambda x: x[0][0]) for some in both)
    assert sorted(text for some in both for (text,) in some) == sorted(
        f"{stem} {i}" for stem, number in (("a", 5), ("c", 9), ("d", 40), ("e", 1)) for i in range(number))


def test_the_held_out_lines_are_those_of_their_ids(tmp_path):
    """Whatever their order, and whatever file they stand in."""
    lines = [{"id": i, "text": f"text {i}"} for i in range(200)]
    write(tmp_path / "a.jsonl", *lines)
    held = read(tmp_path / "a.jsonl", "heldout", 0.1)
    train = read(tmp_path / "a.jsonl", "train", 0.1)
    assert len(held) + len(train) == 200 and 5 < len(held) < 50
    assert not {x for (x,) in held} & {x for (x,) in train}
    write(tmp_path / "b.jsonl.gz", *lines[::-1], {"id": "new", "text": "new"})
    assert [x for x in read(tmp_path / "b.jsonl.gz", "heldout", 0.1)[::-1] if x != ["new"]] == held


def test_an_id_may_hold_half_a_letter(tmp_path):
    path = write(tmp_path / "a.jsonl", *(rb'{"id": "\ud83e %d", "text": "%d"}' % (i, i) for i in range(40)))
    assert len(read(path, "train", 0.2)) + len(read(path, "heldout", 0.2)) == 40


def test_without_ids_a_line_is_held_out_by_its_file_and_number(tmp_path):
    """Blank lines count as an editor counts them; the folder may lie anywhere."""
    write(tmp_path / "x" / "a.jsonl", *({"text": str(i)} for i in range(100)))
    held = read(tmp_path / "x" / "a.jsonl", "heldout", 0.1)
    write(tmp_path / "y" / "a.jsonl", *("" if i % 10 == 0 else {"text": str(i)} for i in range(120)))
    assert [x for x in read(tmp_path / "y", "heldout", 0.1) if int(x[0]) < 100] == [
        x for x in held if int(x[0]) % 10]


def test_one_of_two_is_held_out(tmp_path):
    path = write(tmp_path / "a.jsonl", "", {"text": "one"}, {"text": "two"})
    assert len(read(path, "heldout", 1e-6)) == len(read(path, "train", 1e-6)) == 1


def test_halves_of_letters_are_replaced(tmp_path):
    """JSON can hold what UTF-8 cannot; a tokenizer would end in a traceback."""
    path = write(tmp_path / "a.jsonl", r'{"text": "a \ud83e\udd8a b \ud83e c"}')
    assert read(path) == [["a 🦊 b \ufffd c"]]


def test_lines_are_not_kept(tmp_path):
    """Of 20 MB of text, places alone."""
    path = write(tmp_path / "a.jsonl", *({"text": "x" * 10_000} for _ in range(2000)))
    tracemalloc.start()
    source = open_it(path)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 2000 and kept < 1e6


ERRORS = {
    "not JSON": (['"a"', "", '{"text": "b"'], r"a.jsonl, line 3: Expecting .* at column 14$"),
    "plain text": (["a fox"], r"a.jsonl, line 1: Expecting value at column 1$"),
    "not UTF-8": (['"a"', '{"text": "Füchsin"}'.encode("latin1")], r"a.jsonl, line 2: .*utf-8"),
    "UTF-16": (['"a"'.encode("utf-16")], r"a.jsonl, line 1: .*utf-8"),
    "a number": (["7"], r'line 1: "a text", {"text": ...} or {"segments": .* is wanted'),
    "other keys": (['{"txt": "a", "n": 1}'], r'line 1: .* is wanted, it has txt, n'),
    "no keys": (["{}"], r"is wanted, it has no keys"),
    "both": (['{"text": "a", "segments": []}'], r"is wanted, it has text, segments"),
    "text is a list": (['{"text": ["a"]}'], r'line 1: {"text": \["a"\]} is neither'),
    "text is null": (['{"text": null}'], r'line 1: {"text": null} is neither'),
    "segments are a text": (['{"segments": "a"}'], r'line 1: "segments" must be a list'),
    "unknown segment": (['{"segments": [{"text": "a"}, {"img": "b.png"}]}'],
                        r'line 1: {"img": "b.png"} is neither {"text": "..."} nor {"image": "PATH"}'),
    "segment of two": (['{"segments": [{"text": "a", "image": "b.png"}]}'], r"is neither"),
    "segment is a text": (['{"segments": ["a"]}'], r'line 1: "a" is neither'),
    "too deep": (["[" * 100_000], r"line 1: .*recursion"),
    "only blank": (["", '{"text": ""}'], r"a.jsonl holds no records: every line is blank"),
    "empty": ([], r"a.jsonl holds no records"),
}


@pytest.mark.parametrize("lines, message", ERRORS.values(), ids=ERRORS.keys())
def test_mistakes_are_one_line(tmp_path, lines, message):
    path = write(tmp_path / "a.jsonl", *lines)
    with pytest.raises(UserError, match=message) as error:
        read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["none.jsonl", "no*.jsonl", "empty"])
def test_no_such_file_folder_or_pattern(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no such file, no folder with .jsonl or .jsonl.gz in it, and no"):
        read(tmp_path / name)


@pytest.mark.parametrize("data", [b"", b"not gzip", gzip.compress(b'"a"\n' * 9999)[:-30]],
                         ids=["empty", "other", "cut"])
def test_a_packed_file_that_is_cut_is_one_line(tmp_path, data):
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    with pytest.raises(UserError, match=r"a.jsonl.gz (cannot be read|holds no records)"):
        read(tmp_path / "a.jsonl.gz")
