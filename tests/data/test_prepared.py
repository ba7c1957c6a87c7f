"""The prepared form on disk: what is written is read back; what is missing or foreign is refused."""

import json
import os

import numpy as np
import pytest

from tfusion.data.prepared import (
    MARK,
    PreparedSource,
    assets,
    identity,
    read_meta,
    replacing,
    write_meta,
    write_source,
)
from tfusion.data.tokenizers import ByteTokenizer, load_saved
from tfusion.errors import UserError
from tfusion.types import FORMAT_VERSION


def picture(value: int):
    return np.full((4, 4, 3), value, np.uint8)


def encode_text(texts):
    return [[ord(c) for c in text] for text in texts]


def encode_images(images):
    return images[:, ::2, ::2, :1] / 10


RECORDS = [["ab", picture(10)], ["c"], ["de", picture(20), "fgh", picture(30)], [picture(40)], ["", "i"]]


@pytest.fixture
def source(tmp_path):
    write_source(tmp_path / "mixed" / "train", RECORDS, encode_text, encode_images)
    return PreparedSource(tmp_path, "mixed", "train")


@pytest.mark.parametrize("record", [4, 0, 3, 1, 2])
def test_records_come_back_in_any_order(source, record):
    parts = source.read(record)
    assert len(parts) == len(RECORDS[record])
    for got, part in zip(parts, RECORDS[record]):
        if isinstance(part, str):
            assert got.kind == "text" and got.values.dtype == np.int32
            assert got.values.tolist() == encode_text([part])[0]
        else:
            assert got.kind == "image" and got.values.dtype == np.float32
            np.testing.assert_array_equal(got.values, encode_images(part[None])[0].astype(np.float32))


def test_text_is_read_by_its_tokens(tmp_path):
    """Across the parts of a record, and never into the next record's."""
    write_source(tmp_path / "s" / "train", [["ab", "", "cde"], [], [""], ["fg"]], encode_text, None)
    source = PreparedSource(tmp_path, "s", "train")

    def text(*place):
        return "".join(map(chr, source.read_text(*place)))

    assert [text(0, 0, 9), text(0, 1, 3), text(0, 4, 6), text(0, 7, 9)] == ["abcde", "bc", "e", ""]
    assert [text(record, 0, 9) for record in (1, 2, 3)] == ["", "", "fg"]
    assert source.read_text(0, 0, 2).dtype == np.int32


def test_sizes_are_known_without_reading(source):
    """The planner sees these and never the documents."""
    assert len(source) == 5
    np.testing.assert_array_equal(source.text_tokens, [2, 1, 5, 0, 1])
    np.testing.assert_array_equal(source.images, [1, 0, 2, 1, 0])
    std = float(np.float32([1, 2, 3, 4]).std())  # of the one channel
    assert source.meta == {"records": 5, "tokens": 9, "images": 4, "max_token_id": ord("i"),
                           "latent_std": [pytest.approx(std, abs=1e-4)]}


def test_reading_twice_gives_fresh_arrays(source):
    """A reader that writes into its document must not change the next reader's, nor the file."""
    source.read(0)[0].values[:] = 0
    source.read(0)[1].values[:] = 0
    assert source.read(0)[0].values.tolist() == [97, 98] and source.read(0)[1].values.max() == 1


def test_text_only_source_has_no_latents(tmp_path):
    write_source(tmp_path / "words" / "heldout", [["ab"], ["c"]], encode_text, None)
    source = PreparedSource(tmp_path, "words", "heldout")
    assert source.read(1)[0].values.tolist() == [99] and not source.images.any()
    assert not (tmp_path / "words" / "heldout" / "latents.npy").exists()


def test_meta_round_trip(tmp_path):
    sources = {"photos": {"kind": "folder", "path": "/photos"}}
    write_meta(tmp_path, ByteTokenizer(), "def", (8, 8, 4), "runs/autoencoder", sources)
    assert read_meta(tmp_path) == {"format_version": FORMAT_VERSION, "tokenizer": ByteTokenizer.fingerprint,
                                   "codec": "def", "vocab_size": 260, "latent_shape": [8, 8, 4],
                                   "codec_run": "runs/autoencoder", "sources": sources}
    assert identity(read_meta(tmp_path)) == {"tokenizer": ByteTokenizer.fingerprint, "codec": "def"}
    assert load_saved(tmp_path).fingerprint == ByteTokenizer.fingerprint
    assert [path.name for path in assets(tmp_path)] == ["tokenizer.json"]


