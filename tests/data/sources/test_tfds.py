"""Data sets that TensorFlow Datasets wrote, read and written without TensorFlow."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.data.sources.conftest import same
from tests.data.sources.test_array_record import greys, picture
from tfusion.data.sources import records, shards
from tfusion.data.sources.folder import FolderSource
from tfusion.data.sources.tfds import TfdsSource
from tfusion.errors import UserError

ALL = {"image": "image", "text": "text", "key": "key"}
NUMBERS = [{"key": f"key {i}", "image": picture(i), "text": f"a photo of {i}", "number": i, "tags": ["a", "b"]}
           for i in range(12)]


class Given(tfds.core.GeneratorBasedBuilder):
    """Whatever examples it is given, in their order."""

    __module__ = "given"  # as of a script: for one in a folder without __init__, TFDS asks for another library
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, examples: dict, **options):
        self.examples = examples
        super().__init__(**options)

    def _info(self):
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict({
            "key": text, "image": tfds.features.Image(), "text": text, "number": tfds.features.Scalar(np.int64),
            "tags": tfds.features.Sequence(text)})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(some) for split, some in self.examples.items()}

    def _generate_examples(self, examples):
        yield from enumerate({"number": 0, "tags": [], **example} for example in examples)


def write(folder, num_shards=1, **examples):
    builder = Given(examples, data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=num_shards))
    return builder.data_dir


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """Twelve examples over three files, and four more in a split of their own."""
    return write(tmp_path_factory.mktemp("numbers"), 3, train=NUMBERS, validation=NUMBERS[:4])


def open_it(path, split="train", image_size=4, train="train", heldout="none", fraction=0.0, **names):
    spec = TfdsSource("tfds", 1.0, str(path), train, heldout, fraction, **{**ALL, **names})
    return spec.open(split, image_size)


def read(path, split="train", **options):
    return list(records(open_it(path, split, **options), "pairs"))


@pytest.mark.parametrize("size", [None, 16])
def test_the_same_documents_as_the_folder(photos, tmp_path, size):
    items = FolderSource("folder", 1.0, str(photos), 0.0).open("train").items
    path = write(tmp_path, 3, train=[
        {"key": item.key, "image": (photos / item.file).read_bytes(),
         "text": (photos / item.caption).read_text() if item.caption else ""} for item in items])
    for split in ("train", "heldout"):
        wanted = FolderSource("folder", 1.0, str(photos), 0.3).open(split, size)
        found = open_it(path, split, size, fraction=0.3)
        assert len(found) == len(wanted) > 3
        assert all(same(found[i], wanted[i]) for i in range(len(wanted)))


def test_features_by_their_names(numbers):
    assert greys(read(numbers))[:4] == ["a photo of 0", 0, "a photo of 1", 1]
    assert greys(read(numbers, image="none")) == [f"a photo of {i}" for i in range(12)]
    assert greys(read(numbers, text="none", key="none")) == list(range(12))
    assert greys(read(numbers, text="key"))[:2] == ["key 0", 0]
    assert read(numbers, image_size=None)[0][1].shape == (6, 8, 3)


def test_splits_by_their_names(numbers, monkeypatch):
    """Records are not read for it."""
    monkeypatch.setattr(shards.Shards, "__getitem__", lambda self, record: pytest.fail("read at opening"))
    sides = [open_it(numbers, split, train="train[:75%]", heldout="train[10:]", text="none")
             for split in ("train", "heldout")]
    sides += [open_it(numbers, "heldout", heldout="validation", text="none")]
    monkeypatch.undo()
    assert [greys(records(side, "x")) for side in sides] == [list(range(9)), [10, 11], [0, 1, 2, 3]]
    assert len(open_it(numbers, "heldout")) == 0


def test_held_out_by_the_key(numbers):
    by_key = [set(greys(read(numbers, split, fraction=0.3, text="none"))) for split in ("train", "heldout")]
    assert by_key[0] | by_key[1] == set(range(12)) and not by_key[0] & by_key[1] and 0 < len(by_key[1]) < 9
    by_number = [set(greys(read(numbers, split, fraction=0.3, text="none", key="number")))
                 for split in ("train", "heldout")]
    by_place = [set(greys(read(numbers, split, fraction=0.3, text="none", key="none")))
                for split in ("train", "heldout")]
    assert by_key[1] != by_number[1] != by_place[1] and by_place[0] | by_place[1] == set(range(12))


def test_tensorflow_is_not_imported_even_where_it_is_installed(numbers, tmp_path):
    """Nor is TFDS, where another source is read: it takes a second."""
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow is imported')")
    code = ("import sys, tfusion.data.config\nassert 'tensorflow_datasets' not in sys.modules\n"
            "from tfusion.data.sources.tfds import TfdsSource\n"
            f"s = TfdsSource('tfds', 1.0, {str(numbers)!r}, 'train', 'none', 0.3, 'image', 'text', 'key')\n"
            "print(len(s.open('train', 4)[0]))")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout == "2\n", done.stderr


def test_one_bad_record_stops_nothing(tmp_path, capsys):
    path = write(tmp_path, train=[
        NUMBERS[0], {"key": "b", "image": b"no picture", "text": "a fox"},
        {"key": "c", "image": b"", "text": "a"}, {"key": "d", "image": picture(4), "text": b"F\xfcchsin"},
        {"key": b"\xe9", "image": picture(5), "text": " \n"},
        {"key": "f", "image": picture()[:40], "text": "cut"}, NUMBERS[6]])
    assert greys(read(path)) == ["a photo of 0", 0, 5, "a photo of 6", 6]
    err = capsys.readouterr().err
    assert "4 of 7 records cannot be read and are left out" in err
    assert "array_record-00000-of-00001, record 1 cannot be read as a picture" in err
    assert "record 3: text is not UTF-8 (byte 1)" in err
    assert greys(read(path, image="none", train="train[4:5]+train[6:]")) == ["a photo of 6"]
    assert "record 4: text is blank" in capsys.readouterr().err
    assert len(read(path, fraction=0.5)) + len(read(path, "heldout", fraction=0.5)) == 3  # each has a side


def test_many_examples_from_several_threads_in_their_order(numbers):
    source = open_it(numbers, train="+".join(["train"] + ["validation", "train"] * 3), text="none")
    assert greys(records(source, "x")) == [*range(12), *([*range(4), *range(12)] * 3)]


def copied(numbers, folder):
    return shutil.copytree(numbers, folder / "1.0.0")


def without_a_shard(folder):
    os.remove(folder / "given-train.array_record-00001-of-00003")


def cut_shard(folder):
    path = folder / "given-train.array_record-00001-of-00003"
    path.write_bytes(path.read_bytes()[:-7])


def shorter_shard(folder):
    """Whole, but written by another run."""
    shutil.copy(folder / "given-validation.array_record-00000-of-00003",
                folder / "given-train.array_record-00001-of-00003")


def without_info(folder):
    os.remove(folder / "dataset_info.json")


def broken_info(folder):
    (folder / "dataset_info.json").write_text("{")


def foreign_class(folder):
    path = folder / "features.json"
    named = "tensorflow_datasets.core.features.text_feature.Text"
    assert named in path.read_text()
    path.write_text(path.read_text().replace(named, "this.Text"))  # importing it prints the Zen of Python


def tfrecord(folder):
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (folder / "dataset_info.json").write_text(json.dumps(info))


ERRORS = {
    "missing shard": (without_a_shard, {}, r"record-00001-of-00003 is missing, of split 'train' 1 of 3"),
    "cut shard": (cut_shard, {}, r"record-00001-of-00003 is no whole ArrayRecord file \("),
    "short shard": (shorter_shard, {}, r"record-00001-of-00003 has 1 records, 4 are wanted: bring "),
    "no data set": (without_info, {}, r"1.0.0 holds no data set of TensorFlow Datasets \(.*name the "),
    "a class of others": (foreign_class, {}, r"features.json names the class this.Text, and opening it would"),
    "broken": (broken_info, {}, r"1.0.0 holds no data set of TensorFlow Datasets \("),
    "tfrecord": (tfrecord, {}, r"is written as tfrecord, .*write it anew with file_format='array_record'"),
    "no such split": (None, {"train": "test"}, r"no split 'test' \(.*; it has train, validation"),
    "no split at all": (None, {"heldout": "train[:"}, r"1.0.0: no split 'train\[:' \("),
    "no such feature": (None, {"text": "caption"}, r"text = 'caption', a Text is needed; it has .*text \(T"),
    "no text": (None, {"text": "image"}, r"text = 'image', a Text is needed; it has .*image \(Image\)"),
    "a number": (None, {"text": "number"}, r"text = 'number', a Text is needed"),
    "no picture": (None, {"image": "text"}, r"image = 'text', an Image is needed"),
    "several texts": (None, {"text": "tags"}, r"text = 'tags', a Text is needed; it has .*tags \(Sequence\)"),
    "no key": (None, {"key": "tags"}, r"key = 'tags', a Text or a number is needed"),
    "both sides": (None, {"heldout": "train[3:4]"}, r"'train\[3:4\]': records of .* are held out and train"),
}


@pytest.mark.parametrize("break_it, options, message", ERRORS.values(), ids=ERRORS)
def test_mistakes_are_one_line(numbers, tmp_path, break_it, options, message):
    folder = copied(numbers, tmp_path)
    if break_it:
        break_it(folder)
    with pytest.raises(UserError, match=message) as error:
        read(folder, **options)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nope holds no data set of TensorFlow Datasets"):
        read(tmp_path / "nope")


@pytest.mark.parametrize("change, message", [
    (dict(heldout_split="test", heldout_fraction=0.1), r"^x.heldout_split = 'test' and x.heldout_fraction"),
    (dict(image="none", text="none"), r"^x.image and x.text are both 'none': name a feature")])
def test_specs_that_say_too_much_or_nothing(change, message):
    spec = dict(kind="tfds", share=1.0, path="a", train_split="train", heldout_split="none",
                heldout_fraction=0.0)
    with pytest.raises(UserError, match=message):
        TfdsSource(**{**spec, **ALL, **change}).check("x")
