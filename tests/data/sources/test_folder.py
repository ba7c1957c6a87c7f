"""Folders of captioned pictures as people have them."""

import os

import numpy as np
import pytest
from PIL import Image

from tfusion.data.sources import records
from tfusion.data.sources.folder import LONGEST_CAPTION, FolderSource, find
from tfusion.errors import UserError

ALL = 0.0  # held out: everything is in 'train'


@pytest.fixture
def root(tmp_path):
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def draw(root, name: str, value: int = 0, **options):
    """A picture of one grey, by which it is known again."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (value, value, value)).save(path, **options)
    return path


def write(root, name: str, text) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def read(root, split="train", fraction=ALL, image_size=4):
    """[(caption or None, grey), ...]"""
    source = FolderSource("folder", 1.0, str(root), fraction).open(split, image_size)
    rows = []
    for record in records(source, "photos"):
        assert record[-1].dtype == np.uint8 and record[-1].shape == (4, 4, 3) and len(record) <= 2
        rows.append((record[0] if len(record) == 2 else None, int(record[-1][0, 0, 0])))
    return rows


def test_text_beside_the_picture(root):
    for i, name in enumerate(("b.png", "a.png", "deep/er/c.PNG", "d.bmp", "e.gif", "f.tif", "g.webp")):
        draw(root, name, 10 * i, **({"lossless": True} if name.endswith("webp") else {}))
        write(root, os.path.splitext(name)[0] + ".txt", f"caption of {name}\n")
    draw(root, "h.jpeg", 200)
    assert read(root) == [
        ("caption of a.png", 10), ("caption of b.png", 0), ("caption of d.bmp", 30),
        ("caption of deep/er/c.PNG", 20), ("caption of e.gif", 40), ("caption of f.tif", 50),
        ("caption of g.webp", 60), (None, 200)]


def test_a_caption_belongs_to_the_picture_of_its_folder_and_name(root):
    """Not to one of that name elsewhere, nor to the next in order."""
    for i, folder in enumerate(("x", "y")):
        draw(root, f"{folder}/1.png", i)
        draw(root, f"{folder}/10.png", 10 + i)
    write(root, "y/1.txt", "y1")
    write(root, "x/10.txt", "x10")
    write(root, "2.txt", "of no picture")
    assert read(root) == [(None, 0), ("x10", 10), ("y1", 1), (None, 11)]


@pytest.mark.parametrize("bytes_, caption", [
    (b"\xef\xbb\xbfa fox\r\n", "a fox"), (b"  \n\t\n", None), (b"", None),
    ("Füchsin 🦊".encode(), "Füchsin 🦊"), (b"a fox\nin two lines\n", "a fox\nin two lines"),
    (b"x" * LONGEST_CAPTION, "x" * LONGEST_CAPTION)],
    ids=["bom", "blank", "empty", "letters", "lines", "long"])
def test_captions_as_people_save_them(root, bytes_, caption):
    draw(root, "a.png", 7)
    write(root, "a.txt", bytes_)
    assert read(root) == [(caption, 7)]


def test_a_text_too_long_for_a_caption_is_left_out(root, capsys):
    draw(root, "a.png", 7)
    draw(root, "b.png", 8)
    write(root, "a.txt", "x" * (LONGEST_CAPTION + 1))
    assert read(root) == [(None, 8)]
    assert f"a.txt has {LONGEST_CAPTION + 1} bytes, a caption has at most" in capsys.readouterr().err


METADATA = ('{"file_name": "a.png", "text": "a fox", "id": 7}\n\n'
            '{"file_name": "in/b.png", "caption": "an owl"}\r\n')
TABLES = {
    "jsonl": ("metadata.jsonl", METADATA),
    "jsonl with a mark": ("metadata.jsonl", "\ufeff" + METADATA),
    "csv": ("metadata.csv", "file_name,text\na.png,a fox\nin/b.png,an owl\n"),
    "other columns": ("captions.csv", "number,Image,Caption\r\n1,a.png,a fox\r\n2,in/b.png,an owl\r\n"),
    "semicolons": ("list.CSV", "\ufeffpath;caption\na.png;a fox\nin/b.png;an owl"),
    "tabs": ("list.csv", "path\tcaption\na.png\ta fox\nin/b.png\tan owl"),
}


@pytest.mark.parametrize("name, text", TABLES.values(), ids=TABLES.keys())
def test_tables(root, name, text):
    draw(root, "a.png", 1)
    draw(root, "in/b.png", 2)
    draw(root, "in/c.png", 3)
    write(root, name, text)
    assert read(root) == [("a fox", 1), ("an owl", 2), (None, 3)]


def test_commas_and_quotes_in_a_csv(root):
    draw(root, "a.png", 1)
    write(root, "metadata.csv", 'file_name,text\na.png,"a fox, ""red"", and\nan owl"\n')
    assert read(root) == [('a fox, "red", and\nan owl', 1)]


def test_a_table_goes_before_texts_and_counts_from_its_own_folder(root):
    """The Hugging Face form has one in train/, one in test/."""
    for i, name in enumerate(("a.png", "train/a.png", "train/b.png", "train/in/c.png")):
        draw(root, name, i)
        write(root, name[:-3] + "txt", f"text {i}")
    write(root, "train/metadata.jsonl", '{"file_name": "a.png", "text": "a fox"}\n'
                                        '{"file_name": "in/c.png", "text": null}\n')
    assert read(root) == [("text 0", 0), ("a fox", 1), ("text 2", 2), (None, 3)]


def test_a_stray_csv_is_no_table_where_there_are_texts(root):
    draw(root, "a.png", 1)
    write(root, "a.txt", "a fox")
    write(root, "sizes.csv", "width,height\n8,6\n")
    assert read(root) == [("a fox", 1)]


def test_a_picture_with_several_captions_is_a_record_each_on_one_side(root):
    for i in range(40):
        draw(root, f"{i:02d}.png", i)
    write(root, "captions.csv", "image,caption\n" + "".join(f"{i:02d}.png,{word} {i}\n" for word in ("a", "the")
                                                            for i in range(40)))
    train, heldout = read(root, "train", 0.3), read(root, "heldout", 0.3)
    assert len(train) + len(heldout) == 80 and train[:2] == [("a 0", 0), ("the 0", 0)]
    assert heldout and not {grey for _, grey in train} & {grey for _, grey in heldout}


def test_pictures_of_a_table_that_are_not_there_are_counted(root, capsys):
    draw(root, "a.png", 1)
    write(root, "metadata.csv", "file_name,text\na.png,a fox\ngone.png,an owl\n")
    assert read(root) == [("a fox", 1)]
    err = capsys.readouterr().err
    assert "1 of 2 records cannot be read" in err and "gone.png cannot be read: No such file" in err
    write(root, "metadata.csv", "file_name,text\nx/a.png,a fox\n")
    os.remove(root / "a.png")
    with pytest.raises(UserError, match=r"none of 1 records can be read. The first: .*x/a.png"):
        read(root)


def test_damaged_pictures_are_left_out_and_named(root, capsys):
    for i in range(6):
        write(root, f"{i}.txt", f"text {i}")
        draw(root, f"{i}.png", i)
    whole = (root / "0.png").read_bytes()
    write(root, "1.png", b"")
    write(root, "3.png", whole[:40])
    os.remove(root / "4.png")
    os.symlink(root / "nowhere", root / "4.png")
    assert read(root) == [("text 0", 0), ("text 2", 2), ("text 5", 5)]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "warning: photos: 3 of 6 records cannot be read and are left out:"
    assert [line.split(" cannot")[0] for line in lines[1:]] == [f"  {root}/{i}.png" for i in (1, 3, 4)]


def test_only_damaged_pictures_are_an_error(root):
    write(root, "a.png", b"")
    write(root, "b.jpg", b"not a picture")
    with pytest.raises(UserError, match=rf"none of 2 records can be read. The first: {root}/a.png cannot"):
        read(root)


def test_what_systems_leave_behind_is_passed_over(root):
    draw(root, "a.png", 1)
    for name in (".hidden.png", "._a.png", ".thumbs/x.png", "__MACOSX/a.png", "deep/__MACOSX/y.png"):
        draw(root, name, 9)
    write(root, "Thumbs.db", b"\0")
    write(root, "._a.txt", b"\x00\x05\x16\x07")
    assert read(root) == [(None, 1)]


@pytest.mark.parametrize("hidden", [".cache/photos", "x/.y/z"])
def test_the_folder_itself_may_be_hidden(tmp_path, hidden):
    draw(tmp_path, f"{hidden}/a.png", 1)
    assert read(tmp_path / hidden) == [(None, 1)]


def test_links_that_lead_back_end(root, tmp_path):
    """A loop is not followed for ever, and what two links show stands there once."""
    draw(root, "a/1.png", 1)
    os.symlink(root, root / "a" / "back")
    os.symlink("self", root / "self")
    draw(tmp_path / "elsewhere", "2.png", 2)
    os.symlink(tmp_path / "elsewhere", root / "b")
    os.symlink(tmp_path / "elsewhere", root / "c")
    assert [item.key for item in find(root)] == ["a/1.png", "b/2.png"]


def test_pipes_do_not_stop_it(root):
    draw(root, "a.png", 1)
    os.mkfifo(root / "b.png")
    os.mkfifo(root / "a.txt")
    assert read(root) == [(None, 1)]


def test_an_accent_is_one_letter_or_two(root):
    """Names unpacked on one system, the table written on another."""
    draw(root, "cafe\u0301.png", 1)
    draw(root, "ro\u0302le.png", 2)
    write(root, "r\u00f4le.txt", "a part")
    write(root, "metadata.jsonl", '{"file_name": "caf\u00e9.png", "text": "a cup"}\n')
    assert read(root) == [("a cup", 1), ("a part", 2)]
    assert [item.key for item in find(root)] == ["caf\u00e9.png", "r\u00f4le.png"]


def test_held_out_pictures_are_the_same_wherever_the_folder_lies(root, tmp_path):
    for i in range(60):
        draw(root, f"{i}.png", i)
    train, heldout = ({grey for _, grey in read(root, split, 0.1)} for split in ("train", "heldout"))
    assert train | heldout == set(range(60)) and not train & heldout and 0 < len(heldout) < 20
    moved = root.rename(tmp_path / "moved")
    for i in range(60, 100):
        draw(moved, f"{i}.png", i)
    assert heldout == {grey for _, grey in read(moved, "heldout", 0.1) if grey < 60}


def test_without_a_size_pictures_are_as_stored(root):
    draw(root, "a.png", 1)
    (record,) = FolderSource("folder", 1.0, str(root), ALL).open("train", None)
    assert record[0].shape == (6, 8, 3)


def not_utf8(root):
    draw(root, "a.png")
    write(root, "a.txt", "Füchsin".encode("latin1"))


def table(name, text):
    def make(root):
        draw(root, "a.png")
        write(root, name, text)
    return make


def two_tables(root):
    table("metadata.csv", "file_name,text\n")(root)
    write(root, "metadata.jsonl", "")


ERRORS = {
    "empty": (lambda root: None, r"photos holds no pictures \(.png, .jpg"),
    "no pictures": (lambda root: write(root, "a.txt", "a fox"), r"photos holds no pictures"),
    "no folder": (lambda root: root.rmdir(), r"photos not found: .*names a folder of pictures; --config.data"),
    "a file": (lambda root: (root.rmdir(), draw(root.parent, "photos", format="PNG")), r"photos is a file"),
    "caption not UTF-8": (not_utf8, r"a.txt is not UTF-8 \(byte 1\): save it as UTF-8"),
    "table not UTF-8": (table("metadata.csv", "file_name,text\na.png,Füchsin".encode("latin1")),
                        r"metadata.csv is not UTF-8 \(byte 22\)"),
    "table in UTF-16": (table("metadata.csv", "file_name,text\n".encode("utf-16")),
                        r"metadata.csv is not UTF-8"),
    "not JSON": (table("metadata.jsonl", '{"file_name": "a.png", "text": "a"}\n{"file_name": \n'),
                 r"metadata.jsonl, line 2: no JSON object"),
    "no object": (table("metadata.jsonl", "7"), r"metadata.jsonl, line 1: no JSON object"),
    "no file in a line": (table("metadata.jsonl", '{"text": "a", "tag": "b"}'),
                          r"metadata.jsonl, line 1: it has text, tag; file_name or image or path is needed"),
    "no caption column": (table("metadata.csv", "file_name,words\na.png,a fox\n"),
                          r"metadata.csv, line 2: it has file_name, words; text or caption is needed"),
    "caption of another kind": (table("metadata.jsonl", '{"file_name": "a.png", "text": ["a", "b"]}'),
                                r"line 1: text is \['a', 'b'\], a text is needed"),
    "no file named": (table("metadata.csv", "file_name,text\n,a fox\n"), r"line 2: no file is named"),
    "open quote": (table("metadata.csv", 'file_name,text\na.png,"a fox\n'),
                   r"metadata.csv, line \d+: unexpected end"),
    "two tables": (two_tables, r"photos holds metadata.jsonl and metadata.csv: leave one"),
    "stray csv alone": (table("sizes.csv", "width,height\n8,6\n"), r"sizes.csv, line 2: it has width, height"),
}


@pytest.mark.parametrize("make, message", ERRORS.values(), ids=ERRORS.keys())
def test_mistakes_are_one_line(root, make, message):
    make(root)
    with pytest.raises(UserError, match=message) as error:
        read(root)
    assert "\n" not in str(error.value)


def test_a_folder_that_may_not_be_read(root, monkeypatch):
    draw(root, "in/a.png")

    def refuse(folder, real=os.listdir):
        if str(folder).endswith("in"):
            raise PermissionError(13, "Permission denied", folder)
        return real(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UserError, match="photos/in cannot be read: Permission denied"):
        read(root)


def test_names_that_are_not_utf8(root):
    """An old archive's: the file is read, and has a side."""
    name = os.fsdecode(b"\xe9t\xe9.png")
    draw(root, "a.png", 1).rename(root / name)
    write(root, os.fsdecode(b"\xe9t\xe9.txt"), "summer")
    assert read(root) == [("summer", 1)] and len(read(root, "train", 0.5) + read(root, "heldout", 0.5)) == 1
