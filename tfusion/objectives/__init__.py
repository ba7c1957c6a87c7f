"""One file per objective; `make_objective` picks it by the name in the config."""

from tfusion.config import Config
from tfusion.objectives import autoencoder, transfusion
from tfusion.objectives.base import Objective

OBJECTIVES = {"transfusion": transfusion.make, "autoencoder": autoencoder.make}


def make_objective(cfg: Config) -> Objective:
    return OBJECTIVES[cfg.objective](cfg)
