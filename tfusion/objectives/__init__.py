"""One file per kind of training; a config's `objective` names it. Every module here is imported, and registers
itself: a new kind is a new file."""

import importlib
import pkgutil

from tfusion import sharding
from tfusion.config import RunConfig
from tfusion.objectives.base import KINDS, Kind, Objective

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def kind_of(cfg: RunConfig) -> Kind:
    return KINDS[cfg.objective]


def make_objective(cfg: RunConfig) -> Objective:
    return kind_of(cfg).make(cfg)


def check_mesh(cfg: RunConfig, mesh) -> None:
    """Raises UserError where rows, or a transformer, do not divide over the mesh."""
    sharding.check_batch_size(cfg.train.batch_size, cfg.train.num_microbatches, mesh)
    trunk = kind_of(cfg).trunk(cfg)
    if trunk:
        sharding.check_length(trunk.seq_len, mesh)
        sharding.check_heads(trunk.model.num_kv_heads, mesh)
