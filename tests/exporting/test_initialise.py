"""A run that begins with a Llama: its parameters, its average, and what is said of them."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests import toy
from tfusion import config, sharding
from tfusion.errors import UserError
from tfusion.objectives import make_objective
from tfusion.training.initialise import from_llama
from tfusion.training.optimizer import make_optimizer
from tfusion.training.state import init_state


def test_parameters_and_average_are_the_exports(cfg, run, llama_export, capsys):
    objective, mesh = make_objective(cfg), sharding.parse_mesh(None)
    tx = make_optimizer(cfg.optimizer, cfg.train.num_steps)
    state = from_llama(cfg, init_state(objective, tx, True, 0, mesh), llama_export)
    for tree in (state.params, state.ema_params):
        jax.tree.map(np.testing.assert_array_equal, tree["decoder"], run[1]["ema"]["decoder"])
        jax.tree.map(np.testing.assert_array_equal, tree["image_adapter"], run[1]["ema"]["image_adapter"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"begins with the parameters of {llama_export}" and said[1].endswith(" more")
    assert said[2:] == ["  new: nothing", "  left over: nothing"]


def test_a_kind_without_a_transformer_is_named(llama_export):
    with pytest.raises(UserError, match="a run with objective = 'toy' has no transformer in that form"):
        from_llama(config.from_dict(ConfigDict(toy.get_config())), None, llama_export)
