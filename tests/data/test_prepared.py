"""The prepared form on disk: what is written is read back; what is missing or foreign is refused."""

import json

import numpy as np
import pytest

from tfusion.data.prepared import (
    PreparedSource,
    check_identity,
    identity,
    read_meta,
    write_meta,
    write_source,
)
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
            assert got.dtype == np.int32 and got.tolist() == encode_text([part])[0]
        else:
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, encode_images(part[None])[0].astype(np.float32))


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
    assert source.meta == {"records": 5, "tokens": 9, "images": 4,
                           "max_token_id": ord("i")}


def test_reading_twice_gives_fresh_arrays(source):
    """A reader that writes into its document must not change the next reader's, nor the file."""
    source.read(0)[0][:] = 0
    source.read(0)[1][:] = 0
    assert source.read(0)[0].tolist() == [97, 98] and source.read(0)[1].max() == 1


def test_text_only_source_has_no_latents(tmp_path):
    write_source(tmp_path / "words" / "heldout", [["ab"], ["c"]], encode_text, None)
    source = PreparedSource(tmp_path, "words", "heldout")
    assert source.read(1)[0].tolist() == [99] and not source.images.any()
    assert not (tmp_path / "words" / "heldout" / "latents.npy").exists()


def test_meta_round_trip(tmp_path):
    write_meta(tmp_path, "byte", "abc", "def", (8, 8, 4))
    assert read_meta(tmp_path) == {
        "format_version": FORMAT_VERSION, "tokenizer": "byte", "tokenizer_fingerprint": "abc",
        "autoencoder_fingerprint": "def", "latent_shape": [8, 8, 4]}


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
    assert str(tmp_path / "stories" / "train") in text and "data.mixture" in text


def test_other_format_version_is_refused(tmp_path):
    write_meta(tmp_path, "byte", "abc", "def", (8, 8, 4))
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"format_version": FORMAT_VERSION + 1}))
    text = message(read_meta, tmp_path)
    assert f"version {FORMAT_VERSION + 1}" in text and f"reads {FORMAT_VERSION}" in text and "prepare" in text


def test_data_of_another_autoencoder_are_refused(tmp_path):
    """A run must not go on, or be decoded, with latents that mean something else."""
    write_meta(tmp_path, "byte", "tok", "ae", (4, 4, 4))
    trained_on = identity(read_meta(tmp_path))
    check_identity(trained_on, tmp_path, "run")
    check_identity({}, tmp_path / "nowhere", "an autoencoder's run")
    write_meta(tmp_path, "byte", "tok", "another", (4, 4, 4))
    with pytest.raises(UserError, match="run was trained on data of another autoencoder than"):
        check_identity(trained_on, tmp_path, "run")


def test_truncated_files_are_one_line(tmp_path):
    write_meta(tmp_path, "byte", "tok", "ae", (4, 4, 4))
    meta = tmp_path / "meta.json"
    meta.write_text(meta.read_text()[:20])
    with pytest.raises(UserError, match=r"is broken .* run `python -m tfusion.prepare` again"):
        read_meta(tmp_path)
    write_source(tmp_path / "s" / "train", [["abc"]], lambda texts: [[5, 6, 7] for _ in texts], None)
    tokens = tmp_path / "s" / "train" / "tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"tokens\.npy is missing or broken"):
        PreparedSource(tmp_path, "s", "train")
