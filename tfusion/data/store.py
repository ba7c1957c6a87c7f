"""The store: tokenised text and encoded images, on disk, in shards that are read at random.

`<root>/meta.json`                     fingerprints of tokenizer and codec, shape and type of an encoded
                                       image; written last: who finds it finds all of it
`<root>/tokenizer.json, .model`        the tokenizer
`<root>/codec.npz`                     the codec that made the images, if tfusion's
`<root>/<source>/<split>/00000.array_record   ArrayRecord, a record each (`encode`)
                         00000.sizes.npy      int32 (records, 2): text tokens, images
                         00000.hashes.npy     uint64 (records,): of each record's bytes, to find copies by
                         ledger.jsonl         a line per shard; a shard counts when its line is there, and the
                                              line is the last thing written. Until `write_meta` collects them
                                              each line is a file of its own, ledger.00000.jsonl, so that many
                                              write side by side

Opening a split reads its ledger alone. Paths are local; a bucket is mounted.
"""

import functools
import hashlib
import io
import json
import math
import os
import socket
import struct
import sys
from typing import NamedTuple

import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from tfusion.data import layout
from tfusion.data.readers import Readers, reader_of, tried
from tfusion.data.tokenizers import SAVED, Tokenizer
from tfusion.errors import Unreachable, UserError, unanswered
from tfusion.types import Part
from tfusion.workdir import CODEC

FORMAT_VERSION = 4  # of the store; 3 was a folder of arrays per source
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype(np.int32), BFLOAT16, np.dtype(np.uint8), np.dtype(np.uint16))  # a record names them by place
OPTIONS = "group_size:1,zstd:1"  # a record can be read without its neighbours; latents shrink by a fifth
SIZES = 64  # shards of a split whose sizes are kept
KEYS = 3  # records that are named for each reason to skip
MANY = 100  # pictures; of fewer the deviation says little
UNIT_STD = (0.5, 2.0)  # of a channel of the latents: within, nothing is said
AGAIN = "bring it back, or run `python -m tfusion.prepare` again"


# ---------------------------------------------------------------- a record

def encode(parts: list[Part]) -> bytes:
    """A record's bytes: the number of parts; of each its kind, type and shape; then the values of all. Text is
    int32. Images are bfloat16 where they are floats, and whole numbers (codes) in their own type."""
    heads, values = [struct.pack("<I", len(parts))], []
    for kind, x, _ in parts:
        x = np.asarray(x)
        dtype = DTYPES[0] if kind == "text" else BFLOAT16 if _is_float(x) else x.dtype
        heads.append(struct.pack(f"<cBB{x.ndim}I", kind[:1].encode(), DTYPES.index(dtype), x.ndim, *x.shape))
        values.append(np.ascontiguousarray(x, dtype).tobytes())
    return b"".join(heads + values)


def decode(data: bytes) -> list[Part]:
    """The parts of a record: text int32 (n,), images float32 (or whole numbers as they are)."""
    (number,), at, heads = struct.unpack_from("<I", data), 4, []
    for _ in range(number):
        kind, dtype, ndim = struct.unpack_from("<cBB", data, at)
        shape = struct.unpack_from(f"<{ndim}I", data, at + 3)
        heads.append((kind, DTYPES[dtype], shape))
        at += 3 + 4 * ndim
    parts = []
    for kind, dtype, shape in heads:
        size = int(np.prod(shape))
        x = np.frombuffer(data, dtype, size, at).reshape(shape)
        at += size * dtype.itemsize
        x = x.astype(np.float32 if dtype == BFLOAT16 else dtype)  # a copy, and aligned
        parts.append(layout.text(x) if kind == b"t" else layout.image(x))
    return parts


def _is_float(x) -> bool:
    return x.dtype.kind == "f" or x.dtype == BFLOAT16  # numpy calls the latter's kind V


@functools.cache  # asked of every image
def stored_dtype(dtype) -> str:
    """The name of the type that images of a type are stored in."""
    return str(BFLOAT16 if _is_float(np.zeros(0, dtype)) else np.dtype(dtype))


# ---------------------------------------------------------------- the ledger

class Shard(NamedTuple):
    """What a ledger says of a shard."""

    name: str
    records: int
    text_tokens: int
    images: int
    max_token_id: int
    bytes: int  # of its records' file
    digest: str  # of its sizes
    image_shape: tuple[int, ...] | None  # of one encoded image; None without images


def split_folder(root, source: str, split: str) -> epath.Path:
    return epath.Path(root) / source / split


def ledger(folder) -> dict[str, dict]:
    """{shard: its line}, in their order; a shard's own file counts before the collected one. Raises UserError
    where a file is broken."""
    return _read(_ledgers(folder))


