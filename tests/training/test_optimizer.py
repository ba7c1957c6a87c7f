"""The optimizer: what decays, the learning rate's course, and AdamW against its formulas in numpy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests import toy
from tfusion import config, sharding
from tfusion.config import OptimizerConfig
from tfusion.objectives import make_objective
from tfusion.training import loop, optimizer

CFG = OptimizerConfig(learning_rate=1e-2, warmup_steps=4, decay_steps=0, b2=0.95, weight_decay=0.1,
                      ema_decay=0.0)
STEPS = 20


def decaying(params):
    """Names of the parameters that decay."""
    flags = jax.tree_util.tree_leaves_with_path(optimizer.decays(params))
    return {"/".join(key.key for key in path if hasattr(key, "key")) for path, flag in flags if flag}


def params_of(cfg):
    return jax.eval_shape(make_objective(cfg).init, jax.random.key(0))


def test_matrices_and_embeddings_decay_biases_and_norm_scales_do_not():
    names = ("time_in_kernel", "token_embedding", "patch_position_embedding", "kernel", "embedding",
             "time_in_bias", "bias", "attention_norm_scale", "scale", "kernel_scale", "embedding_bias")
    params = {"a": {name: jnp.zeros((2, 2)) for name in names}}  # all of one shape: the name decides
    assert decaying(params) == {f"a/{name}" for name in names[:5]}


def test_what_decays_in_the_model(cfg):
    boxed = params_of(cfg)
    block = "decoder/blocks/"
    want = {block + f"attention/{name}_kernel" for name in ("wq", "wk", "wv", "wo")}
    want |= {block + f"mlp/{name}_kernel" for name in ("gate", "up", "down")}
    want |= {f"image_adapter/{name}_kernel" for name in ("time_in", "time_out", "patch_in", "patch_out")}
    want |= {"token_embedding", "lm_head_kernel"}
    if cfg.model.adapter.patch_positions == "learned":
        want |= {"image_adapter/patch_position_embedding"}
    assert decaying(boxed) == decaying(nn.meta.unbox(boxed)) == want
    scanned = nn.meta.unbox(boxed)["decoder"]["blocks"]["attention_norm_scale"]
    assert scanned.shape == (cfg.model.num_layers, cfg.model.d_model)  # two axes, and yet no decay


PLATEAU = dataclasses.replace(CFG, decay_steps=5)


@pytest.mark.parametrize("num_steps", [STEPS, 40])
def test_with_decay_steps_there_is_a_plateau_and_a_line_at_the_end(num_steps):
    """Until it decays the rate does not know how long the run is."""
    for step in range(num_steps):
        done, left = step + 1, num_steps - step - 1
        want = 1e-2 * min(done / 4, 1.0, 0.05 + 0.95 * left / 5)
        assert lr(step, PLATEAU, num_steps) == pytest.approx(want, rel=1e-5), step
    assert lr(num_steps - 1, PLATEAU, num_steps) == pytest.approx(5e-4)


def test_a_plateau_without_warm_up_begins_at_the_peak():
    assert lr(0, dataclasses.replace(PLATEAU, warmup_steps=0)) == pytest.approx(1e-2)


def test_one_plateau_decays_at_several_lengths(tmp_path):
    """A branch of a longer run is, bit by bit, the run of its length."""
    def train(name: str, num_steps: int, branch_from: str = "none"):
        tree = toy.get_config()
        tree["optimizer"]["decay_steps"] = 20
        tree["train"] |= dict(num_steps=num_steps, branch_from=branch_from, checkpoint_every=20, eval_every=0,
                              diagnostics_every=0, keep_last=9)
        cfg = config.from_dict(tree)
        mesh = sharding.make_mesh(config.MeshConfig(1, 1, 1, 1), jax.devices()[:1])
        with jax.set_mesh(mesh):
            return jax.device_get(loop.train(cfg, tmp_path / name, mesh)).params

    train("long", 60)
    branch = train("branch", 40, f"{tmp_path}/long/checkpoints/20")
    jax.tree.map(np.testing.assert_array_equal, branch, train("alone", 40))


def lr(step, cfg=CFG, num_steps=STEPS):
    return float(optimizer.learning_rate_schedule(cfg, num_steps)(step))


def test_learning_rate_warms_up_peaks_and_ends_at_five_percent():
    for step in range(STEPS):
        done = step + 1
        if done <= 4:
            want = 1e-2 * done / 4
        else:
            cosine = 0.5 * (1 + math.cos(math.pi * (done - 4) / (STEPS - 4)))
            want = 1e-2 * (0.05 + 0.95 * cosine)
        assert lr(step) == pytest.approx(want, rel=1e-5), step
    assert max(map(lr, range(STEPS))) == lr(3) == pytest.approx(1e-2)
    assert lr(STEPS - 1) == lr(STEPS + 100) == pytest.approx(5e-4)


def test_learning_rate_without_warm_up_and_in_a_run_shorter_than_it():
    none = OptimizerConfig(1e-2, 0, 0, 0.95, 0.1, 0.0)
    assert lr(0, none) == pytest.approx(1e-2, rel=0.01) and lr(STEPS - 1, none) == pytest.approx(5e-4)
    assert [lr(step, CFG, 2) for step in (0, 1)] == pytest.approx([2.5e-3, 5e-3])


def updates(grads, params, cfg=CFG):
    """Parameters after each gradient in turn."""
    tx = optimizer.make_optimizer(cfg, STEPS)
    state, out = tx.init(params), []
    for grad in grads:
        change, state = tx.update(grad, state, params)
        params = jax.tree.map(jnp.add, params, change)
        out.append(jax.device_get(params))
    return out


def adamw(grads, params, cfg=CFG):
    """The same by the formulas: clip the global norm at 1, Adam with bias correction, decoupled decay."""
    params = {k: np.asarray(v, np.float64) for k, v in params.items()}
    m, v, out = dict.fromkeys(params, 0.0), dict.fromkeys(params, 0.0), []
    for t, grad in enumerate(grads, start=1):
        norm = math.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in grad.values()))
        rate = cfg.learning_rate * t / cfg.warmup_steps
        for name in params:
            g = np.asarray(grad[name], np.float64) / max(1.0, norm)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = cfg.b2 * v[name] + (1 - cfg.b2) * g**2
            step = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - cfg.b2**t)) + 1e-8)
            decay = cfg.weight_decay if name.endswith("kernel") else 0.0
            params[name] = params[name] - rate * (step + decay * params[name])
        out.append(dict(params))
    return out


def test_adamw_is_its_formula():
    rng = np.random.default_rng(0)
    params = {"w_kernel": rng.normal(size=(3, 2)), "w_bias": rng.normal(size=2)}
    params = {k: v.astype(np.float32) for k, v in params.items()}
    grads = [{k: (scale * rng.normal(size=v.shape)).astype(np.float32) for k, v in params.items()}
             for scale in (0.1, 5.0, 0.01)]  # below the clip, above it, below it
    for ours, theirs in zip(updates(grads, params), adamw(grads, params)):
        for name in params:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-7)


def test_the_first_step_moves_and_without_a_gradient_only_decay_does():
    params = {"w_kernel": jnp.ones(3), "w_bias": jnp.ones(3)}
    one = updates([{k: jnp.full(3, 0.5) for k in params}], params)[0]
    np.testing.assert_allclose(one["w_bias"], 1 - 1e-2 / 4, rtol=1e-6)  # Adam's first step is the rate
    none = updates([{k: jnp.zeros(3) for k in params}], params)[0]
    np.testing.assert_allclose(none["w_kernel"], 1 - 1e-2 / 4 * 0.1, rtol=1e-6)
    np.testing.assert_array_equal(none["w_bias"], 1)


def test_the_norm_of_all_gradients_together_is_clipped_at_one():
    """Seen after a second step: what a single Adam step does hardly depends on the gradient's size."""
    params = {"a_bias": jnp.zeros(1), "b_bias": jnp.zeros(1)}

    def after(first):
        grads = [dict.fromkeys(params, jnp.full(1, first)), dict.fromkeys(params, jnp.full(1, 0.1))]
        return updates(grads, params)[-1]["a_bias"]

    at_one = 1 / math.sqrt(2)  # of two gradients: their norm is 1
    np.testing.assert_allclose(after(100.0), after(at_one), rtol=1e-5)
    assert abs(after(0.5 * at_one) - after(at_one)) > 1e-4
