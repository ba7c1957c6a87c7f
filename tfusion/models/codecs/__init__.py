"""Image tokenizers, one file a kind; `load` opens whichever a file holds."""

from tfusion.models.codecs import kl  # noqa: F401 (registers)
from tfusion.models.codecs.base import Codec, load  # noqa: F401