def _ledgers(folder) -> list[epath.Path]:
    """The collected one first."""
    return sorted(epath.Path(folder).glob("ledger*.jsonl"), key=lambda path: path.name != "ledger.jsonl")


def _read(ledgers: list[epath.Path]) -> dict[str, dict]:
    lines = {}
    for path in ledgers:
        for text in path.read_text().splitlines():
            line = _parse(text, path)
            if not line["shard"].isdecimal():  # it names files, beside the ledger and nowhere else
                raise UserError(f"{path} is broken (shard {line['shard']!r} is no number): {AGAIN}")
            lines[line["shard"]] = line
    return {name: lines[name] for name in sorted(lines, key=lambda name: (len(name), name))}


def finished(root, source: str, split: str) -> set[int]:
    """The shards that are written."""
    return {int(name) for name in ledger(split_folder(root, source, split))}


def _has(folder: epath.Path, name: str) -> bool:
    """Whether a shard's line is there; of others' lines only those that are collected are read."""
    collected = folder / "ledger.jsonl"
    return (folder / f"ledger.{name}.jsonl").exists() or (
        collected.exists() and any(_parse(line, collected)["shard"] == name
                                   for line in collected.read_text().splitlines()))


def _parse(text: str, path) -> dict:
    try:
        return json.loads(text)
    except ValueError as e:
        raise UserError(f"{path} is broken ({e}): {AGAIN}") from e


def _replace(path: epath.Path, data: bytes) -> None:
    """Writes a file in one move."""
    beside = path.with_name(f".{path.name}")
    beside.write_bytes(data)
    _move(beside, path)


