"""Raw sources: records of text and pictures, as they are before tokenising and encoding.

A record is a list of parts, each a str or a uint8 (H, W, 3) picture, a caption directly before its picture.
An experiment names its sources in data.sources, each by the values of a frozen dataclass that stands, with the
code that reads such a source, in one file of this folder. Every file here is imported, so that registering the
dataclass is all it takes: docs/data.md, "Another kind of source".
"""

import importlib
import pkgutil

from tfusion.data.sources.base import NoPictures, Opened, Source, Unreadable, pictures, records

__all__ = ["NoPictures", "Opened", "Source", "Unreadable", "pictures", "records"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
