"""A folder of labelled pictures, as experiments/own_data.py reads it."""

import io

import numpy as np
import pytest
from PIL import Image

from tfusion.data.sources.folder import FolderSource
from tools.make_photo_folder import write

LABELS = np.array(["owl", "frog", "frog", "owl", "frog", "owl"])
IMAGES = np.stack([np.full((8, 8, 3), 40 * i, np.uint8) for i in range(6)])


def files() -> dict:
    """The images as JPEG files end to end."""
    encoded = []
    for image in IMAGES:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=95)
        encoded.append(buffer.getvalue())
    return {"data": np.frombuffer(b"".join(encoded), np.uint8), "offsets": np.cumsum([0, *map(len, encoded)])}


@pytest.mark.parametrize("arrays", [{"images": IMAGES}, files()], ids=["images", "files"])
def test_as_many_of_each_label(arrays, tmp_path):
    np.savez(tmp_path / "x.npz", labels=LABELS, **arrays)
    assert write(tmp_path / "x.npz", tmp_path / "photos", 4) == 4
    records = FolderSource("folder", 1.0, str(tmp_path / "photos"), 0.0).open("train", 8)
    assert [(caption, int(picture.mean() / 40 + 0.5)) for caption, picture in records] == [
        ("a photo of an owl", 0), ("a photo of a frog", 1), ("a photo of a frog", 2), ("a photo of an owl", 3)]
    with pytest.raises(FileExistsError):
        write(tmp_path / "x.npz", tmp_path / "photos", 4)
