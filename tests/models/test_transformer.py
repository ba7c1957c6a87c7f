"""The decoder's options against their formulas in float64, alone, cached and on a mesh; and how large things
are at the start.

B rows, T positions, D d_model, H heads, K kv_heads, E head_dim.
"""

import dataclasses
import functools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tfusion import sharding
from tfusion.config import MeshConfig
from tfusion.errors import UserError
from tfusion.inference import cache
from tfusion.models import llama, transformer
from tfusion.models.language import LanguageConfig, LanguageModel
from tfusion.models.masks import row_sight
from tfusion.training.optimizer import decays

CFG = LanguageConfig(num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, d_ff=24, qk_norm="none",
                     norm_order="pre", remat="none", compute_dtype="float32", text_vocab_size=30)
B, T = 4, 16
OPTIONS = [("none", "pre"), ("layernorm", "pre"), ("none", "post"), ("layernorm", "post")]
SEGMENTS = np.repeat([[1] * 7 + [2] * 6 + [0] * 3], B, axis=0)
POSITIONS = np.repeat([[*range(7), *range(6), *[0] * 3]], B, axis=0)
TOKENS = np.random.default_rng(0).integers(0, 30, (B, T))


pytestmark = pytest.mark.usefixtures("quick_compiles")


def config_of(qk_norm: str, norm_order: str, **changes):
    return dataclasses.replace(CFG, qk_norm=qk_norm, norm_order=norm_order, **changes)


@functools.cache
def model_and_params(qk_norm: str, norm_order: str):
    """Every parameter random, scales and biases too."""
    model = LanguageModel(config_of(qk_norm, norm_order), T)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), TOKENS, sight()))["params"]
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        x = rng.standard_normal(leaf.shape) * (leaf.shape[-2] ** -0.5 if path[-1].key.endswith("kernel") else 1)
        return np.float32(x)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


def sight():
    return row_sight(jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS), jnp.zeros_like(SEGMENTS))


def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def layer_norm(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias


def rotated(x, positions):
    """x (T, heads, E), pairs (i, i + E/2) turned by position * 10,000^(-2i/E)."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def plain(cfg, params, tokens, positions, segments):
    """The last hidden states (T, D) of one row, float64, a query at a time."""
    p = jax.tree.map(np.float64, params)
    x, H, K, E = p["token_embedding"][tokens], cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    for layer in range(cfg.num_layers):
        w = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["decoder"]["blocks"])

        def attend(x, a=w["attention"]):
            q, k, v = ((x @ a[f"w{name}_kernel"]).reshape(len(x), -1, E) for name in "qkv")
            if cfg.qk_norm == "layernorm":
                q, k = (layer_norm(y, a[f"{name}_norm_scale"], a[f"{name}_norm_bias"])
                        for name, y in (("q", q), ("k", k)))
            q, k, out = rotated(q, positions), rotated(k, positions), np.zeros(q.shape)
            for t in range(len(x)):
                seen = [s for s in range(t + 1) if segments[s] == segments[t] and (segments[t] or s == t)]
                for h in range(H):
                    e = np.exp(k[seen, h * K // H] @ q[t, h] / np.sqrt(E))
                    out[t, h] = e / e.sum() @ v[seen, h * K // H]
            return out.reshape(len(x), -1) @ a["wo_kernel"]

        def mlp(x, m=w["mlp"]):
            gate = x @ m["gate_kernel"]
            return (gate / (1 + np.exp(-gate)) * (x @ m["up_kernel"])) @ m["down_kernel"]

        for name, f in (("attention", attend), ("mlp", mlp)):
            scale = w[f"{name}_norm_scale"]
            x = x + (rms(f(x), scale) if cfg.norm_order == "post" else f(rms(x, scale)))
    return rms(x, p["decoder"]["final_norm_scale"])


@functools.cache
def expected(qk_norm: str, norm_order: str):
    model, params = model_and_params(qk_norm, norm_order)
    return np.stack([plain(model.cfg, params, *row) for row in zip(TOKENS, POSITIONS, SEGMENTS)])


def assert_close(got, want, rtol=1e-5):
    assert np.linalg.norm(np.float64(got) - want) <= rtol * np.linalg.norm(want)


@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_hidden_states_are_the_formulas(options):
    model, params = model_and_params(*options)
    got = jax.jit(model.apply)({"params": params}, TOKENS, sight())
    assert_close(got, expected(*options))
    others = [expected(*other) for other in OPTIONS if other != options]
    assert all(np.linalg.norm(got - other) > 0.1 * np.linalg.norm(got) for other in others)


def test_on_a_mesh_it_is_the_same_with_its_gradients():
    """Rows, heads and positions split: LayerNorm's one weight set is summed over all of them."""
    model, params = model_and_params("layernorm", "post")
    weights = np.random.default_rng(2).standard_normal((B, T, CFG.d_model)).astype(np.float32)

    def loss(params):
        h = model.apply({"params": params}, TOKENS, sight())
        return jnp.sum(h * weights), h

    (_, want), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=2, sequence=2))):
        (_, got), split = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert_close(got, want)
    jax.tree.map(partial(assert_close, rtol=1e-4), split, gradients)


