"""The store on disk: what is written is read back; a shard is there whole or not at all; what is missing or
foreign is refused."""

import errno
import json
import os
import pickle
import socket
import threading
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from tfusion.data import readers, store
from tfusion.data.layout import image, text
from tfusion.data.store import Split, Writer, assets, identity, read_meta, write_meta
from tfusion.data.tokenizers import ByteTokenizer, load_saved
from tfusion.errors import Unreachable, UserError


def latent(value: float, shape=(2, 2, 1)):
    return image(np.full(shape, value, np.float32))


RECORDS = [[text([97, 98]), latent(1)], [text([99])],
           [text([100, 101]), latent(2), text([102, 103, 104]), latent(3)],
           [latent(4)], [text([]), text([105])], []]


def write(root, records=RECORDS, shard: int = 0, source: str = "mixed", split: str = "train") -> None:
    with Writer(root, source, split, shard) as writer:
        for record in records:
            writer.add(record)


@pytest.fixture
def source(tmp_path):
    write(tmp_path)
    return Split(tmp_path, "mixed", "train")


def same(got, wanted) -> None:
    assert [part.kind for part in got] == [part.kind for part in wanted]
    for a, b in zip(got, wanted):
        assert a.values.dtype == (np.int32 if a.kind == "text" else np.float32) and a.values.flags.aligned
        np.testing.assert_array_equal(a.values, b.values)


def test_records_come_back_in_any_order(source):
    order = [4, 0, 3, 5, 1, 2, 0]
    for got, record in zip(source.read(0, order), order, strict=True):
        same(got, RECORDS[record])
    assert source.read(0, []) == []


def test_sizes_are_known_without_reading(source):
    """The planner sees these and never the documents."""
    os.remove(source.folder / "00000.array_record")
    assert len(source) == 6 and source.sizes(0).dtype == np.int32
    np.testing.assert_array_equal(source.sizes(0), [[2, 1], [1, 0], [5, 2], [0, 1], [1, 0], [0, 0]])
    shard, = source.shards
    assert shard[:5] == ("00000", 6, 9, 4, 105) and shard.image_shape == source.image_shape == (2, 2, 1)


def test_opening_reads_the_ledger_alone(source, tmp_path):
    for path in source.folder.iterdir():
        if not path.name.startswith("ledger"):
            os.remove(path)
    assert len(Split(tmp_path, "mixed", "train")) == 6


LATENTS = np.array([[[1.0, 1 / 3]]])


@pytest.mark.parametrize("values, stored", [
    (LATENTS, ml_dtypes.bfloat16), (LATENTS.astype(np.float32), ml_dtypes.bfloat16),
    (LATENTS.astype(ml_dtypes.bfloat16), ml_dtypes.bfloat16),
    (np.arange(12, dtype=np.int32).reshape(3, 4), np.int32), (np.arange(9, dtype=np.uint16), np.uint16)])
def test_images_are_bfloat16_or_codes(values, stored):
    """And whole numbers come back as they were."""
    wanted = values.astype(stored)
    record = store.encode([text([5, 2**31 - 1]), image(values)])
    assert len(record) == 4 + 2 * 3 + 4 * (1 + values.ndim) + 8 + wanted.nbytes
    ids, got = (part.values for part in store.decode(record))
    assert ids.tolist() == [5, 2**31 - 1]
    assert got.dtype == (np.float32 if stored == ml_dtypes.bfloat16 else stored)
    np.testing.assert_array_equal(got, wanted.astype(got.dtype))


def test_reading_twice_gives_fresh_arrays(source):
    """A reader that writes into its document must not change the next reader's, nor the file."""
    for part in source.read(0, [0])[0]:
        part.values[:] = 0
    same(source.read(0, [0])[0], RECORDS[0])
    with pytest.raises(ValueError, match="read-only"):
        source.sizes(0)[0] = 7


def test_shards_in_their_order_however_they_were_written(tmp_path):
    for shard in (100_000, 99_999, 2):
        write(tmp_path, [[text([shard])]] * (shard % 5 + 1), shard)
    source = Split(tmp_path, "mixed", "train")
    assert [(s.name, s.records) for s in source.shards] == [("00002", 3), ("99999", 5), ("100000", 1)]
    assert len(source) == 9 and source.read(1, [2])[0][0].values == [99_999] and source.image_shape is None
    assert store.finished(tmp_path, "mixed", "train") == {2, 99_999, 100_000}
    with pytest.raises(UserError, match="shard 00002 is written already"):
        write(tmp_path, shard=2)


def test_a_shards_own_line_counts_before_the_collected_one(tmp_path):
    """Both are there where one was killed while they were collected."""
    write(tmp_path)
    write_meta(tmp_path, ByteTokenizer(), "", (2, 2, 1))
    folder = tmp_path / "mixed/train"
    line = json.loads((folder / "ledger.jsonl").read_text())
    (folder / "ledger.00000.jsonl").write_text(json.dumps(line | {"text_tokens": 7}))
    assert store.ledger(folder)["00000"]["text_tokens"] == 7


