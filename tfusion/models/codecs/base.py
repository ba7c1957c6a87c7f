"""What a codec is: pictures <-> what a model reads and writes of them; and its file, codec.npz.

To add one, write a class as `Codec` says, in a file of its own, and register it by its kind.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tfusion import sharding
from tfusion.errors import UserError
from tfusion.paths import replace_by

CHUNK = 256  # pictures per call, so that one compiled shape serves any number
CODECS: dict[str, type] = {}  # kind -> class, as codec.npz names it


class Codec(Protocol):
    """image_size: side of its pictures. shape, dtype: of one encoded picture. fingerprint: sha256 (hex) of what
    defines it; equal means interchangeable. One that makes codes (int32) has `num_codes`: they are below it."""

    image_size: int
    shape: tuple[int, ...]
    dtype: Any
    fingerprint: str

    def encode(self, images):
        """uint8 (n, H, W, 3) -> (n, *shape). Raises UserError on another size."""

    def decode(self, latents):
        """(n, *shape) -> uint8 (n, H, W, 3)."""

    def save(self, path: Path) -> None:
        """Writes what `load` needs."""

    @classmethod
    def read(cls, about: dict, arrays: dict) -> "Codec":
        """From what `save` gave to `write`."""


def register(kind: str) -> Callable[[type], type]:
    def add(cls: type) -> type:
        CODECS[kind], cls.kind = cls, kind
        return cls

    return add


def write(path: Path, about: dict, arrays: dict) -> None:
    """about: JSON values, 'kind' among them."""
    about = np.frombuffer(json.dumps(about).encode(), np.uint8)
    replace_by(path, lambda file: np.savez(file, about=about, **arrays))


def load(path: Path) -> Codec:
    """Reads what a codec's `save` wrote. Raises UserError where it is broken."""
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(bytes(arrays.pop("about")))
        return CODECS[about["kind"]].read(about, arrays)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"{path} is broken ({e}): bring it back from where it was copied") from e


def fingerprint(arrays: dict) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        digest.update(name.encode() + np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def check_pictures(images, image_size: int) -> None:
    """Raises UserError where they are not uint8 of that size."""
    size, images = (image_size, image_size, 3), np.asarray(images)
    if images.shape[1:] != size or images.dtype != np.uint8:
        raise UserError(f"pictures are {images.dtype} {images.shape[1:]}, the codec was trained on uint8 "
                        f"{size}: bring them to that size")


class Arrays:
    """What codecs have in common that are functions of named arrays: a subclass makes a registered one with
    `kind`, `read`, `_about` (its config), `_arrays` and the functions `_encode` and `_decode`, jitted."""

    chunk, num_codes, dtype = CHUNK, 0, np.float32

    def encode(self, images):
        check_pictures(images, self.image_size)
        return in_chunks(self._encode, images, self.chunk)

    def decode(self, images):
        """Raises UserError where a code is none of the codebook's."""
        images = check_codes(images, self.num_codes) if self.num_codes else np.asarray(images, self.dtype)
        return in_chunks(self._decode, images, self.chunk)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self._arrays())

    def save(self, path: Path) -> None:
        write(path, {"kind": self.kind, "cfg": self._about()}, self._arrays())


def num_codes(codec: Codec) -> int:
    """Of one that makes latents: 0."""
    return getattr(codec, "num_codes", 0)


def check_codes(codes, num_codes: int):
    """int32. Raises UserError where they are not whole numbers from 0 to num_codes - 1."""
    codes = np.asarray(codes)
    if codes.dtype.kind not in "iu" or (codes.size and not 0 <= codes.min() <= codes.max() < num_codes):
        raise UserError(f"codes are {codes.dtype} from {codes.min()} to {codes.max()}, the codec's are whole "
                        f"numbers from 0 to {num_codes - 1}: they are another codec's")
    return codes.astype(np.int32)


def in_chunks(fn, x, chunk: int):
    """fn over `chunk` rows at a time, on all devices of the current mesh, the last ones padded; numpy out."""
    x, out = np.asarray(x), []
    for start in range(0, len(x), chunk):
        part = x[start : start + chunk]
        padded = np.concatenate([part, np.repeat(part[-1:], chunk - len(part), axis=0)])
        out.append(sharding.fetch(fn(sharding.split_rows(padded)))[: len(part)])
    return np.concatenate(out)