def message(call, *args) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_folder_is_named_with_what_to_run(tmp_path):
    text = message(read_meta, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in text and "tfusion.prepare" in text and "data.prepared" in text


def test_missing_source_is_named(tmp_path):
    text = message(PreparedSource, tmp_path, "stories", "train")
    assert str(tmp_path / "stories" / "train") in text and "data.sources" in text


def test_other_format_version_is_refused(tmp_path):
    write_meta(tmp_path, ByteTokenizer(), "def", (8, 8, 4))
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"format_version": FORMAT_VERSION + 1}))
    text = message(read_meta, tmp_path)
    assert f"version {FORMAT_VERSION + 1}" in text and f"reads {FORMAT_VERSION}" in text and "prepare" in text


def test_truncated_files_are_one_line(tmp_path):
    write_meta(tmp_path, ByteTokenizer(), "ae", (4, 4, 4))
    meta = tmp_path / "meta.json"
    meta.write_text(meta.read_text()[:20])
    with pytest.raises(UserError, match=r"is broken .* run `python -m tfusion.prepare` again"):
        read_meta(tmp_path)
    write_source(tmp_path / "s" / "train", [["abc"]], lambda texts: [[5, 6, 7] for _ in texts], None)
    tokens = tmp_path / "s" / "train" / "tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"tokens\.npy is missing or broken"):
        PreparedSource(tmp_path, "s", "train")


# ---------------------------------------------------------------- what is written is looked at first

BAD_PARTS = {
    "floats from 0 to 1": (np.full((4, 4, 3), 0.5, np.float32), "a part is float32"),
    "with alpha": (np.zeros((4, 4, 4), np.uint8), r"a part is uint8 \(4, 4, 4\)"),
    "grey": (np.zeros((4, 4), np.uint8), r"a part is uint8 \(4, 4\)"),
    "another size": (np.zeros((8, 8, 3), np.uint8), r"a picture is \(8, 8, 3\), that of record 0 \(4, 4, 3\)"),
    "a number": (7, "a part is int"),
    "bytes": (b"caption", "a part is bytes"),
}


@pytest.mark.parametrize("part, text", BAD_PARTS.values(), ids=BAD_PARTS)
def test_a_part_that_is_neither_text_nor_picture_is_named(tmp_path, part, text):
    with pytest.raises(UserError, match=f"s: record 2: {text}"):
        write_source(tmp_path / "s", [["a", picture(1)], ["b"], ["c", part]], encode_text, encode_images)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_latent_that_is_no_number_is_named(tmp_path, value):
    def encode(images):
        latents = encode_images(images).astype(np.float32)
        latents[2, 1, 0, 0] = value
        return latents

    with pytest.raises(UserError, match=r"record 2: the encoder made NaN or infinity .*1 of 4 pictures"):
        write_source(tmp_path / "s", [*RECORDS[1:], [picture(5)]], encode_text, encode)


@pytest.mark.parametrize("ids, text", [([[1], [2]], "ids of 2 texts, there are 3"),
                                       ([[5.5]] * 3, "whole numbers"),
                                       ([[1], [-5], [2]], "of text 1: ids are whole numbers from 0")])
def test_a_tokenizer_that_makes_no_ids_is_named(tmp_path, ids, text):
    with pytest.raises(UserError, match=text):
        write_source(tmp_path / "s", [["a"], ["b"], "c"], lambda texts: ids, None)


def test_a_record_may_be_one_text(tmp_path):
    write_source(tmp_path / "s" / "train", ["abc"], encode_text, None)
    assert PreparedSource(tmp_path, "s", "train").read(0)[0].values.tolist() == encode_text(["abc"])[0]


def test_an_encoder_that_loses_pictures_is_named(tmp_path):
    with pytest.raises(UserError, match=r"made \(3, 2, 2, 1\) of 4 pictures"):
        write_source(tmp_path / "s", RECORDS, encode_text, lambda x: encode_images(x)[1:])


@pytest.mark.parametrize("scale, number, warned", [
    (0.1, 100, True), (1.0, 100, False), (10.0, 100, True), (10.0, 99, False)])
def test_latents_far_from_unit_variance_are_said(tmp_path, capsys, scale, number, warned):
    """But of a few pictures, whose deviation says little."""
    noise = np.random.default_rng(0).normal(size=(number, 8, 8, 2)) * scale
    records = [[np.zeros((32, 32, 3), np.uint8)]] * number
    write_source(tmp_path / "s", records, encode_text, lambda _: noise)
    assert ("normalise them" in capsys.readouterr().err) == warned