def test_a_shard_finished_while_ledgers_are_collected_keeps_its_line(tmp_path, monkeypatch):
    write(tmp_path)
    real = store._read

    def meanwhile(ledgers):
        monkeypatch.setattr(store, "_read", real)
        write(tmp_path, shard=1)
        return real(ledgers)

    monkeypatch.setattr(store, "_read", meanwhile)
    write_meta(tmp_path, ByteTokenizer(), "", (2, 2, 1))
    assert store.finished(tmp_path, "mixed", "train") == {0, 1}
    write_meta(tmp_path, ByteTokenizer(), "", (2, 2, 1))
    assert store.finished(tmp_path, "mixed", "train") == {0, 1}


def test_what_a_ledger_tells_of_is_on_disk_before_it(tmp_path, monkeypatch):
    """All of a shard's files are synced under their first names, and the line itself last."""
    synced, real = [], os.fsync

    def fsync(fd):
        synced.append((os.path.basename(os.readlink(f"/proc/self/fd/{fd}")), os.fstat(fd).st_size))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path)
    folder, files = tmp_path / "mixed/train", ["00000.sizes.npy", "00000.hashes.npy", "00000.array_record",
                                               "ledger.00000.jsonl"]
    assert synced == [(f".{name}", (folder / name).stat().st_size) for name in files]


def test_the_digest_is_of_sizes_and_shards(tmp_path):
    """Not of what is in the records: that does not move them."""
    def digest(name, *shards):
        for number, sizes in enumerate(shards):
            write(tmp_path, [[text([name] * n)] for n in sizes], number, str(name))
        return Split(tmp_path, str(name), "train").digest

    assert digest(1, [1, 2], [3]) == digest(2, [1, 2], [3])
    assert len({digest(3, [1, 2], [3]), digest(4, [1], [2, 3]), digest(5, [2, 1], [3]),
                digest(6, [1, 2, 3])}) == 4


def test_a_split_is_read_by_threads_and_processes(source):
    copy, errors = pickle.loads(pickle.dumps(source)), []
    assert copy.digest == source.digest and len(copy.read(0, [0])) == 1

    def read():
        try:
            for _ in range(50):
                same(source.read(0, [2])[0], RECORDS[2])
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_few_shards_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "OPEN", 2)
    for shard in range(4):
        write(tmp_path, [[text([shard])]], shard)
    source = Split(tmp_path, "mixed", "train")
    for shard in (0, 1, 2, 0, 3, 3, 1):
        assert source.read(shard, [0])[0][0].values == [shard]
        assert len(source._readers.kept) <= 2 and next(reversed(source._readers.kept)) == shard


# ---------------------------------------------------------------- a shard is there whole or not at all

def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_ledgers_line_is_the_last_thing_written(tmp_path, monkeypatch):
    """Killed before any of the moves, a shard is as if it had not been begun; once more, and it is as it would
    have been."""
    write(tmp_path, source="whole")
    for kill in range(4):
        moves, real = [], os.replace

        def killed(a, b, moves=moves, real=real, kill=kill):
            if len(moves) == kill:
                raise KeyboardInterrupt
            moves.append(b)
            real(a, b)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", killed)
            write(tmp_path)
        assert store.finished(tmp_path, "mixed", "train") == set()
    write(tmp_path)
    whole = tmp_path / "whole" / "train"
    assert names(whole) == names(tmp_path / "mixed" / "train") == [
        "00000.array_record", "00000.hashes.npy", "00000.sizes.npy", "ledger.00000.jsonl"]
    for path in whole.iterdir():
        assert path.read_bytes() == (tmp_path / "mixed" / "train" / path.name).read_bytes()


def test_a_shard_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), Writer(tmp_path, "mixed", "train", 0) as writer:
        writer.add(RECORDS[0])
        raise ZeroDivisionError
    assert names(tmp_path / "mixed" / "train") == []


def test_what_is_skipped_is_in_the_ledger(tmp_path):
    with Writer(tmp_path, "mixed", "train", 0) as writer:
        for key in "abcd":
            writer.skip("damaged", key)
        writer.skip("empty", "e")
    line, = store.ledger(tmp_path / "mixed" / "train").values()
    assert line["skipped"] == {"damaged": [4, ["a", "b", "c"]], "empty": [1, ["e"]]}
    assert Split(tmp_path, "mixed", "train").shards == []  # nothing to read in it


def test_copies_have_one_hash(tmp_path):
    write(tmp_path, [RECORDS[0], RECORDS[1], RECORDS[0]])
    hashes = np.load(tmp_path / "mixed/train/00000.hashes.npy")
    assert hashes.dtype == np.uint64 and hashes[0] == hashes[2] != hashes[1]