@pytest.mark.parametrize("options", OPTIONS[1:], ids="-".join)
def test_cached_is_the_full_forward(options):
    """The first document's tokens one after the other: keys are kept as they are attended to."""
    model, params = model_and_params(*options)
    kept, step = cache.empty(model, B, T), jax.jit(partial(cache.step, model, params))
    for at in range(7):
        h_BD, kept = step(kept, jnp.asarray(TOKENS[:, at]), jnp.full(B, at))
        assert_close(h_BD, expected(*options)[:, at])


def test_a_fresh_model_keeps_its_size():
    """Deep, pre-norm and post-norm alike: no position's stream is taken over by one summand, and post-norm
    matrices are not shrunk for a sum that a norm scales anyway."""
    L, D, F = 6, 64, 96
    for order, std in (("pre", (2 * L) ** -0.5), ("post", 1.0)):
        cfg = config_of("layernorm", order, num_layers=L, d_model=D, d_ff=F, remat="full")
        params = nn.unbox(jax.jit(LanguageModel(cfg, T).init)(jax.random.key(0), TOKENS, sight()))["params"]
        blocks = params["decoder"]["blocks"]
        assert float(blocks["mlp"]["down_kernel"].std()) == pytest.approx(std * F**-0.5, rel=0.02)
        assert float(blocks["attention"]["wo_kernel"].std()) == pytest.approx(std * D**-0.5, rel=0.02)
        table = params["token_embedding"][:32]
        assert float(table.std()) == pytest.approx(1 if order == "post" else D**-0.5, rel=0.05)


def test_layer_norm_is_not_decayed_and_its_weights_are_one_set():
    params = model_and_params("layernorm", "post")[1]
    attention, decayed = (x["decoder"]["blocks"]["attention"] for x in (params, decays(params)))
    names = {f"{x}_norm_{kind}" for x in "qk" for kind in ("scale", "bias")}
    assert {name for name, x in decayed.items() if not x} == names
    assert all(attention[name].shape == (CFG.num_layers, CFG.head_dim) for name in names)


@pytest.mark.parametrize("options, what", [
    (("layernorm", "pre"), "model.qk_norm = 'layernorm'"), (("none", "post"), "model.norm_order = 'post'"),
    (("layernorm", "post"), "model.qk_norm = 'layernorm' and no model.norm_order = 'post'")])
def test_what_is_no_llama_is_said(options, what):
    llama.check_model(CFG)
    with pytest.raises(UserError, match=f"Llama has no {what}: .* --format=orbax"):
        llama.check_model(config_of(*options))


@pytest.mark.parametrize("norm", [transformer.rms_norm, transformer.layer_norm])
def test_norms_are_computed_in_float32(norm):
    """Of bfloat16 activations too: by value a CPU hardly shows it."""
    x, scale = jnp.ones((2, 8), jnp.bfloat16), jnp.ones(8)
    made = jax.make_jaxpr(norm)(x, *[scale] * (1 + (norm is transformer.layer_norm)))
    lines = [line for line in str(made).splitlines() if re.search(r"= (rsqrt|reduce_sum)\b", line)]
    assert lines and all("f32" in line and "bf16" not in line for line in lines)
    assert made.out_avals[0].dtype == jnp.bfloat16
