"""Pictures with captions as people have them, in a folder."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """24 of them, of several sizes and kinds; one has no caption, one blanks around it."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(24):
        pixels = rng.integers(0, 256, (20 + i, 30, 3 + (i % 5 == 0)), np.uint8)
        name = f"{i:02d}" + (".png" if i % 2 == 0 else ".jpg")
        picture = Image.fromarray(pixels if name.endswith("png") else pixels[..., :3])
        exif = Image.Exif()
        exif[0x0112] = 6  # lies on its side
        picture.save(root / name, exif=exif)
        if i != 7:
            (root / f"{i:02d}.txt").write_text(f"  Füchsin 🦊 {i}\n" if i == 3 else f"a photo of {i}")
    return root


def same(a: list, b: list) -> bool:
    """Two records, part by part, to the last bit."""
    return [type(x) for x in a] == [type(x) for x in b] and all(
        x == y if isinstance(x, str) else x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b))
