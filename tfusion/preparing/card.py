"""The data card, card.json: what the prepared data are, counted once when all is written."""

import collections
import json
from collections.abc import Iterable, Iterator

import numpy as np
from etils import epath

from tfusion.data import store
from tfusion.errors import UserError

NAME = "card.json"
HASHES = 2**24  # looked at at once
FEW = 20  # held-out records of a source
PERCENTILES = (5, 50, 95)


def make(root) -> dict:
    """{"<source>/<split>": counts}, JSON values: records, text tokens, images, bytes, shards; tokens and images
    per record; records that copy an earlier one to the last byte, and of held-out ones those that stand in
    any training split too; mean and deviation of the latents; what was skipped, by reason, with the first keys.
    """
    folders = store.split_folders(root)
    copies = _copies(folders)
    return {f"{folder.parent.name}/{folder.name}": _split(folder) | copies[folder] for folder in folders}


def read(root) -> dict:
    """The card of prepared data; of a store that was written by other means, made now."""
    path = epath.Path(root) / NAME
    try:
        return json.loads(path.read_text()) if path.exists() else make(root)
    except ValueError as e:
        raise UserError(f"{path} is broken ({e}): {store.AGAIN}, or delete it") from e


def _split(folder) -> dict:
    lines = store.ledger(folder)
    tokens, images = collections.Counter(), collections.Counter()
    alone = 0
    for sizes in _arrays(folder, lines, "sizes"):
        alone += int(((sizes[:, 0] == 0) & (sizes[:, 1] > 0)).sum())
        for counter, column in ((tokens, sizes[:, 0]), (images, sizes[:, 1])):
            values, counts = np.unique(column, return_counts=True)
            counter.update(dict(zip(values.tolist(), counts.tolist())))
    total = {key: sum(line[key] for line in lines.values()) for key in ("records", "text_tokens", "images",
                                                                        "bytes")}
    spread = store.spread(lines.values())
    return total | {
        "shards": len(lines), "pictures_without_text": alone, "text_tokens_per_record": _summary(tokens),
        "images_per_record": {str(number): images[number] for number in sorted(images)},
        "latents": None if spread is None else {"mean": spread[0].round(4).tolist(),
                                                "std": spread[1].round(4).tolist()},
        "skipped": _skipped(lines)}


def _arrays(folder, lines: dict, what: str) -> Iterator[np.ndarray]:
    for name, line in lines.items():
        if line["records"]:
            with (folder / f"{name}.{what}.npy").open("rb") as file:
                yield np.load(file)


def _summary(counter: collections.Counter) -> dict:
    """Of numbers, as often as the counter has them."""
    if not counter:
        return {}
    values = np.array(sorted(counter))
    counts = np.array([counter[value] for value in values.tolist()])
    ends = np.cumsum(counts)
    at = [int(values[np.searchsorted(ends, ends[-1] * p / 100)]) for p in PERCENTILES]
    return {"mean": round(float((values * counts).sum() / ends[-1]), 2), "min": int(values[0]),
            **{f"p{p}": x for p, x in zip(PERCENTILES, at)}, "max": int(values[-1])}


def _skipped(lines: dict) -> dict:
    found = {}
    for line in lines.values():
        for reason, (number, keys) in line["skipped"].items():
            count, named = found.get(reason, (0, []))
            found[reason] = (count + number, (named + keys)[: store.KEYS])
    return {reason: list(found[reason]) for reason in sorted(found)}


def _copies(folders: list) -> dict:
    """Counted over a part of all hashes at a time, so that memory stays bounded."""
    ledgers = {folder: store.ledger(folder) for folder in folders}
    total = sum(line["records"] for lines in ledgers.values() for line in lines.values())
    parts = max(1, -(-total // HASHES))
    found = {folder: {"copies": 0} | ({} if folder.name == "train" else {"also_in_train": 0})
             for folder in folders}
    for part in range(parts):
        unique = {}
        for folder in folders:
            some = [x[x % np.uint64(parts) == part] for x in _arrays(folder, ledgers[folder], "hashes")]
            hashes = np.concatenate(some or [np.zeros(0, np.uint64)])
            hashes.sort()  # in place: np.unique and np.isin take several times the memory
            unique[folder] = hashes[np.concatenate([[True], hashes[1:] != hashes[:-1]])[: len(hashes)]]
            found[folder]["copies"] += len(hashes) - len(unique[folder])
        for folder in folders:
            if folder.name != "train":
                train = (unique[other] for other in folders if other.name == "train")
                found[folder]["also_in_train"] += int(_stand_in(unique[folder], train).sum())
    return found


def _stand_in(hashes: np.ndarray, others: Iterable[np.ndarray]) -> np.ndarray:
    """bool, which of the hashes stand in any of the others, which are sorted."""
    found = np.zeros(len(hashes), bool)
    for some in others:
        if len(some):
            found |= some[np.minimum(np.searchsorted(some, hashes), len(some) - 1)] == hashes
    return found


def check(card: dict) -> None:
    """Raises UserError where nothing of a source can be trained on."""
    for title, about in card.items():
        if title.endswith("/train") and not about["records"]:
            total = sum(number for number, _ in about["skipped"].values())
            raise UserError(f"{title}: none of {total} records can be used: {told(about['skipped'])}")


def lines(card: dict) -> list[str]:
    """What a person wants to know of each split."""
    out = []
    for title, about in card.items():
        text = [f"{about['records']:,} records", f"{about['text_tokens']:,} tokens"]
        if about["images"]:
            text.append(f"{about['images']:,} images")
        lengths = about["text_tokens_per_record"]
        if lengths:
            text.append(f"{lengths['p50']} tokens a record (at most {lengths['max']})")
        for key, what in (("pictures_without_text", "pictures without text"),
                          ("copies", "exact copies of others"), ("also_in_train", "stand in train too")):
            if about.get(key):
                text.append(f"{about[key]:,} {what}")
        few = title.endswith("/heldout") and about["records"] < FEW
        out.append(f"{title}: {', '.join(text)}" + "; few: figures of them say little" * few)
        if about["skipped"]:
            out.append(f"  skipped: {told(about['skipped'])}")
    return out


def told(skipped: dict) -> str:
    """What was skipped, by reason, with the first keys."""
    return "; ".join(f"{number:,} {reason} ({', '.join(keys)}{', ...' * (number > len(keys))})"
                     for reason, (number, keys) in skipped.items())
