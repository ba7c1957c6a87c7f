"""Image tokenizers, one file a kind: every file here is imported, and registers itself; `load` opens whichever
a file on disk holds."""

import importlib
import pkgutil

from tfusion.models.codecs.base import Codec, fingerprint, load, num_codes

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Codec", "fingerprint", "load", "num_codes"]
