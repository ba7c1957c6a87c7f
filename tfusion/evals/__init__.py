"""Everything that is measured of a trained run: one file per evaluator (base.py). All that stand here count."""

import importlib
import pkgutil


def find() -> None:
    """Imports every module of this folder: an evaluator registers itself."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


find()