def test_nothing_to_write_can_be_read(tmp_path):
    write_source(tmp_path / "none" / "heldout", [], encode_text, None)
    source = PreparedSource(tmp_path, "none", "heldout")
    assert len(source) == 0 and len(source.images) == len(source.text_tokens) == 0


# ---------------------------------------------------------------- nothing is deleted that is not ours

def tree(folder) -> dict:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def fill(root, text: str) -> None:
    with replacing(root) as folder:
        (folder / "meta.json").write_text(text)


def test_data_are_replaced_at_the_end_alone(tmp_path):
    root = tmp_path / "deep" / "data"
    fill(root, "old")
    with pytest.raises(KeyboardInterrupt), replacing(root) as folder:
        (folder / "meta.json").write_text("half")
        raise KeyboardInterrupt
    assert (root / "meta.json").read_text() == "old"
    fill(root, "new")
    assert (root / "meta.json").read_text() == "new" and (root / MARK).exists()
    assert sorted(p.name for p in root.parent.iterdir()) == ["data"]


@pytest.mark.parametrize("end", ["", ".unfinished", ".old"])
def test_a_folder_of_the_users_is_left_as_it_is(tmp_path, end):
    (tmp_path / f"mine{end}").mkdir()
    (tmp_path / f"mine{end}" / "thesis.txt").write_text("all of it")
    (tmp_path / f"mine{end}" / "meta.json").write_text("{}")  # external latents have one too
    before = tree(tmp_path)
    with pytest.raises(UserError, match=rf"mine{end} holds .* that `python -m tfusion.prepare` did not make"):
        fill(tmp_path / "mine", "new")
    assert tree(tmp_path) == before


def test_the_working_folder_is_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="did not make"):
        fill(".", "new")
    with pytest.raises(UserError, match="did not make"):
        fill(tmp_path / "thesis.txt", "new")
    assert tree(tmp_path) == {"thesis.txt": "all of it"}


def test_a_symlink_goes_on_pointing_to_the_data(tmp_path):
    fill(tmp_path / "disk", "old")
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    fill(tmp_path / "data", "new")
    assert (tmp_path / "data").is_symlink() and (tmp_path / "disk" / "meta.json").read_text() == "new"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("all of it")
    os.remove(tmp_path / "data")
    (tmp_path / "data").symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"theirs holds thesis\.txt that"):
        fill(tmp_path / "data", "new")


@pytest.mark.parametrize("name", ["notes.txt", "photos/train/tokens.npy"])
def test_what_the_user_added_to_our_folder_is_left_too(tmp_path, name):
    root = tmp_path / "data"
    fill(root, "old")
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("mine")
    before = tree(root)
    with pytest.raises(UserError, match=f"data holds {name} that `python -m tfusion.prepare` did not make"):
        fill(root, "new")
    assert tree(root) == before


def test_what_the_user_adds_meanwhile_is_left_too(tmp_path):
    root = tmp_path / "data"
    fill(root, "old")
    with pytest.raises(UserError, match=r"notes\.txt"), replacing(root):
        (root / "notes.txt").write_text("mine")
    assert (root / "notes.txt").read_text() == "mine" and (root / "meta.json").read_text() == "old"


def test_killed_between_the_two_moves(tmp_path, monkeypatch):
    """The old data come back by themselves, and the next one starts anew."""
    root = tmp_path / "data"
    fill(root, "old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        real = os.replace

        def killed(a, b):
            if str(a).endswith(".unfinished"):
                raise KeyboardInterrupt
            real(a, b)

        patch.setattr(os, "replace", killed)
        fill(root, "new")
    assert not root.exists()
    with pytest.raises(ZeroDivisionError), replacing(root):
        assert (root / "meta.json").read_text() == "old"
        raise ZeroDivisionError
    fill(root, "newer")
    assert (root / "meta.json").read_text() == "newer"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "data").mkdir()
    fill(tmp_path / "data", "new")
    assert (tmp_path / "data" / "meta.json").read_text() == "new"


def test_two_that_prepare_the_same_folder(tmp_path):
    with replacing(tmp_path / "data") as folder:
        (folder / "meta.json").write_text("first")
        with pytest.raises(UserError, match="is being written by another process"):
            fill(tmp_path / "data", "second")
    assert (tmp_path / "data" / "meta.json").read_text() == "first"