# ---------------------------------------------------------------- what is written is looked at first

BAD = {
    "negative id": ([text([5, -1])], "a text is"),
    "real ids": ([text([1])._replace(values=np.array([.5]))], "a text is"),
    "matrix": ([text(np.ones((2, 2)))], "a text is"), "NaN": ([latent(np.nan)], "holds NaN or infinity"),
    "infinity": ([latent(np.inf)], "holds NaN or infinity"),
    "another shape": ([latent(1, (2, 2, 2))], r"bfloat16 \(2, 2, 2\), those before it bfloat16 \(2, 2, 1\)"),
    "another type": ([image(np.ones((2, 2, 1), np.int32))], r"int32 \(2, 2, 1\), those before it bfloat16"),
    "no number": ([image(np.array(["a"]))], "floats are wanted, or codes as int32"),
}


@pytest.mark.parametrize("record, message", BAD.values(), ids=BAD)
def test_a_part_that_is_something_else_is_named(tmp_path, record, message):
    with pytest.raises(UserError, match=rf"shard 00007, record 2: .*{message}"):
        write(tmp_path, [RECORDS[0], RECORDS[1], record], 7)
    assert store.finished(tmp_path, "mixed", "train") == set()


@pytest.mark.parametrize("scale, number, warned", [
    (0.1, 100, True), (1.0, 100, False), (10.0, 100, True), (10.0, 99, False)])
def test_latents_far_from_unit_variance_are_said(tmp_path, capsys, scale, number, warned):
    """But of a few pictures, whose deviation says little."""
    noise = np.random.default_rng(0).normal(size=(number, 8, 8, 2)) * scale
    for shard, some in enumerate((noise[:60], noise[60:])):
        write(tmp_path, [[image(x)] for x in some], shard)
    write_meta(tmp_path, ByteTokenizer(), "mine", (8, 8, 2))
    assert capsys.readouterr().err.count("normalise them") == warned
    mean, std = store.spread(store.ledger(tmp_path / "mixed" / "train").values())
    rounded = noise.astype(np.float32)
    np.testing.assert_allclose([mean, std], [rounded.mean((0, 1, 2)), rounded.std((0, 1, 2))], rtol=1e-4)


# ---------------------------------------------------------------- what is missing or foreign

def message(call, *args) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_meta_round_trip(tmp_path):
    write(tmp_path)
    write(tmp_path, shard=1)
    sources = {"photos": {"kind": "folder", "path": "/photos"}}
    write_meta(tmp_path, ByteTokenizer(), "def", (8, 8, 4), "runs/autoencoder", sources)
    assert read_meta(tmp_path) == {
        "format_version": store.FORMAT_VERSION, "tokenizer": ByteTokenizer.fingerprint, "codec": "def",
        "vocab_size": 260, "image_shape": [8, 8, 4], "image_dtype": "bfloat16", "num_codes": 0,
        "codec_run": "runs/autoencoder", "sources": sources}
    assert identity(read_meta(tmp_path)) == {"tokenizer": ByteTokenizer.fingerprint, "codec": "def"}
    assert load_saved(tmp_path).fingerprint == ByteTokenizer.fingerprint
    assert [path.name for path in assets(tmp_path)] == ["tokenizer.json"]
    assert "ledger.jsonl" in names(tmp_path / "mixed/train") and len(Split(tmp_path, "mixed", "train")) == 12
    assert not [name for name in names(tmp_path / "mixed/train") if name.startswith("ledger.0")]


def test_missing_folder_is_named_with_what_to_run(tmp_path):
    told = message(read_meta, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in told and "tfusion.prepare" in told and "data.prepared" in told


def test_missing_source_is_named(tmp_path):
    told = message(Split, tmp_path, "stories", "train")
    assert str(tmp_path / "stories" / "train") in told and "data.sources" in told


@pytest.mark.parametrize("version", [3, store.FORMAT_VERSION + 1])
def test_other_format_version_is_refused(tmp_path, version):
    write_meta(tmp_path, ByteTokenizer(), "def", (8, 8, 4))
    meta = read_meta(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"format_version": version}))
    told = message(read_meta, tmp_path)
    assert f"version {version}" in told and f"reads {store.FORMAT_VERSION}" in told and "prepare" in told
    (tmp_path / "meta.json").write_text(json.dumps(meta)[:20])
    assert "is broken" in message(read_meta, tmp_path)


