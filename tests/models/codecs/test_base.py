"""The file of a codec, whatever its kind: what is saved is loaded by its kind; what is broken is one line."""

import json

import numpy as np
import pytest

from tfusion.errors import UserError
from tfusion.models.codecs import base


class Halves:
    """A codec of the tests' own: every other pixel."""

    image_size, shape, dtype = 4, (2, 2, 3), np.float32

    def __init__(self, scale):
        self.scale = scale

    @property
    def fingerprint(self) -> str:
        return base.fingerprint({"scale": self.scale})

    def encode(self, images):
        base.check_pictures(images, self.image_size)
        return images[:, ::2, ::2] * self.scale

    def save(self, path):
        base.write(path, {"kind": "halves", "note": 7}, {"scale": self.scale})

    @classmethod
    def read(cls, about, arrays):
        assert about == {"kind": "halves", "note": 7}
        return cls(arrays["scale"])


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "CODECS", dict(base.CODECS))
    assert base.register("halves")(Halves) is Halves
    Halves(np.float32(0.5)).save(tmp_path / "codec.npz")
    return tmp_path / "codec.npz"


def test_a_codec_is_loaded_by_its_kind(saved):
    codec = base.load(saved)
    assert isinstance(codec, Halves) and codec.fingerprint == Halves(np.float32(0.5)).fingerprint
    assert codec.encode(np.full((1, 4, 4, 3), 10, np.uint8)).max() == 5
    assert "kl" in base.CODECS  # beside the package's own


def broken(path, how: str) -> None:
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "another kind":
        base.write(path, {"kind": "of tomorrow"}, {})
    else:
        np.savez(path, scale=np.ones(1))


@pytest.mark.parametrize("how", ["cut", "empty", "another kind", "without its meta"])
def test_a_broken_file_is_one_line(saved, how):
    broken(saved, how)
    with pytest.raises(UserError, match=r"codec\.npz is broken .*: bring it back from where it was") as e:
        base.load(saved)
    assert "\n" not in str(e.value)


def test_fingerprints_are_of_names_and_bytes():
    a, b = np.arange(3), np.arange(3, 6)
    first = base.fingerprint({"a": a, "b": b})
    assert len(first) == 64 and int(first, 16) and first == base.fingerprint({"b": b, "a": a.copy()})
    assert len({first, base.fingerprint({"a": b, "b": a}), base.fingerprint({"a": a})}) == 3


def test_the_file_holds_plain_json(saved):
    with np.load(saved) as file:
        assert json.loads(bytes(file["about"])) == {"kind": "halves", "note": 7}
