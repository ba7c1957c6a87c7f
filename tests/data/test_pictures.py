"""Picture files as people have them: upright, on white, in 8 bits; damaged ones end in one line."""

import io
import os
import runpy
import warnings

import numpy as np
import pytest
from PIL import Image

from tfusion.data import pictures
from tfusion.data.pictures import read_picture
from tfusion.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pytest sets aside what pictures.py sets

FORMATS = ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "ICO", "PPM", "TGA", "PCX", "JPEG2000", "SGI", "AVIF",
           "DDS")


def noisy(width=32, height=32):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(path, image, format="PNG", **options):
    image.save(path, format, **options)
    return path


def test_the_middle_square_of_an_ordinary_picture(tmp_path):
    image = noisy(50, 32)
    got = read_picture(saved(tmp_path / "x.png", image), 32)
    assert got.dtype == np.uint8 and got.shape == (32, 32, 3)
    np.testing.assert_array_equal(got, np.asarray(image)[:, 9:41])
    small = read_picture(tmp_path / "x.png", 16)  # the mean over 2 x 2 pixels
    want = np.asarray(image)[:, 9:41].reshape(16, 2, 16, 2, 3).mean((1, 3))
    np.testing.assert_allclose(small, want, atol=1)  # rounded twice, once a side


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_photograph_is_decoded_small_and_looks_the_same(tmp_path, orientation, monkeypatch):
    """A JPEG of many pixels is decoded at a fraction of them, colours at a smaller one: near what all give."""
    image = noisy(20, 15).resize((1600, 1200), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "x.jpg", image, "JPEG", quality=95, exif=exif)
    small, decoded = read_picture(path, 32), []
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *_: decoded.append(1))
    apart = np.abs(small.astype(int) - read_picture(path, 32))
    assert decoded and apart.mean() < 2 and apart.max() < 16


