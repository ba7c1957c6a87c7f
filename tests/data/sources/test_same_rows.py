"""One folder of pictures, as it is, as TensorFlow Datasets writes it, and in ArrayRecord: the same rows."""

import numpy as np

from tests.conftest import fake_encode, replace
from tests.data.sources import test_array_record, test_tfds
from tests.test_prepare import Codec, verb
from tfusion.data.heldout import HeldOut
from tfusion.data.sources.array_record import ArrayRecordSource
from tfusion.data.sources.folder import FolderSource
from tfusion.data.sources.tfds import TfdsSource
from tfusion.data.tokenizers import ByteTokenizer
from tfusion.models.codecs import base
from tfusion.objectives import kind_of

FRACTION = 0.2


class Means(Codec):
    image_size, shape = 32, (4, 4, 4)

    def encode(self, images):
        return fake_encode(images)


def as_folder(photos, root):
    return FolderSource("folder", 1.0, str(photos), FRACTION)


def as_tfds(photos, root):
    items = FolderSource("folder", 1.0, str(photos), 0.0).open("train").items
    path = test_tfds.write(root, 3, train=[
        {"key": item.key, "image": (photos / item.file).read_bytes(),
         "text": (photos / item.caption).read_text() if item.caption else ""} for item in items])
    return TfdsSource("tfds", 1.0, str(path), "train", "none", FRACTION, "image", "text", "key")


def as_array_record(photos, root):
    return ArrayRecordSource("array_record", 1.0, str(test_array_record.write_photos(photos, root)), "none",
                             FRACTION)


def test_the_same_pictures_make_the_same_rows(photos, cfg, tmp_path, monkeypatch):
    """Prepared and packed: the digests that a resumed run compares, the rows themselves, the held-out ones."""
    monkeypatch.setitem(base.CODECS, "fake", Means)
    found = {}
    for make in (as_folder, as_tfds, as_array_record):
        root = tmp_path / make.__name__
        own = replace(cfg, "data", prepared=str(root / "data"), image_share=0.4, window_rows=8, seq_len=96,
                      sources={"photos": make(photos, root / "raw")})
        verb.prepare(own.rows, ByteTokenizer(), verb.Unfitted(32, "of the run", Means), (0, 1), 0.0)
        rows = kind_of(own).open_rows(own)
        held = HeldOut(own.rows, "photos")
        found[make.__name__] = rows.identity, [*rows.read(range(24)), held[0]]
    identity, wanted = found.pop("as_folder")
    assert identity.keys() == {"tokenizer", "codec", "sizes.photos", "order"}
    assert sum((row.image_start_BI < 96).sum() for row in wanted[:8]) > 15
    for other, rows in found.values():
        assert other == identity
        for a, b in zip(wanted, rows, strict=True):
            for name, x, y in zip(a._fields, a, b):
                np.testing.assert_array_equal(x, y, err_msg=name)
