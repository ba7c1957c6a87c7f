"""The prepared form of a data set: tokenised text and encoded images, on disk, read at random.

`<root>/meta.json`                     tokenizer and autoencoder fingerprints, latent shape, format version
`<root>/autoencoder.npz`               the autoencoder that made the latents (params, mean, std)
`<root>/<source>/<split>/meta.json`    counts, largest token id
                        tokens.npy     int32 (tokens,): all texts, one after the other
                        parts.npy      int64 (parts, 2): (start, stop) in tokens, or (-1, index) in latents
                        records.npy    int64 (records, 3): one past the last part, text tokens, images
                        latents.npy    float32 (images, h, w, c): normalised; absent without images

Every array is memory-mapped, so opening costs nothing and processes share pages.
"""

import json
from pathlib import Path

import numpy as np

from tfusion.errors import UserError
from tfusion.types import FORMAT_VERSION


def write_source(folder: Path, records, encode_text, encode_images) -> dict:
    """Writes one split of one source and returns its meta.

    records: iterable of records, each a list of parts (str, or uint8 (H, W, 3)).
    encode_text: list[str] -> list of id lists. encode_images: uint8 (n, H, W, 3) -> float32 (n, h, w, c).
    """
    records = [list(record) for record in records]
    texts = [part for record in records for part in record if isinstance(part, str)]
    images = [part for record in records for part in record if not isinstance(part, str)]
    ids = encode_text(texts)
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
    rows = np.asarray(rows, np.int64)
    np.save(folder / "tokens.npy", tokens)
    np.save(folder / "parts.npy", np.asarray(parts, np.int64))
    np.save(folder / "records.npy", rows)
    if images:
        np.save(folder / "latents.npy", encode_images(np.stack(images)).astype(np.float32))
    meta = {"records": len(rows), "tokens": len(tokens), "images": len(images),
            "max_token_id": int(tokens.max(initial=0))}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return meta


def write_meta(root: Path, tokenizer: str, fingerprint: str, autoencoder: str, latent_shape) -> None:
    meta = {"format_version": FORMAT_VERSION, "tokenizer": tokenizer, "tokenizer_fingerprint": fingerprint,
            "autoencoder_fingerprint": autoencoder, "latent_shape": list(latent_shape)}
    (root / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


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
                                "`python -m tfusion.prepare`")
    meta = _read_json(path)
    if meta["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path} has format version {meta['format_version']}, this code reads "
                         f"{FORMAT_VERSION}: run `python -m tfusion.prepare` again")
    return meta


def identity(meta: dict) -> dict:
    """What a model trained on the data depends on: the tokenizer and the autoencoder that made them."""
    return {name: meta[name] for name in ("tokenizer_fingerprint", "autoencoder_fingerprint")}


def check_identity(trained_on: dict, root, where) -> None:
    """Raises UserError where a folder's data are not those that the model was trained on."""
    now = identity(read_meta(root)) if trained_on else {}
    changed = [name.removesuffix("_fingerprint") for name in now if now[name] != trained_on[name]]
    if changed:
        raise UserError(f"{where} was trained on data of another {' and '.join(changed)} than {root} now "
                        "holds: restore that folder, or train in another --workdir")


class PreparedSource:
    """Random access to one split of one source."""

    def __init__(self, root, name: str, split: str):
        self.name, self.folder = name, Path(root) / name / split
        if not (self.folder / "meta.json").exists():
            raise UserError(f"{self.folder} not found: data.mixture names '{name}'; run "
                                    "`python -m tfusion.prepare` with the same config, or leave it out")
        self.meta = _read_json(self.folder / "meta.json")
        names = ("tokens", "parts", "records") + ("latents",) * (self.meta["images"] > 0)
        arrays = {name: _map_array(self.folder / f"{name}.npy") for name in names}
        self._tokens, self._parts, self._records = (arrays[x] for x in ("tokens", "parts", "records"))
        self._latents = arrays.get("latents")

    def __len__(self) -> int:
        return len(self._records)

    @property
    def text_tokens(self):
        """int64 (records,)."""
        return self._records[:, 1]

    @property
    def images(self):
        """int64 (records,): number of images."""
        return self._records[:, 2]

    def read(self, record: int) -> list:
        """The record's parts in order: int32 (n,) text ids or float32 (h, w, c) latents."""
        first = self._records[record - 1, 0] if record else 0
        parts = self._parts[first : self._records[record, 0]]
        return [np.array(self._latents[b]) if a < 0 else np.array(self._tokens[a:b]) for a, b in parts]

    def read_text(self, record: int, start: int, stop: int):
        """int32 (n,): tokens `start` to `stop` of a record without images, whose parts lie end to end."""
        first, last = (self._records[r, 0] if r >= 0 else 0 for r in (record - 1, record))
        if first == last:
            return np.zeros(0, np.int32)
        begin, end = self._parts[first, 0], self._parts[last - 1, 1]
        return np.array(self._tokens[min(begin + start, end) : min(begin + stop, end)])