def _move(beside: epath.Path, path: epath.Path) -> None:
    """Once it is on disk: else a crash of the machine can leave the name, and a ledger that tells of it, with
    nothing behind."""
    with open(beside, "rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)


def _collect(folder: epath.Path) -> None:
    """One ledger of the shards' own; of those that are finished meanwhile the own stays."""
    ledgers = _ledgers(folder)
    own = [path for path in ledgers if path.name != "ledger.jsonl"]
    if own:
        text = "".join(json.dumps(line) + "\n" for line in _read(ledgers).values())
        _replace(folder / "ledger.jsonl", text.encode())
    for path in own:
        path.unlink()


# ---------------------------------------------------------------- writing

class Writer:
    """One shard of one split, written in one go:

        with store.Writer(root, "pairs", "train", 7) as writer:
            writer.add([layout.text(ids), layout.image(latents)])

    Several may write side by side, each its shards. A shard that ends in an exception, or is killed, is as if
    it had not been begun. Raises UserError where the shard is in the ledger already, and, naming the record,
    where a part is something else than ids or an image like those before it.
    """

    def __init__(self, root, source: str, split: str, shard: int):
        self.folder, self.name = split_folder(root, source, split), f"{shard:05d}"
        self._sizes, self._hashes, self._skipped = [], [], {}
        self._max_token_id, self._image, self._sums, self._file = 0, None, None, None

    def _beside(self, end: str) -> epath.Path:
        return self.folder / f".{self.name}.{end}"

    def __enter__(self) -> "Writer":
        if _has(self.folder, self.name):
            raise UserError(f"{self.folder}: shard {self.name} is written already: store.finished names those "
                            "that are")
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def add(self, parts: list[Part]) -> None:
        text, images = 0, 0
        for kind, values, _ in parts:
            x = np.asarray(values)
            if kind == "text":
                self._check_text(x)
                text += len(x)
            else:
                self._check_image(x)
                images += 1
        if self._file is None:
            self._file = ArrayRecordWriter(str(self._beside("array_record")), OPTIONS)
        data = encode(parts)
        self._file.write(data)
        self._sizes.append((text, images))
        self._hashes.append(int.from_bytes(hashlib.sha256(data).digest()[:8], "little"))

    def skip(self, reason: str, key: str) -> None:
        """Counts a record that cannot be used."""
        count, keys = self._skipped.get(reason, (0, []))
        self._skipped[reason] = (count + 1, [*keys, key][:KEYS])

    def _check_text(self, x: np.ndarray) -> None:
        if x.ndim == 1 and not x.size:
            return
        if x.ndim != 1 or x.dtype.kind not in "iu" or x.min() < 0 or (top := int(x.max())) >= 2**31:
            raise self._bad(f"a text is {x.ravel()[:4]}: ids are whole numbers from 0")
        self._max_token_id = max(self._max_token_id, top)

    def _check_image(self, x: np.ndarray) -> None:
        """And adds up what the latents' mean and deviation follow from."""
        if not _is_float(x) and x.dtype not in DTYPES:
            raise self._bad(f"an image is {x.dtype}: floats are wanted, or codes as "
                            f"{', '.join(str(dtype) for dtype in DTYPES if dtype != BFLOAT16)}")
        image = x.shape, stored_dtype(x.dtype)
        if self._image not in (None, image):
            raise self._bad(f"an image is {image[1]} {image[0]}, those before it {self._image[1]} "
                            f"{self._image[0]}: bring all to one form")
        self._image = image
        if not _is_float(x):
            return
        rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
        squares = np.einsum("nc,nc->c", rows, rows)
        if not math.isfinite(squares.sum()):
            raise self._bad("its image holds NaN or infinity: mend it, or leave the record out")
        if self._sums is None:
            self._sums = np.zeros((3, len(squares)))
        self._sums[0] += len(rows)
        self._sums[1] += np.einsum("nc->c", rows)
        self._sums[2] += squares

    def _bad(self, what: str) -> UserError:
        return UserError(f"{self.folder}: shard {self.name}, record {len(self._sizes)}: {what}")

    def __exit__(self, error, *_) -> None:
        if self._file is not None:
            self._file.close()
        if error:
            for path in self.folder.glob(f".{self.name}.*"):
                path.unlink()
            return
        sizes = np.asarray(self._sizes, "<i4").reshape(-1, 2)
        line = {"shard": self.name, "records": len(sizes), "text_tokens": int(sizes[:, 0].sum()),
                "images": int(sizes[:, 1].sum()), "max_token_id": self._max_token_id, "bytes": 0,
                "digest": _digest(sizes), "image_shape": self._image and list(self._image[0]),
                "image_dtype": self._image and self._image[1],
                "sums": None if self._sums is None else self._sums.tolist(), "skipped": self._skipped}
        if len(sizes):
            for end, x in (("sizes.npy", sizes), ("hashes.npy", np.asarray(self._hashes, "<u8"))):
                _replace(self.folder / f"{self.name}.{end}", _npy(x))
            beside, path = self._beside("array_record"), self.folder / f"{self.name}.array_record"
            _move(beside, path)
            line["bytes"] = path.stat().length
        _replace(self.folder / f"ledger.{self.name}.jsonl", (json.dumps(line) + "\n").encode())


def _npy(x) -> bytes:
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


def _digest(sizes) -> str:
    return hashlib.sha256(np.ascontiguousarray(sizes, "<i4").tobytes()).hexdigest()[:16]


# ---------------------------------------------------------------- reading

class Split:
    """Random access to one split of one source.

    shards: those that hold records. Safe to be read by several threads; pickles as its path. Raises UserError
    where there is no ledger, or it is broken.
    """

    def __init__(self, root, source: str, split: str):
        self.name, self.folder = source, split_folder(root, source, split)
        self._path, lines = (str(root), source, split), ledger(self.folder)
        if not lines:
            raise UserError(f"{self.folder} not found: data.sources names '{source}'; run "
                            "`python -m tfusion.prepare` with the same config, or leave it out")
        self.shards = [_shard(line) for line in lines.values() if line["records"]]
        self._readers = Readers(self._open)
        self._kept_sizes = functools.lru_cache(SIZES)(self._load_sizes)

    def __reduce__(self):
        return Split, self._path

    def __len__(self) -> int:
        return sum(shard.records for shard in self.shards)

    @property
    def digest(self) -> str:
        """Of what decides where a record stands in the run: the shards, and each record's sizes."""
        return hashlib.sha256("".join(shard.digest for shard in self.shards).encode()).hexdigest()[:16]

    @functools.cached_property
    def image_shape(self) -> tuple[int, ...] | None:
        """Of one encoded image; None without images. Raises UserError where shards differ."""
        shapes = {shard.image_shape: shard.name for shard in self.shards if shard.image_shape}
        if len(shapes) > 1:
            told = " and ".join(f"{shape} (shard {name})" for shape, name in shapes.items())
            raise UserError(f"{self.folder} holds images of shape {told}: write them anew, in one form")
        return next(iter(shapes), None)

    def sizes(self, shard: int) -> np.ndarray:
        """int32 (records, 2): text tokens and images of a shard's records; not to be written to. Raises
        UserError where they are not those that the ledger knows."""
        return self._kept_sizes(shard)

    def _load_sizes(self, shard: int) -> np.ndarray:
        path = self.folder / f"{self.shards[shard].name}.sizes.npy"
        try:
            sizes = np.load(io.BytesIO(tried(path, path.read_bytes)))
        except (ValueError, EOFError, OSError) as e:
            raise _broken(path, e) from e
        if _digest(sizes) != self.shards[shard].digest:
            raise UserError(f"{path} is not the file that its ledger knows: {AGAIN}")
        sizes.flags.writeable = False
        return sizes

    def read(self, shard: int, records: list[int]) -> list[list[Part]]:
        """Some records of a shard, in the order asked for, in one read; where that fails it is tried again
        (readers.tried). Raises UserError where the shard is missing or broken, or cannot be read."""
        path, records = self._path_of(shard), [int(record) for record in records]
        try:
            return [decode(x) for x in tried(path, lambda: self._readers.read(shard, records),
                                             lambda: self._readers.forget(shard))]
        except UserError:  # said by _open
            raise
        except (RuntimeError, OSError, ValueError, struct.error) as e:  # of array_record, the disk, decode
            raise _broken(path, e) from e

    def _path_of(self, shard: int) -> epath.Path:
        return self.folder / f"{self.shards[shard].name}.array_record"

    def _open(self, shard: int):
        path, about = self._path_of(shard), self.shards[shard]
        reader = reader_of(path)
        if not reader.ok() and os.stat(path).st_size == about.bytes:
            raise RuntimeError("all of it is there, but it does not open")
        if not reader.ok() or reader.num_records() != about.records:
            raise _broken(path, f"{reader.num_records()} records of {about.records}")
        return reader


def _broken(path, why) -> UserError:
    """Of whatever it is: who reads it cannot tell a broken file from a broken way to it."""
    kind = Unreachable if isinstance(why, OSError) and unanswered(why) else UserError
    return kind(f"{path} is missing or broken, or {socket.gethostname()} cannot read it ({why}): {AGAIN}")


def _shard(line: dict) -> Shard:
    shape = line["image_shape"]
    return Shard(*(line["shard" if name == "name" else name] for name in Shard._fields[:-1]),
                 shape and tuple(shape))


# ---------------------------------------------------------------- the whole

def write_meta(root, tokenizer: Tokenizer, codec: str, image_shape, codec_run: str | None = None,
               sources: dict | None = None, image_dtype: str = str(BFLOAT16), num_codes: int = 0) -> None:
    """Completes a folder of sources: collects the ledgers, saves the tokenizer, and says what the images are.

    codec: the fingerprint of what encoded the pictures; '' where there are none. codec_run: the workdir that
    trained it, sources: {name: its spec}, as far as they are known. num_codes: of a codec that makes
    codes. A line on stderr where latents are far from unit variance.
    """
    root = epath.Path(root)
    for folder in split_folders(root):
        _collect(folder)
        _tell_spread(folder)
    tokenizer.save(root)
    meta = {"format_version": FORMAT_VERSION, "tokenizer": tokenizer.fingerprint, "codec": codec,
            "vocab_size": tokenizer.vocab_size, "image_shape": list(image_shape), "image_dtype": image_dtype,
            "num_codes": num_codes, "codec_run": codec_run, "sources": sources or {}}
    _replace(root / "meta.json", (json.dumps(meta, indent=2) + "\n").encode())


def split_folders(root) -> list[epath.Path]:
    """The folders of a store that hold a ledger."""
    return sorted({path.parent for path in epath.Path(root).glob("*/*/ledger*.jsonl")})


def spread(lines) -> tuple[np.ndarray, np.ndarray] | None:
    """(mean, standard deviation) per channel, float64 (c,), of the latents that ledger lines tell of."""
    sums = [line["sums"] for line in lines if line["sums"]]
    if not sums:
        return None
    number, total, squares = np.sum(np.asarray(sums, np.float64), 0)
    return total / number, np.sqrt(np.maximum(squares / number - (total / number) ** 2, 0))


def _tell_spread(folder) -> None:
    lines = ledger(folder).values()
    found = spread(lines) if sum(line["images"] for line in lines) >= MANY else None
    if found and (found[1].min() < UNIT_STD[0] or found[1].max() > UNIT_STD[1]):
        print(f"warning: {folder}: latents have standard deviation {found[1].min():.2g} to "
              f"{found[1].max():.2g} per channel; the noise schedule is made for about 1: normalise them by "
              "their own mean and deviation", file=sys.stderr)


def read_meta(root) -> dict:
    """The meta of a store. Raises UserError where it is absent, broken or of another version."""
    path = epath.Path(root) / "meta.json"
    if not path.exists():
        raise UserError(f"{path.absolute()} not found: data.prepared must name a folder written by "
                        "`python -m tfusion.prepare`; --config.data.prepared=DIR names another")
    meta = _parse(path.read_text(), path)
    if meta["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path} has format version {meta['format_version']}, this code reads "
                        f"{FORMAT_VERSION}: run `python -m tfusion.prepare` again")
    return {"num_codes": 0} | meta  # written before there were codes


def identity(meta: dict) -> dict:
    """What a model trained on the data depends on: the tokenizer and the codec that made them."""
    return {name: meta[name] for name in ("tokenizer", "codec")}


def assets(root) -> list[epath.Path]:
    """The files of a store that a run copies, so as not to depend on it."""
    return [path for path in (epath.Path(root) / name for name in (*SAVED, CODEC)) if path.exists()]
