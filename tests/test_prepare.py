"""The verb: killed at any move and run again, or by several workers, it makes the same bytes."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests.conftest import import_verb
from tests.external.test_codecs import write as write_pretrained
from tests.kills import killed_at
from tfusion.data import store
from tfusion.data.config import RowFormat
from tfusion.data.layout import Vocabulary
from tfusion.data.sources.base import Source, Unreadable
from tfusion.data.tokenizers import ByteTokenizer
from tfusion.errors import UserError
from tfusion.models.codecs import base
from tfusion.models.codecs.vq import VQAutoencoder, VQCodec, VQConfig
from tfusion.preparing import shards
from tfusion.reporting import data_page

verb = import_verb("prepare")


class Pairs:
    """Deterministic records: a caption and a picture, two texts, damaged ones in between."""

    def __init__(self, number: int, word: str = "fox"):
        self.number, self.word = number, word

    def __len__(self):
        return self.number

    def __getitem__(self, record):
        if record % 7 == 3:
            raise Unreadable(f"{record}.png is damaged", "damaged picture", f"{record}.png")
        if record % 3 == 1:
            return [f"{self.word} {record}", "and more"]
        return [f"{self.word} {record}", np.full((4, 4, 3), record, np.uint8)]


@dataclasses.dataclass(frozen=True)
class Spec(Source):
    number: int = 20
    word: str = "fox"

    def open(self, split, image_size=None):
        return Pairs(self.number if split == "train" else 3, self.word)


class Codec:
    image_size, shape, dtype, fingerprint = 4, (2, 2, 1), np.float32, "fake"

    def __init__(self, scale=10):
        self.scale = scale

    def encode(self, images):
        return images[:, ::2, ::2, :1] / np.float32(self.scale)

    def save(self, path):
        base.write(path, {"kind": "fake", "scale": self.scale}, {})

    @classmethod
    def read(cls, about, arrays):
        return cls(about["scale"])


def format_of(root, **specs):
    specs = specs or {"a": Spec("x", 0.5), "b": Spec("x", 0.5, 9, "cow"), "left": Spec("x", 0.0)}
    return SimpleNamespace(data=SimpleNamespace(prepared=str(root), sources=specs), image_shape=(2, 2, 1))


def prepare(root, worker=(0, 1), scale=10, **specs) -> None:
    unfitted = verb.Unfitted(4, "of the run", lambda: Codec(scale))
    verb.prepare(format_of(root, **specs), ByteTokenizer(), unfitted, worker, 0.0)


@pytest.fixture(autouse=True, scope="module")
def small_shards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "PICTURES", 3)
        patch.setattr(shards, "RECORDS", 4)
        patch.setitem(base.CODECS, "fake", Codec)
        yield


def tree(root) -> dict:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*"))
            if path.is_file() and path.name not in (".lock", "timing.json")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole") / "data"
    prepare(root)
    return tree(root)


def test_what_is_prepared(tmp_path, whole, capsys):
    root = tmp_path / "data"
    prepare(root)
    assert tree(root) == whole
    assert {"meta.json", "card.json", "codec.npz", "tokenizer.json", "plan.json",
            "a/train/ledger.jsonl", "b/heldout/00000.array_record"} <= whole.keys()
    split = store.Split(root, "a", "train")
    assert len(split) == 17 and len(split.shards) == 5
    ids, latents = (part.values for part in split.read(1, [2])[0])  # shard 1 is of records 4, 5, 6, 7
    assert ids.tolist() == ByteTokenizer().encode("fox 6") and (latents == 0.6015625).all()  # 0.6 in bfloat16
    made = json.loads((root / "card.json").read_text())
    assert made["a/train"]["skipped"] == {"damaged picture": [3, ["3.png", "10.png", "17.png"]]}
    assert "a/train: 17 records" in capsys.readouterr().out
    meta = store.read_meta(root)
    assert meta["codec"] == "fake" and meta["image_dtype"] == "bfloat16" and "preprocessing" not in meta
    prepare(root)
    assert "holds these data already" in capsys.readouterr().out and tree(root) == whole


def test_codes_are_stored_as_whole_numbers(tmp_path, capsys):
    """As the codec makes them, which stands beside them; they have no mean and no deviation."""
    cfg = VQConfig(image_size=4, downsample=2, width=4, num_blocks=0, num_codes=9, code_dim=2,
                   commitment_weight=0.0)
    params = jax.jit(VQAutoencoder(cfg).init)(jax.random.key(0), np.zeros((1, 4, 4, 3)))["params"]
    codec = VQCodec(cfg, params | {"codebook": jax.random.normal(jax.random.key(1), (9, 2))})
    root, spec = tmp_path / "data", Spec("x", 1.0)
    form = format_of(root, a=spec)
    form.image_shape = (2, 2)
    verb.prepare(form, ByteTokenizer(), verb.Unfitted(4, "of the run", lambda: codec), (0, 1), 0.0)
    codes = np.stack([record[1].values for record in store.Split(root, "a", "train").read(1, [1, 2])])
    assert codes.dtype == np.int32 and codes.shape == (2, 2, 2)  # of records 5 and 6
    np.testing.assert_array_equal(codes, codec.encode(np.stack([spec.open("train")[i][1] for i in (5, 6)])))
    meta = store.read_meta(root)
    assert (meta["image_dtype"], meta["image_shape"], meta["codec"]) == ("int32", [2, 2], codec.fingerprint)
    assert base.load(root / "codec.npz").decode(codes).shape == (2, 4, 4, 3)
    assert json.loads((root / "card.json").read_text())["a/train"]["latents"] is None
    assert "warning" not in capsys.readouterr().err
    form = SimpleNamespace(check_images=lambda *a: None)
    again = verb.open_codec(str(root / "codec.npz"), form)  # for other data
    assert (again.image_size, again.fingerprint, again.fit().fingerprint) == (4, *[codec.fingerprint] * 2)
    with pytest.raises(UserError, match=r"--codec=.*none\.npz is not there"):
        verb.open_codec(str(root / "none.npz"), form)


def test_a_pretrained_codec_is_opened_for_the_configs_grid(tmp_path):
    """Its network fits any: what the config's model reads decides the size of the pictures."""
    named = write_pretrained(tmp_path, "kl")

    def format(channels):
        return RowFormat(None, Vocabulary(1022, 16), (8, 8, channels), None)

    found = verb.open_codec(named, format(4))
    assert found.image_size == 16 and found.fit().shape == (8, 8, 4) and found.fingerprint
    with pytest.raises(UserError, match=r"makes latents of shape \(8, 8, 4\), the model expects .*8, 8, 8"):
        verb.open_codec(named, format(8))


