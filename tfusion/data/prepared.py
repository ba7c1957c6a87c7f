"""The prepared form of a data set: tokenised text and encoded images, on disk, read at random.

`<root>/meta.json`                     fingerprints of tokenizer and codec, latent shape, format version
`<root>/tokenizer.json, .model`        the tokenizer
`<root>/codec.npz`                     the codec that made the latents (params, mean, std), if tfusion's
`<root>/<source>/<split>/meta.json`    counts, largest token id
                        tokens.npy     int32 (tokens,): all texts, one after the other
                        parts.npy      int64 (parts, 2): (start, stop) in tokens, or (-1, index) in latents
                        records.npy    int64 (records, 3): one past the last part, text tokens, images
                        latents.npy    float32 (images, h, w, c): normalised; absent without images

Every array is memory-mapped, so opening costs nothing and processes share pages.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np

from tfusion.data import layout
from tfusion.data.tokenizers import SAVED, Tokenizer
from tfusion.errors import UserError
from tfusion.types import FORMAT_VERSION, Part
from tfusion.workdir import CODEC, LOCK, hold

MARK = ".made_by_prepare"  # stands in every folder that `replacing` made: the names of all files it left there
UNIT_STD = (0.5, 2.0)  # of a channel of the latents: within, nothing is said
MANY = 100  # pictures; of fewer the deviation says little


def write_source(folder: Path, records, encode_text, encode_images) -> dict:
    """Writes one split of one source and returns its meta.

    records: iterable of records, each a list of parts (str, or uint8 (H, W, 3)).
    encode_text: list[str] -> list of id lists. encode_images: uint8 (n, H, W, 3) -> float32 (n, h, w, c).
    Raises UserError, naming the record, where a part or a latent is something else.
    """
    records = [[record] if isinstance(record, str) else list(record) for record in records]
    texts = [part for record in records for part in record if isinstance(part, str)]
    images, owners = _pictures(folder, records)
    ids = _ids(folder, encode_text(texts), len(texts))
    ends = np.cumsum([0] + [len(x) for x in ids])
    parts, rows, text, image = [], [], 0, 0
    for record in records:
        row = [0, 0, 0]
        for part in record:
            if isinstance(part, str):
                parts.append((ends[text], ends[text + 1]))
                row[1] += len(ids[text])
                text += 1
            else:
                parts.append((-1, image))
                row[2] += 1
                image += 1
        row[0] = len(parts)
        rows.append(row)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = np.concatenate([np.asarray(x, np.int32) for x in ids] or [np.zeros(0, np.int32)])
    rows = np.asarray(rows, np.int64).reshape(-1, 3)
    meta = {"records": len(rows), "tokens": len(tokens), "images": len(images),
            "max_token_id": int(tokens.max(initial=0))}
    if images:
        latents = _latents(folder, encode_images(np.stack(images)), owners)
        meta["latent_std"] = [round(float(x), 4) for x in latents.std((0, 1, 2))]
        np.save(folder / "latents.npy", latents)
    np.save(folder / "tokens.npy", tokens)
    np.save(folder / "parts.npy", np.asarray(parts, np.int64).reshape(-1, 2))
    np.save(folder / "records.npy", rows)
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return meta


def _ids(folder: Path, ids: list, number: int) -> list:
    """One array of token ids per text, int64 (n,), checked."""
    ids = [np.asarray(x) for x in ids]
    if len(ids) != number:
        raise UserError(f"{folder}: the tokenizer made ids of {len(ids)} texts, there are {number}")
    for text, x in enumerate(ids):
        if x.size and (x.ndim != 1 or x.dtype.kind not in "iu" or x.min() < 0):
            raise UserError(f"{folder}: the tokenizer made {x.ravel()[:4]} of text {text}: ids are whole "
                            "numbers from 0")
    return ids


def _pictures(folder: Path, records: list) -> tuple[list, list[int]]:
    """(the records' pictures, the record of each): uint8 (H, W, 3), all of one size."""
    images, owners = [], []
    for number, record in enumerate(records):
        for part in record:
            if isinstance(part, str):
                continue
            kind, shape = getattr(part, "dtype", type(part).__name__), getattr(part, "shape", "")
            if kind != np.uint8 or len(shape) != 3 or shape[2] != 3:
                raise UserError(f"{folder}: record {number}: a part is {kind} {shape}; a text is a str, a "
                                "picture uint8 (H, W, 3) with values 0 to 255")
            if images and shape != images[0].shape:
                raise UserError(f"{folder}: record {number}: a picture is {shape}, that of record {owners[0]} "
                                f"{images[0].shape}: bring all to one size")
            images.append(part)
            owners.append(number)
    return images, owners


def _latents(folder: Path, latents, owners: list[int]):
    """float32 (n, h, w, c), checked; a line on stderr where they are far from unit variance."""
    latents = np.asarray(latents, np.float32)
    if latents.ndim != 4 or len(latents) != len(owners):
        raise UserError(f"{folder}: the encoder made {latents.shape} of {len(owners)} pictures, expected "
                        f"({len(owners)}, h, w, c)")
    bad = ~np.isfinite(latents).all((1, 2, 3))
    if bad.any():
        first, count = owners[int(bad.argmax())], f"{int(bad.sum())} of {len(owners)} pictures"
        raise UserError(f"{folder}: record {first}: the encoder made NaN or infinity of its picture ({count}): "
                        "mend it, or leave the record out")
    low, high = latents.std((0, 1, 2)).min(), latents.std((0, 1, 2)).max()
    if len(latents) >= MANY and (low < UNIT_STD[0] or high > UNIT_STD[1]):
        print(f"warning: {folder}: latents have standard deviation {low:.2g} to {high:.2g} per channel; the "
              "noise schedule is made for about 1: normalise them by their own mean and deviation",
              file=sys.stderr)
    return latents


def write_meta(root: Path, tokenizer: Tokenizer, codec: str, latent_shape,
               codec_run: str | None = None, sources: dict | None = None) -> None:
    """Completes a folder of sources: the tokenizer itself, and what the latents are.

    codec: the fingerprint of what encoded the pictures; '' where there are none. codec_run: the workdir that
    trained it, sources: {name: its spec}, as far as they are known.
    """
    tokenizer.save(root)
    meta = {"format_version": FORMAT_VERSION, "tokenizer": tokenizer.fingerprint, "codec": codec,
            "vocab_size": tokenizer.vocab_size, "latent_shape": list(latent_shape), "codec_run": codec_run,
            "sources": sources or {}}
    (root / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


@contextlib.contextmanager
def replacing(root):
    """Yields a new folder beside `root` that takes its place at the end; until then `root` stays as it is.

    Raises UserError where `root` holds anything that was not made here, for it would be deleted.
    """
    root = Path(root).resolve()  # of a symlink, what it points to
    beside, old = (root.with_name(root.name + end) for end in (".unfinished", ".old"))
    if not root.exists() and (old / MARK).exists():  # one was killed between its two last moves
        os.replace(old, root)
    for folder in (root, old):
        _check_ours(folder)
    if beside.exists() and any(beside.iterdir()) and not (beside / LOCK).exists():
        raise _not_ours(beside, "a file")
    beside.mkdir(parents=True, exist_ok=True)
    with hold(beside / LOCK):  # left by one that was killed, unless still being written
        for left in beside.iterdir():
            if left.name != LOCK:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield beside
        (beside / MARK).write_text("".join(f"{name}\n" for name in sorted(_files(beside))))
        _check_ours(root)  # again: writing may have taken hours
        if root.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(root, old)
        os.replace(beside, root)
        shutil.rmtree(old, ignore_errors=True)


def _files(folder: Path) -> set[str]:
    """What stands in a folder, but for the lock and the mark themselves."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")
            if not path.is_dir() and path.relative_to(folder) not in (Path(MARK), Path(LOCK))}


def _not_ours(folder: Path, what: str) -> UserError:
    return UserError(f"{folder} holds {what} that `python -m tfusion.prepare` did not make, and that would be "
                     "deleted: name another folder in data.prepared, or move it away")


def _check_ours(folder: Path) -> None:
    """Raises UserError where a folder holds a file that its mark does not name."""
    if folder.exists() and not folder.is_dir():
        raise _not_ours(folder, "a file")
    mark = folder / MARK
    foreign = sorted(_files(folder) - set(mark.read_text().splitlines() if mark.exists() else ()))
    if foreign:
        raise _not_ours(folder, foreign[0])


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path} is broken ({e}): run `python -m tfusion.prepare` again") from e


def _map_array(path: Path):
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as e:
        raise UserError(f"{path} is missing or broken ({e}): run `python -m tfusion.prepare` again") from e


def read_meta(root) -> dict:
    """The meta of a prepared data set. Raises UserError where it is absent, broken or of another version."""
    path = Path(root) / "meta.json"
    if not path.exists():
        raise UserError(f"{path.absolute()} not found: data.prepared must name a folder written by "
                        "`python -m tfusion.prepare`; --config.data.prepared=DIR names another")
    meta = _read_json(path)
    if meta["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path} has format version {meta['format_version']}, this code reads "
                        f"{FORMAT_VERSION}: run `python -m tfusion.prepare` again")
    return meta


def identity(meta: dict) -> dict:
    """What a model trained on the data depends on: the tokenizer and the codec that made them."""
    return {name: meta[name] for name in ("tokenizer", "codec")}


def assets(root) -> list[Path]:
    """The files of a prepared folder that a run copies, so as not to depend on it."""
    return [path for path in (Path(root) / name for name in (*SAVED, CODEC)) if path.exists()]


class PreparedSource:
    """Random access to one split of one source."""

    def __init__(self, root, name: str, split: str):
        self.name, self.folder = name, Path(root) / name / split
        if not (self.folder / "meta.json").exists():
            raise UserError(f"{self.folder} not found: data.sources names '{name}'; run "
                                    "`python -m tfusion.prepare` with the same config, or leave it out")
        self.meta = _read_json(self.folder / "meta.json")
        names = ("tokens", "parts", "records") + ("latents",) * (self.meta["images"] > 0)
        arrays = {name: _map_array(self.folder / f"{name}.npy") for name in names}
        self._tokens, self._parts, self._records = (arrays[x] for x in ("tokens", "parts", "records"))
        self._latents = arrays.get("latents")

    def __len__(self) -> int:
        return len(self._records)

    def sizes_digest(self) -> str:
        """Of what decides where a record stands in the run: the number of records and each one's sizes."""
        digest = hashlib.sha256()
        for first in range(0, len(self), 2**20):
            digest.update(np.ascontiguousarray(self._records[first : first + 2**20, 1:], "<i8").tobytes())
        return digest.hexdigest()[:16]

    @property
    def latent_shape(self) -> tuple | None:
        """(h, w, c); None without images."""
        return None if self._latents is None else self._latents.shape[1:]

    @property
    def text_tokens(self):
        """int64 (records,)."""
        return self._records[:, 1]

    @property
    def images(self):
        """int64 (records,): number of images."""
        return self._records[:, 2]

    def read(self, record: int) -> list[Part]:
        """The record's parts in order."""
        first = self._records[record - 1, 0] if record else 0
        parts = self._parts[first : self._records[record, 0]]
        return [layout.image(np.array(self._latents[b])) if a < 0 else layout.text(np.array(self._tokens[a:b]))
                for a, b in parts]

    def read_text(self, record: int, start: int, stop: int):
        """int32 (n,): tokens `start` to `stop` of a record without images, whose parts lie end to end."""
        first, last = (self._records[r, 0] if r >= 0 else 0 for r in (record - 1, record))
        if first == last:
            return np.zeros(0, np.int32)
        begin, end = self._parts[first, 0], self._parts[last - 1, 1]
        return np.array(self._tokens[min(begin + start, end) : min(begin + stop, end)])
