"""The embedded data pack: what it holds, that it fits, and what is said when it is missing."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from tfusion.data import packs

FOLDER = Path(packs.__file__).parent


def test_pack_opens_with_named_images_and_alpha():
    pack = packs.open_emoji()
    assert len(pack) == len(pack.meta) == len(pack.offsets) - 1 > 4500
    assert {m["style"] for m in pack.meta} == {"noto", "fluent-emoji", "fluent-emoji-flat"}
    assert not [m["label"] for m in pack.meta if "skin tone" in m["label"]]
    image = pack.image(pack.index("fluent-emoji-flat", "panda"))
    assert image.shape == (64, 64, 4) and image.dtype == np.uint8
    assert image[0, 0, 3] == 0 and image[32, 32, 3] == 255


def test_every_shipped_image_decodes_and_shows_something():
    pack = packs.open_emoji()
    for i in range(0, len(pack), 37):
        image = pack.image(i)
        assert image.shape == (64, 64, 4) and image[..., 3].max() > 100, pack.meta[i]


def test_unknown_label_says_where_to_look():
    with pytest.raises(ValueError, match=r"no emoji labelled 'pand' in style 'noto'"):
        packs.open_emoji().index("noto", "pand")


def test_sprites_fill_their_box_and_are_premultiplied():
    sprites = packs.load_sprites(["panda", "rocket", "banana"], size=14)
    assert sprites.shape == (3, 14, 14, 4) and sprites.dtype == np.float32
    rgb, alpha = sprites[..., :3], sprites[..., 3:]
    assert alpha.min() >= 0 and 0.99 < alpha.max() <= 1 + 1e-6
    assert (rgb <= 255 * alpha + 1e-2).all()
    for sprite in alpha[..., 0]:  # cropped to the alpha box: the longer side touches both edges
        rows, columns = sprite.any(axis=1), sprite.any(axis=0)
        assert (rows[0] and rows[-1]) or (columns[0] and columns[-1])


def test_area_resampling_keeps_the_mean():
    small, large = (packs.load_sprites(["panda"], size=size)[0] for size in (7, 28))
    np.testing.assert_allclose(small.mean((0, 1)), large.mean((0, 1)), rtol=1e-4)


def test_glosses_are_lines_of_english():
    glosses = packs.read_glosses()
    assert len(glosses) == 117_659
    assert glosses[0].startswith("entity (noun): that which is perceived")
    assert all(line and "\n" not in line for line in glosses)


def test_missing_file_names_the_path_and_the_remedy():
    with pytest.raises(FileNotFoundError) as error:
        packs.pack_path("nothing.npz")
    message = str(error.value)
    assert str(FOLDER / "nothing.npz") in message and "\n" not in message
    assert "pip install --force-reinstall ." in message


def test_shipped_files_fit_and_match_the_readme():
    shipped = [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in shipped) <= 12e6
    readme = (FOLDER / "README.md").read_text()
    for name in (packs.EMOJI, packs.GLOSSES, packs.TOKENIZER, "extractor.npz"):
        digest = hashlib.sha256((FOLDER / name).read_bytes()).hexdigest()
        assert f"{digest}  {name}" in readme, f"{name} changed: update its sum in packs/README.md"


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("noto-emoji", "Apache License"),
        ("fluent-emoji", "Copyright (c) Microsoft Corporation"),
        ("emojibase", "Copyright (c) 2017-2019 Miles Johnson"),
        ("unicode", "UNICODE LICENSE V3"),
        ("wordnet", "WordNet 3.0 Copyright 2006 by Princeton University"),
    ],
)
def test_each_source_has_its_licence(name, phrase):
    assert phrase in (FOLDER / "LICENSES" / f"{name}.txt").read_text()
