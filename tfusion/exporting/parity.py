"""Text logits by Llama's definition, from its files alone: what software of others will compute with an export.

A plain reading of Hugging Face's LlamaForCausalLM in numpy, float32, sharing no line with the model; tests hold
it to their own numbers. One layer's tensors are in memory at a time.

B rows, T tokens, D d_model, H heads, K key/value heads, E head dimension, V vocabulary.
"""

import jax
import numpy as np

from tfusion import sharding
from tfusion.exported import Tensors
from tfusion.models import llama

TOLERANCE = 1e-4  # of the largest logit, or of 1
ROWS, LENGTH = 2, 64  # of the texts compared


def logits(theirs: Tensors, config: dict, tokens_BT):
    """(B, T, V), float32."""
    def tensor(name):
        return np.asarray(theirs.read(f"{name}.weight"), np.float32)

    def norm(x, name):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config["rms_norm_eps"]) * tensor(name)

    def linear(x, name):
        return x @ tensor(name).T

    x_BTD = tensor("model.embed_tokens")[tokens_BT]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = norm(x_BTD, f"{layer}.input_layernorm")
        q, k, v = (linear(h, f"{layer}.self_attn.{name}_proj") for name in "qkv")
        x_BTD = x_BTD + linear(_attend(q, k, v, config), f"{layer}.self_attn.o_proj")
        h = norm(x_BTD, f"{layer}.post_attention_layernorm")
        gate = linear(h, f"{layer}.mlp.gate_proj")
        up = gate / (1 + np.exp(-gate)) * linear(h, f"{layer}.mlp.up_proj")
        x_BTD = x_BTD + linear(up, f"{layer}.mlp.down_proj")
    return linear(norm(x_BTD, "model.norm"), "lm_head")


def _attend(q, k, v, config: dict):
    """Causal attention with rotated queries and keys; each (B, T, heads * E)."""
    heads, E = config["num_attention_heads"], config["head_dim"]
    q, k, v = (x.reshape(*x.shape[:2], -1, E).swapaxes(1, 2) for x in (q, k, v))  # (B, heads, T, E)
    angle = np.arange(q.shape[2])[:, None] * config["rope_theta"] ** (-np.arange(0, E, 2) / E)
    cos, sin = (np.float32(np.concatenate([f(angle)] * 2, axis=-1)) for f in (np.cos, np.sin))

    def rotate(x):
        return x * cos + np.concatenate([-x[..., E // 2 :], x[..., : E // 2]], axis=-1) * sin

    k, v = (np.repeat(x, heads // x.shape[1], axis=1) for x in (rotate(k), v))
    scores = rotate(q) @ k.swapaxes(2, 3) / np.float32(np.sqrt(E))
    future = np.triu(np.ones(scores.shape[2:], bool), 1)
    weights = np.exp(np.where(future, -np.inf, scores) - scores.max(axis=-1, keepdims=True))
    out = (weights / weights.sum(axis=-1, keepdims=True)) @ v
    return out.swapaxes(1, 2).reshape(*out.shape[:1], out.shape[2], -1)


def compare(theirs: Tensors, config: dict, form: llama.Form, params) -> tuple[float, float]:
    """(largest difference between the run's text logits and those of the files, largest of the latter), over
    documents of ids drawn from the whole vocabulary."""
    T = min(LENGTH, form.seq_len)
    tokens_BT = np.random.RandomState(0).randint(0, form.vocab_size, (ROWS, T)).astype(np.int32)
    want = logits(theirs, config, tokens_BT)
    rows = -(-ROWS // (parts := sharding.num_shards("batch"))) * parts  # that divide over the devices
    repeated = np.resize(tokens_BT, (rows, T))
    with jax.default_matmul_precision("highest"):  # float32 products, on accelerators too
        got = sharding.fetch(jax.jit(form.logits)(params, repeated))[:ROWS]
    return float(np.abs(got - want).max()), float(np.abs(want).max())
