"""A run opened for use (trained.py), and what it can do (base.py): one decoder per kind of training. Every file
here is imported, and decoders register themselves."""

import importlib
import pkgutil

from tfusion.inference.base import Decoder, can, decoder, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Decoder", "can", "decoder", "register"]
