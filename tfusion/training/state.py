"""What a training run carries from step to step, created directly in its shards."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tfusion import sharding
from tfusion.objectives.base import Objective


class TrainState(NamedTuple):
    step: Any  # int32 (): optimizer steps done
    params: Any  # float32 master weights
    buffers: Any  # what the objective keeps from step to step; no gradient, optimizer, decay or average
    opt_state: Any
    ema_params: Any  # float32 moving average; None where optimizer.ema_decay = 0


def _create(objective: Objective, tx, ema: bool, key) -> TrainState:
    """The state with every parameter boxed with its logical axes; the optimizer's copies inherit them."""
    params = objective.init(key)
    copy = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, objective.init_buffers(key), tx.init(params), copy)


def abstract_state(objective: Objective, tx, ema: bool) -> TrainState:
    """Shapes, boxed with logical axis names; allocates nothing."""
    return jax.eval_shape(lambda: _create(objective, tx, ema, jax.random.key(0)))


def restore_target(objective: Objective, tx, ema: bool, mesh) -> TrainState:
    """Shapes and shardings without boxes: what a checkpoint is restored into."""
    return sharding.placed(abstract_state(objective, tx, ema), mesh)


def init_state(objective: Objective, tx, ema: bool, seed: int, mesh) -> TrainState:
    """A fresh state, each device computing its own shards."""
    out = sharding.shardings(abstract_state(objective, tx, ema), mesh)
    create = jax.jit(lambda key: nn.meta.unbox(_create(objective, tx, ema, key)), out_shardings=out)
    return create(jax.random.key(seed))


def items(state: TrainState) -> dict:
    """{name: tree}: what a checkpoint holds of a state, apart from its step. Shapes as well as arrays."""
    ema = {} if state.ema_params is None else {"ema": state.ema_params}
    buffers = {"buffers": state.buffers} if jax.tree.leaves(state.buffers) else {}
    return {"params": state.params, "optimizer": state.opt_state, **ema, **buffers}


def from_items(step: int, items: dict, mesh) -> TrainState:
    """The inverse of `items`."""
    step = jax.device_put(np.int32(step), sharding.replicated(mesh))
    return TrainState(step, items["params"], items.get("buffers", {}), items["optimizer"], items.get("ema"))


def sampling_params(state: TrainState):
    """The weights to evaluate and sample with: the moving average where there is one."""
    return state.params if state.ema_params is None else state.ema_params