def cut(path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


BROKEN = {
    "shard gone": ("00000.array_record", os.remove, lambda s: s.read(0, [0])),
    "shard cut": ("00000.array_record", lambda path: cut(path, 1000), lambda s: s.read(0, [0])),
    "another shard's": ("00000.array_record", lambda path: path.write_bytes(
        path.with_name("00001.array_record").read_bytes()), lambda s: s.read(0, [0])),
    "sizes gone": ("00000.sizes.npy", os.remove, lambda s: s.sizes(0)),
    "sizes cut": ("00000.sizes.npy", lambda path: cut(path, 100), lambda s: s.sizes(0)),
    "another's sizes": ("00000.sizes.npy", lambda path: path.write_bytes(
        path.with_name("00001.sizes.npy").read_bytes()), lambda s: s.sizes(0)),
}


@pytest.mark.parametrize("name, damage, use", BROKEN.values(), ids=BROKEN)
def test_a_damaged_shard_is_named(tmp_path, name, damage, use):
    write(tmp_path)
    write(tmp_path, RECORDS[:2], shard=1)
    source = Split(tmp_path, "mixed", "train")
    damage(source.folder / name)
    told = message(use, source)
    assert f"mixed/train/{name}" in told and "prepare` again" in told
    assert len(source.read(1, [0, 1])) == len(source.sizes(1)) == 2


class Failing:
    """A reader whose disk is away for some reads."""

    def __init__(self, real, errors: list[Exception]):
        self.real, self.errors = real, errors

    def __getattr__(self, name: str):
        return getattr(self.real, name)

    def read(self, records):
        if self.errors:
            raise self.errors.pop()
        return self.real.read(records)


@pytest.fixture
def no_pauses(monkeypatch):
    slept = []
    monkeypatch.setattr(readers.time, "sleep", slept.append)
    return slept


@pytest.mark.parametrize("error", [RuntimeError("read failed"), OSError(errno.ESTALE, "Stale file handle")])
def test_a_failing_read_is_tried_again_with_a_reader_opened_anew(source, monkeypatch, no_pauses, capsys, error):
    errors, opened, real = [error, error], [], store.reader_of
    monkeypatch.setattr(store, "reader_of", lambda path: opened.append(path) or Failing(real(path), errors))
    same(source.read(0, [2])[0], RECORDS[2])
    assert len(opened) == 3 and no_pauses == [0.5, 2.0]
    told = capsys.readouterr().err
    assert told.count("warning: ") == 2 and f"{opened[0]} cannot be read ({error})" in told


def test_one_that_goes_on_failing_is_named_with_its_host(source, monkeypatch, no_pauses):
    real = store.reader_of
    monkeypatch.setattr(store, "reader_of", lambda path: Failing(real(path), [OSError(errno.EIO, "x")] * 9))
    told = message(source.read, 0, [2])
    assert "mixed/train/00000.array_record" in told and socket.gethostname() in told and len(no_pauses) == 2
    with pytest.raises(Unreachable):  # a launcher begins it again; what is broken ends as an error
        source.read(0, [2])


def test_what_does_not_open_though_all_of_it_is_there_is_tried_again(source, monkeypatch, no_pauses):
    times, real = [1, 1], store.reader_of

    def reader_of(path):
        reader = real(path)
        return mock.Mock(wraps=reader, ok=lambda: False) if times and times.pop() else reader

    monkeypatch.setattr(store, "reader_of", reader_of)
    same(source.read(0, [2])[0], RECORDS[2])
    assert len(no_pauses) == 2


@pytest.mark.parametrize("error, tries", [(OSError(errno.EIO, "x"), 3), (PermissionError(errno.EACCES, "x"), 1),
                                          (ValueError("x"), 1)])
def test_only_what_may_pass_is_tried_again(no_pauses, error, tries):
    calls = []

    def read():
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        readers.tried("path", read)
    assert len(calls) == tries


def test_a_shard_of_the_wrong_size_is_an_error_at_once(source, no_pauses):
    cut(source.folder / "00000.array_record", 1000)
    message(source.read, 0, [0])
    assert not no_pauses


def test_a_broken_ledger_is_named(tmp_path):
    write(tmp_path)
    cut(tmp_path / "mixed/train/ledger.00000.jsonl", 30)
    assert "ledger.00000.jsonl is broken" in message(Split, tmp_path, "mixed", "train")


def test_a_ledger_that_leads_out_of_the_store_is_broken(tmp_path):
    """Its names are numbers, of files beside it."""
    write(tmp_path)
    path = tmp_path / "mixed/train/ledger.00000.jsonl"
    path.write_text(path.read_text().replace('"00000"', '"../../../secret"'))
    assert "ledger.00000.jsonl is broken (shard '../../../secret' is no number)" in (
        message(Split, tmp_path, "mixed", "train"))


def test_shards_of_different_images_are_named(tmp_path):
    write(tmp_path)
    write(tmp_path, [[latent(1, (4, 4, 1))]], 1)
    told = message(lambda: Split(tmp_path, "mixed", "train").image_shape)
    assert "(2, 2, 1) (shard 00000) and (4, 4, 1) (shard 00001)" in told
