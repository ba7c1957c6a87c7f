"""Picture files as people have them, read as uint8 pixels."""

import errno
import functools
import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tfusion.errors import UserError

WHITE = (255, 255, 255, 255)
# Not all that Pillow knows: for an EPS file it starts Ghostscript, which runs what stands in it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd files; here, for filters are the whole process's


@functools.cache
def _formats() -> list[str]:
    """Those that this Pillow has; AVIF is a newer one's. Its plugins are many: loaded for the first picture."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def read_picture(path: str | Path, size: int | None, content: bytes | None = None) -> np.ndarray:
    """The first frame of a picture file, or of a file's content (then `path` only says where it stands),
    upright, its largest centred square resized to uint8 (size, size, 3); without a size all of it, uint8
    (H, W, 3).

    What is transparent shows white. Greys of 16 bits and floats in 0..1 are scaled to 8 bits. Raises UserError,
    naming the file, where it cannot be read, is cut or damaged, or holds numbers whose scale is not known.
    """
    file = path if content is None else io.BytesIO(content)
    try:
        if content is None and not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "it is no file")  # to read from a pipe would never end
        with Image.open(file, formats=_formats()) as image:
            if size:  # a JPEG can be decoded at 1/2, 1/4 or 1/8, which is several times faster
                image.draft(None, (2 * size, 2 * size))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            image = _eight_bits(image, path)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
            if image.mode != "RGB":  # Pillow copies where there is nothing to do, here and below
                image = image.convert("RGB")
            return _square(image, size) if size else np.asarray(image)
    except UserError:
        raise
    except Exception as e:  # Pillow's decoders raise whatever they stumble over, of a dozen kinds
        if isinstance(e, OSError) and e.strerror:  # the file, not what is in it
            raise UserError(f"{path} cannot be read: {e.strerror}") from e
        raise UserError(f"{path} cannot be read as a picture ({type(e).__name__}: {e}): it is damaged, too "
                        f"large, or none of {', '.join(FORMATS)}; save it anew, as PNG or JPEG") from e


def _square(image: Image.Image, size: int) -> np.ndarray:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size != (side, side):
        image = image.crop((left, top, left + side, top + side))
    return np.asarray(image if side == size else image.resize((size, size), Image.Resampling.BOX))


def _eight_bits(image: Image.Image, path) -> Image.Image:
    """Greys of more than 8 bits as mode L; other pictures as they are. Pillow would cut them off at 255."""
    if not image.mode.startswith(("I", "F")):
        return image
    x = np.asarray(image).astype(np.float64)
    top = 1.0 if image.mode == "F" else 65535.0  # 16-bit files come as I;16, and some as I
    if not (x.min() >= 0 and x.max() <= top):  # NaN is neither
        raise UserError(f"{path} holds numbers from {x.min():g} to {x.max():g}, 0 to {top:g} is wanted: save "
                        "it as an 8-bit picture")
    return Image.fromarray(np.round(x * (255 / top)).astype(np.uint8))