def test_without_a_size_all_of_it(tmp_path):
    image = noisy(50, 32)
    np.testing.assert_array_equal(read_picture(saved(tmp_path / "x.png", image), None), np.asarray(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_held_sideways(tmp_path, orientation):
    """EXIF's eight orientations, each written as the camera would: what comes back is upright."""
    upright = noisy()
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = read_picture(saved(tmp_path / "x.png", stored, exif=exif), 32)
    np.testing.assert_array_equal(got, np.asarray(upright))


def with_holes(mode):
    """Opaque on the left, wholly transparent on the right, where red hides."""
    image = Image.fromarray(np.full((32, 32, 4), (0, 0, 255, 255), np.uint8), "RGBA")
    image.paste((255, 0, 0, 0), (16, 0, 32, 32))
    if mode == "P":  # one colour of the palette is transparent
        image = image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
        image.info["transparency"] = image.getpixel((31, 0))
        return image
    if mode == "RGB":  # PNG's tRNS: one colour is transparent
        image = image.convert("RGB")
        image.info["transparency"] = (255, 0, 0)
        return image
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparent_is_white(tmp_path, mode):
    image = with_holes(mode)
    options = {"transparency": image.info["transparency"]} if "transparency" in image.info else {}
    got = read_picture(saved(tmp_path / "x.png", image, **options), 32)
    assert (got[:, 16:] == 255).all()
    blue = (29, 29, 29) if mode == "LA" else (0, 0, 255)
    assert (got[:, :16] == blue).all()


def test_half_transparent_is_half_white(tmp_path):
    got = read_picture(saved(tmp_path / "x.png", Image.new("RGBA", (8, 8), (0, 0, 0, 128))), 8)
    np.testing.assert_allclose(got, 127, atol=1)


RAMP = np.linspace(0, 65535, 32 * 32).reshape(32, 32)


@pytest.mark.parametrize(("format", "pixels", "top"), [
    ("PNG", RAMP.astype(np.uint16), 65535), ("TIFF", RAMP.astype(np.uint16), 65535),
    ("TIFF", RAMP.astype(np.int32), 65535), ("TIFF", (RAMP / 65535).astype(np.float32), 1),
    ("PPM", RAMP.astype(np.uint16), 65535)], ids=["png16", "tiff16", "tiff32", "float", "pgm16"])
def test_deep_greys_are_scaled(tmp_path, format, pixels, top):
    got = read_picture(saved(tmp_path / "x", Image.fromarray(pixels), format), 32)
    np.testing.assert_allclose(got[..., 0], pixels * (255 / top), atol=0.51)
    assert (got == got[..., :1]).all()


@pytest.mark.parametrize("value", [-0.5, 1.5, 255.0, np.nan, np.inf])
def test_floats_of_no_known_scale_are_one_line(tmp_path, value):
    pixels = np.full((8, 8), 0.5, np.float32)
    pixels[3, 4] = value
    path = saved(tmp_path / "x.tiff", Image.fromarray(pixels), "TIFF")
    with pytest.raises(UserError, match=rf"^{path} holds numbers from .* 0 to 1 is wanted"):
        read_picture(path, 8)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame(tmp_path, format):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("#0000ff", "#ff0000", "#00ff00")]
    options = {"lossless": True} if format == "WEBP" else {}
    saved(tmp_path / "x", frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert (read_picture(tmp_path / "x", 8) == (0, 0, 255)).all()


@pytest.mark.parametrize("format", FORMATS)
def test_a_cut_file_is_one_line(tmp_path, format):
    data = io.BytesIO()
    noisy().save(data, format)
    path = tmp_path / "picture"
    for share in (0.0, 0.02, 0.3, 0.6):
        path.write_bytes(data.getvalue()[: int(share * len(data.getvalue()))])
        with pytest.raises(UserError, match=f"^{path} cannot be read as a picture"):
            read_picture(path, 32)


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_bytes_are_a_picture_or_one_line(tmp_path, format):
    """Bytes overwritten at random: what Pillow raises then is of many kinds, none of them reaches the user."""
    data, rng = io.BytesIO(), np.random.default_rng(1)
    noisy().save(data, format)
    path = tmp_path / "picture"
    for _ in range(12):
        damaged = bytearray(data.getvalue())
        for at in rng.integers(0, min(len(damaged), 200), 6):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            assert read_picture(path, 32).shape == (32, 32, 3)
        except UserError as e:
            assert str(e).startswith(str(path))


def test_a_bomb_is_one_line(tmp_path):
    image = io.BytesIO()
    Image.new("1", (20000, 20000)).save(image, "PNG")
    (tmp_path / "x.png").write_bytes(image.getvalue())
    with pytest.raises(UserError, match="DecompressionBomb"):
        read_picture(tmp_path / "x.png", 8)


def test_no_file_and_no_picture(tmp_path):
    for path, words in ((tmp_path / "none.png", "cannot be read: No such file"),
                        (tmp_path, "cannot be read: it is no file")):
        with pytest.raises(UserError, match=f"^{path} {words}"):
            read_picture(path, 8)
    (tmp_path / "x.png").write_text("not a picture")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        read_picture(tmp_path / "x.png", 8)


def test_what_would_be_executed_is_not_opened(tmp_path, monkeypatch):
    """Pillow hands EPS files to Ghostscript, whatever they are called."""
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path / 'executed'}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")
    eps = (tmp_path / "x.eps").rename(tmp_path / "cat.png")
    for content in (None, eps.read_bytes()):
        with pytest.raises(UserError, match="cannot be read as a picture"):
            read_picture(eps, 8, content)
    assert not (tmp_path / "executed").exists()


def test_filters_of_warnings_are_set_once_and_for_pillow_alone(tmp_path, monkeypatch):
    """They are the whole process's: set and put back by several threads, `ignore` would stay for all."""
    path, seen, real = saved(tmp_path / "x.png", noisy()), [], Image.open
    monkeypatch.setattr(Image, "open",
                        lambda file, **more: seen.append(list(warnings.filters)) or real(file, **more))
    read_picture(path, 8)
    assert seen == [list(warnings.filters)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runpy.run_path(pictures.__file__)
        warnings.warn_explicit("odd", UserWarning, "x.py", 1, module="PIL.TiffImagePlugin")
        with pytest.raises(UserWarning):
            warnings.warn_explicit("odd", UserWarning, "x.py", 1, module="tfusion.data")
