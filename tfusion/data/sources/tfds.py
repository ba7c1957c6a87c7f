"""What TensorFlow Datasets has written to a disk as ArrayRecord, of any builder, read without TensorFlow."""

import dataclasses
import json
import os
from pathlib import Path
from typing import NamedTuple

from tfusion import config
from tfusion.data.sources.base import Source, Unreadable, read_part
from tfusion.data.sources.shards import NONE, Chosen, Shard, Shards, check_apart, on_side
from tfusion.errors import UserError

ARRAY_RECORD = "array_record"


class Names(NamedTuple):
    """Features of an example; NONE where it has none such."""

    image: str
    text: str
    key: str


def open_builder(path: str):
    """Raises UserError where nothing has been written there, or in a form that cannot be read at random."""
    import tensorflow_datasets  # a second, and most runs read something else

    try:
        check_classes(path)
        builder = tensorflow_datasets.builder_from_directory(path)
    except UserError:
        raise
    except Exception as e:  # of several kinds
        raise UserError(f"{path} holds no data set of TensorFlow Datasets ({_line(e)}): name the folder with "
                        "dataset_info.json, .../NAME/VERSION") from e
    if builder.info.file_format.value != ARRAY_RECORD:
        raise UserError(f"{path} is written as {builder.info.file_format.value}, which is read from the front "
                        f"alone: write it anew with file_format='{ARRAY_RECORD}', or by tfds convert_format")
    return builder


def check_classes(path: str) -> None:
    """Raises UserError where features.json names other classes than the package's own: the package imports what
    is named there."""
    features = Path(path, "features.json")
    for name in _classes(json.loads(features.read_text())) if features.exists() else ():
        if not name.startswith("tensorflow_datasets."):
            raise UserError(f"{features} names the class {name}, and opening it would import that: only those "
                            "of tensorflow_datasets are read")


def _classes(tree):
    if isinstance(tree, dict):
        yield from (tree[key] for key in ("pythonClassName", "python_class_name") if key in tree)
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _classes(value)


def _line(e: Exception) -> str:
    return (str(e) or type(e).__name__).split("\n")[0][:160]


def shards_of(builder, split: str) -> list[Shard]:
    """Raises UserError where there is no such split, or a file of it is missing."""
    try:
        found = [Shard(str(f.filename), f.skip, f.take) for f in builder.info.splits[split].file_instructions]
    except (ValueError, KeyError) as e:
        raise UserError(f"{builder.data_dir}: no split {split!r} ({_line(e)}); it has "
                        f"{', '.join(builder.info.splits)}") from e
    if missing := [shard.path for shard in found if not os.path.exists(shard.path)]:
        raise UserError(f"{missing[0]} is missing, of split {split!r} {len(missing)} of {len(found)} files: "
                        "bring them back, or write the data set again")
    return found


def check_features(builder, names: Names) -> None:
    """Raises UserError where a feature is not there, or is of another form."""
    from tensorflow_datasets import features

    has = builder.info.features
    for role, name in names._asdict().items():
        feature = has[name] if name != NONE and name in has else None
        scalar = feature is not None and feature.shape == () and not isinstance(feature, features.FeaturesDict)
        fits = {"image": isinstance(feature, features.Image),
                "text": scalar and feature.np_dtype in (str, bytes, object),
                "key": scalar}[role]
        if name != NONE and not fits:
            there = ", ".join(f"{key} ({type(value).__name__})" for key, value in has.items())
            wanted = {"image": "an Image", "text": "a Text", "key": "a Text or a number"}[role]
            raise UserError(f"{builder.data_dir}: {role} = {name!r}, {wanted} is needed; it has {there}")


class Examples:
    """Record i is [text, picture], or what there is of it, of the split's i-th example."""

    def __init__(self, builder, shards: list[Shard], names: Names, image_size: int | None):
        from tensorflow_datasets import decode, features

        self.shards, self.names, self.image_size = Shards(shards), names, image_size
        has = builder.info.features
        skipped = {name: decode.SkipDecoding() for name in has if isinstance(has[name], features.Image)}
        self._example = lambda data: has.deserialize_example_np(data, decoders=skipped)

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def fingerprint(self) -> str:
        return self.shards.fingerprint

    def example(self, record: int) -> tuple[str, dict]:
        """(where it stands, its features as they are stored)."""
        where = "{}, record {}".format(*self.shards.place(record))
        data = self.shards[record]
        try:
            return where, self._example(data)
        except Exception as e:  # whatever the parser stumbles over
            raise Unreadable(f"{where} is no example of this data set ({_line(e)})", "malformed record",
                             self.shards.name(record)) from e

    def key(self, record: int) -> str:
        """The key feature; without one, or where it cannot be read, the file's name and the number there."""
        if self.names.key == NONE:
            return self.shards.name(record)
        try:
            return self._key(record, self.example(record)[1])
        except Unreadable as e:
            return e.key

    def _key(self, record: int, example: dict) -> str:
        if self.names.key == NONE:
            return self.shards.name(record)
        value = example[self.names.key]
        return value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value)

    def __getitem__(self, record: int) -> list:
        where, example = self.example(record)
        key, parts = self._key(record, example), []
        if self.names.text != NONE:
            try:
                text = example[self.names.text].decode()
            except UnicodeDecodeError as e:
                raise Unreadable(f"{where}: {self.names.text} is not UTF-8 (byte {e.start})", "text not UTF-8",
                                 key) from e
            text = text if self.names.image == NONE else text.strip()
            parts += [text] if text.strip() else []
        if self.names.image != NONE:
            parts.append(read_part(where, self.image_size, key, example[self.names.image]))
        if not parts:
            raise Unreadable(f"{where}: {self.names.text} is blank", "empty", key)
        return parts


@config.register("source", "tfds")
@dataclasses.dataclass(frozen=True)
class TfdsSource(Source):
    """Examples of a data set on disk; which are held out have a split of their own, or are chosen by a hash."""

    path: str = config.path()  # the folder with dataset_info.json: .../NAME/VERSION
    train_split: str  # such as train or train[:90%]
    heldout_split: str  # such as validation or train[90%:], or 'none'
    heldout_fraction: float = config.fraction()  # else: of the examples, by a hash of the key
    image: str  # name of the feature, or 'none'
    text: str  # likewise
    key: str  # likewise; 'none': the file's name and the number there

    def check(self, name: str) -> None:
        if self.image == self.text == NONE:
            raise UserError(f"{name}.image and {name}.text are both '{NONE}': name a feature")
        if self.heldout_split != NONE and self.heldout_fraction:
            raise UserError(f"{name}.heldout_split = {self.heldout_split!r} and {name}.heldout_fraction = "
                            f"{self.heldout_fraction}: set one of them to '{NONE}' or 0")

    def open(self, split: str, image_size: int | None = None) -> Chosen | Examples:
        builder, names = open_builder(self.path), Names(self.image, self.text, self.key)
        check_features(builder, names)
        train = shards_of(builder, self.train_split)
        if self.heldout_split == NONE:
            source = Examples(builder, train, names, image_size)
            return on_side(source, source.key, self.heldout_fraction, split)
        heldout = shards_of(builder, self.heldout_split)
        check_apart(f"splits {self.train_split!r} and {self.heldout_split!r}", train, heldout)
        return Examples(builder, train if split == "train" else heldout, names, image_size)