def test_killed_at_any_change_and_run_again(tmp_path):
    """Nothing is found before all is there."""
    specs = {"a": Spec("x", 0.5, 6)}
    prepare(tmp_path / "whole", **specs)
    wanted, change = tree(tmp_path / "whole"), 0
    while killed_at(change, lambda root=tmp_path / f"{change}": prepare(root, **specs)):
        root = tmp_path / f"{change}"
        assert not root.exists() or tree(root) == wanted
        prepare(root, **specs)
        assert tree(root) == wanted and not (tmp_path / f"{change}.unfinished").exists(), change
        change += 3  # every one: preparing/test_unfinished.py
    assert change > 25


def test_killed_again_and_again(tmp_path, monkeypatch, whole):
    """What is written is not written again."""
    read, real = [], shards.attempts

    def attempts(source, order, ahead):
        read.extend((source.word, len(source), record) for record in order)
        return real(source, order, ahead)

    monkeypatch.setattr(shards, "attempts", attempts)
    runs = 1
    while killed_at(20, lambda: prepare(tmp_path / "data")):
        runs += 1
        assert runs < 50
    assert tree(tmp_path / "data") == whole and runs > 4
    assert len(read) < 2 * len(set(read)) + 4 * runs and len(set(read)) == 20 + 9 + 3 + 3


def test_workers_side_by_side_make_the_same_bytes(tmp_path, whole, capsys):
    for worker in (1, 2, 0):
        assert not (tmp_path / "data").exists()
        prepare(tmp_path / "data", worker=(worker, 3))
    assert capsys.readouterr().out.count("left to other workers") == 2
    assert tree(tmp_path / "data") == whole
    prepare(tmp_path / "data", worker=(1, 3))  # a launcher started it again
    assert tree(tmp_path / "data") == whole and os.listdir(tmp_path) == ["data"]


