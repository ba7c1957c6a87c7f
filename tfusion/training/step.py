"""The training step: pure, jitted, its state donated. And the evaluation and diagnostics beside it.

Losses are (sum, count). The counts are summed over the whole global batch first; then every micro-batch
contributes weight * sum / count, so any split into micro-batches or devices gives the same total.
"""

import jax
import jax.numpy as jnp
import optax

from tfusion.objectives.base import Aux, Objective
from tfusion.training.state import TrainState

EVAL_SEED, EVAL_STREAM = 0, 2**31 - 1  # of held-out noise, in place of the run's seed and of a step


def noise_key(seed: int, step):
    """The key of one step's noise; threefry, so that draws depend on no mesh."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)


def eval_key():
    """The key of held-out noise: the same at every evaluation of every run, whatever its seed."""
    return noise_key(EVAL_SEED, EVAL_STREAM)


def weighted_total(objective: Objective, params, aux: Aux, batch, counts, key):
    """(sum of weight * loss sum / global count, the losses themselves)."""
    losses = objective.loss(params, aux, batch, key)
    total = sum(weight * losses[name][0] / jnp.maximum(counts[name], 1)
                for name, weight in objective.weights.items())
    return total, losses


def split_microbatches(batch, num_microbatches: int):
    """(B, ...) -> (M, B / M, ...), strided so that every device keeps its own rows. An axis may be empty."""
    return jax.tree.map(
        lambda x: x.reshape(len(x) // num_microbatches, num_microbatches, *x.shape[1:]).swapaxes(0, 1), batch)


def gradients(objective: Objective, params, aux: Aux, batch, key, num_microbatches: int):
    """(gradients of the weighted total, {name: (sum, count)} over the whole batch)."""
    counts = objective.counts(batch)

    def one(micro):
        grad = jax.grad(lambda p: weighted_total(objective, p, aux, micro, counts, key), has_aux=True)
        return grad(params)

    if num_microbatches == 1:
        return one(batch)
    micros = split_microbatches(batch, num_microbatches)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                         jax.eval_shape(one, jax.tree.map(lambda x: x[0], micros)))
    total, _ = jax.lax.scan(lambda sums, micro: (jax.tree.map(jnp.add, sums, one(micro)), None),
                            zeros, micros)
    return total


def make_train_step(objective: Objective, tx: optax.GradientTransformation, cfg):
    """step(state, frozen, batch) -> (state, {name: (sum, count)})."""
    decay, skipping = cfg.optimizer.ema_decay, cfg.train.nonfinite == "skip"

    def train_step(state: TrainState, frozen, batch):
        key, aux = noise_key(cfg.seed, state.step), Aux(state.step, frozen, state.buffers)
        grads, losses = gradients(objective, state.params, aux, batch, key, cfg.train.num_microbatches)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema_params
        if ema is not None:
            warm = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
            ema = jax.tree.map(lambda e, p: e + (1 - warm) * (p - e), ema, params)
        metrics = {**losses, "grad_norm": (optax.global_norm(grads), 1),
                   "param_norm": (optax.global_norm(params), 1)}
        buffers = objective.after_update(params, state.buffers, batch, key)
        after = TrainState(state.step + 1, params, buffers, opt_state, ema)
        return skip_nonfinite(state, after, metrics) if skipping else (after, metrics)

    return train_step


def skip_nonfinite(before: TrainState, after: TrainState, metrics):
    """(the state after a step, metrics): where one of its losses or its gradient is not finite, the state as it
    was before, its step counted, by the learning rate's schedule too, and metrics that count nothing.
    `skipped_steps`: (0 or 1, 1)."""
    seen = [total for name, (total, _) in metrics.items() if name != "param_norm"]  # else two copies of params
    finite = jnp.all(jnp.array([jnp.isfinite(total) for total in seen]))

    def kept(new, old):
        return jnp.where(finite, new, old)

    def counts(x):
        return isinstance(x, optax.ScaleByScheduleState)

    metrics = {name: (kept(total, 0), kept(count, 0)) for name, (total, count) in metrics.items()}
    state = jax.tree.map(lambda new, old: new if counts(new) else kept(new, old), after, before, is_leaf=counts)
    state = state._replace(step=after.step)
    return state, {**metrics, "skipped_steps": (1 - finite.astype(jnp.int32), 1)}


def jit_train_step(objective: Objective, tx: optax.GradientTransformation, cfg, state: TrainState):
    """make_train_step for states placed as this one (arrays, or shapes with shardings): the state is donated
    and stays where it is, so that one program serves every step."""
    place = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(make_train_step(objective, tx, cfg), donate_argnums=0, out_shardings=(place, None))


def make_eval_step(objective: Objective):
    """eval(params, aux, batch) -> {name: (sum, count)} on fixed noise."""
    return lambda params, aux, batch: objective.loss(params, aux, batch, eval_key())


def make_diagnostics(objective: Objective):
    """diagnostics(params, aux, batch) -> {loss name: norm of its weighted gradient}; never in the hot step."""

    def diagnostics(params, aux, batch):
        counts, key = objective.counts(batch), eval_key()

        def norm(name):
            alone = objective._replace(weights={name: objective.weights[name]})
            return optax.global_norm(
                jax.grad(lambda p: weighted_total(alone, p, aux, batch, counts, key)[0])(params))

        return {name: norm(name) for name in objective.weights}

    return diagnostics