@pytest.mark.parametrize("at", ["fitted", "write", "unwritten"])
def test_a_worker_that_was_started_again_and_one_that_completes(tmp_path, whole, monkeypatch, at):
    """Wherever he is when the other is done with the last shard."""
    real, root = getattr(verb, at), tmp_path / "data"
    prepare(root, worker=(1, 2))

    def later(*args):
        monkeypatch.setattr(verb, at, real)
        prepare(root, worker=(0, 2))
        return real(*args)

    monkeypatch.setattr(verb, at, later)
    prepare(root, worker=(1, 2))
    assert tree(root) == whole and os.listdir(tmp_path) == ["data"]


def test_workers_at_once(tmp_path, whole):
    """Some of them started again and again, through completion."""
    for turn in range(3):
        root = tmp_path / f"{turn}" / "data"
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            for done in [pool.submit(prepare, root, worker=(k, 3)) for k in (0, 1, 2) * 3]:
                with contextlib.suppress(UserError):  # worker k is at it still, as the launcher does not know
                    done.result()
        prepare(root)
        assert tree(root) == whole and os.listdir(root.parent) == ["data"]


def test_the_codec_is_fitted_once_for_all_workers(tmp_path, whole, capsys):
    """A processor that sums in another order normalises a little differently: that makes no other data."""
    for worker in (1, 0):
        prepare(tmp_path / "data", worker=(worker, 2), scale=10 if worker else 10.1)
    assert tree(tmp_path / "data") == whole and "begun anew" not in capsys.readouterr().err
    prepare(tmp_path / "data", scale=10.1)
    assert "holds these data already" in capsys.readouterr().out


def test_two_workers_that_fit_at_once(tmp_path, whole, monkeypatch):
    """Both have fitted when the first writes: the other takes his."""
    real = verb.unfinished.first

    def late(path, write):
        real(path, Codec(10).save)
        real(path, write)

    monkeypatch.setattr(verb.unfinished, "first", late)
    prepare(tmp_path / "data", scale=10.1)
    assert tree(tmp_path / "data") == whole


def test_a_worker_that_is_missing_can_be_made_up_for(tmp_path, whole):
    prepare(tmp_path / "data", worker=(1, 3))
    prepare(tmp_path / "data")
    assert tree(tmp_path / "data") == whole


def test_a_source_changed_since_it_was_begun(tmp_path, capsys):
    prepare(tmp_path / "data", worker=(0, 2), a=Spec("x", 1.0, 9))
    prepare(tmp_path / "data", a=Spec("x", 1.0, 9, "cow"))
    prepare(tmp_path / "whole", a=Spec("x", 1.0, 9, "cow"))
    assert "begun anew" in capsys.readouterr().err and tree(tmp_path / "data") == tree(tmp_path / "whole")


def test_where_no_record_can_be_read_nothing_is_replaced(tmp_path):
    class Damaged(Pairs):
        def __getitem__(self, record):
            raise Unreadable(f"{record}.png is damaged", "damaged picture", f"{record}.png")

    @dataclasses.dataclass(frozen=True)
    class Bad(Spec):
        def open(self, split, image_size=None):
            return Damaged(3)

    prepare(tmp_path / "data")
    before = tree(tmp_path / "data")
    with pytest.raises(UserError, match=r"photos/train: none of 3 records .* 3 damaged picture \(0.png, 1"):
        prepare(tmp_path / "data", photos=Bad("x", 1.0))
    assert tree(tmp_path / "data") == before


def test_inspect_writes_a_page_and_nothing_else(cfg, prepared_root, tmp_path, monkeypatch, capsys):
    """No --codec is needed; folders are made; what stood there is replaced."""
    monkeypatch.setattr(data_page, "SHOWN", 1)
    before, page = tree(prepared_root), tmp_path / "new" / "page.html"
    for _ in range(2):
        verb.inspect(cfg, page)
        assert f"wrote {page} (" in capsys.readouterr().out
        assert "Row 0" in page.read_text() and os.listdir(page.parent) == ["page.html"]
    assert tree(prepared_root) == before


@pytest.mark.parametrize("text", ["", "1", "2/2", "0/0", "-1/2", "a/b"])
def test_a_worker_is_one_of_several(text):
    assert verb.parse_worker("3/12") == (3, 12)
    with pytest.raises(UserError, match=f"--worker={text}: K/N is wanted"):
        verb.parse_worker(text)
