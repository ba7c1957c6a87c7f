"""A transformer's parameters as Hugging Face's Llama has them, and back: names, orientation, config.json.

Theirs are one tensor a layer and (out, in); ours are stacked over the layers and (in, out). Nothing is
permuted: RoPE pairs the halves of a head in both (models/rope.py). Rows of the vocabulary stand by our ids,
those that only pad it left out. Pure: a leaf is read, and given, a part at a time.

L layers, D d_model, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tfusion.errors import UserError
from tfusion.models.rope import THETA
from tfusion.models.transformer import NORM_EPS, TransformerConfig

TABLES = {"token_embedding": "model.embed_tokens.weight", "lm_head_kernel": "lm_head.weight"}
NORM = {"decoder/final_norm_scale": "model.norm.weight"}
LAYER = {
    "decoder/blocks/attention_norm_scale": "input_layernorm",
    "decoder/blocks/attention/wq_kernel": "self_attn.q_proj",
    "decoder/blocks/attention/wk_kernel": "self_attn.k_proj",
    "decoder/blocks/attention/wv_kernel": "self_attn.v_proj",
    "decoder/blocks/attention/wo_kernel": "self_attn.o_proj",
    "decoder/blocks/mlp_norm_scale": "post_attention_layernorm",
    "decoder/blocks/mlp/gate_kernel": "mlp.gate_proj",
    "decoder/blocks/mlp/up_kernel": "mlp.up_proj",
    "decoder/blocks/mlp/down_kernel": "mlp.down_proj",
}
NO_LLAMA = {"qk_norm": "none", "norm_order": "pre"}  # options, and what they are in a Llama
TRUNK = "decoder/"  # leaves below it are the transformer's


class Form(NamedTuple):
    """What of a kind of training is a Llama: its transformer, on text."""

    model: TransformerConfig
    seq_len: int
    text_vocab_size: int  # ids of text; symbols of ours stand behind them
    symbols: dict[str, int]  # {their name in config.json: id}
    logits: Callable  # (params, tokens_BT) -> float32 (B, T, V) of one document a row, computed in float32
    num_codes: int = 0  # ids of images, behind those

    @property
    def vocab_size(self) -> int:
        return self.text_vocab_size + len(self.symbols) + self.num_codes


class Tensor(NamedTuple):
    """One of theirs, and where it stands in ours."""

    name: str
    leaf: str  # its path, joined by "/"
    layer: int | None  # of the leaf's first axis; None where it has none


def tensors_of(leaf: str, num_layers: int) -> list[Tensor]:
    """What a leaf is there; nothing for one that a Llama has not."""
    if leaf in LAYER:
        return [Tensor(f"model.layers.{i}.{LAYER[leaf]}.weight", leaf, i) for i in range(num_layers)]
    return [Tensor(name, leaf, None) for name in [(TABLES | NORM).get(leaf)] if name]


def tensors(num_layers: int) -> list[Tensor]:
    """All of them, layer by layer."""
    layers = [tensors_of(leaf, num_layers) for leaf in LAYER]
    first, last = (tensors_of(leaf, num_layers) for leaf in TABLES)
    norm = tensors_of(*NORM, num_layers)
    return [*first, *(one for layer in zip(*layers) for one in layer), *norm, *last]


def check_model(model: TransformerConfig) -> None:
    """Raises UserError where it has an option that Llama has not."""
    strange = [f"model.{key} = '{value}'" for key, none in NO_LLAMA.items()
               if (value := getattr(model, key)) != none]
    if strange:
        raise UserError(f"Hugging Face's Llama has no {' and no '.join(strange)}: such a model can be exported "
                        "with --format=orbax alone, and begins with no Llama's parameters")


def check_leaves(leaves) -> None:
    """Raises UserError where the transformer has parameters that Llama has no place for."""
    strange = [leaf for leaf in leaves if leaf.startswith(TRUNK) and not tensors_of(leaf, 1)]
    if strange:
        raise UserError(f"Hugging Face's Llama has no place for {', '.join(strange)}: a model with that option "
                        "can be exported with --format=orbax")


def to_llama(x, tensor: Tensor, vocab_size: int):
    """One tensor of theirs, of its leaf x or that layer of it, as a view."""
    x = x.T if tensor.leaf.endswith("kernel") else x
    return x[:vocab_size] if tensor.leaf in TABLES else x


def shape_there(shape, tensor: Tensor, vocab_size: int) -> tuple[int, ...]:
    """Of a leaf's shape, that of one tensor."""
    shape = shape if tensor.layer is None else shape[1:]
    shape = shape[::-1] if tensor.leaf.endswith("kernel") else shape
    return (vocab_size, *shape[1:]) if tensor.leaf in TABLES else tuple(shape)


def from_llama(leaf: str, index: tuple[slice, ...], num_layers: int, read: Callable):
    """leaf[index], put together of theirs. read: (name, index) -> that part of a tensor."""
    def one(tensor: Tensor, index):
        flips = tensor.leaf.endswith("kernel")
        part = read(tensor.name, index[::-1] if flips else index)
        return part.T if flips else part

    found = tensors_of(leaf, num_layers)
    if leaf in LAYER:
        return np.stack([one(tensor, index[1:]) for tensor in found[index[0]]])
    return one(found[0], index)


# ---------------------------------------------------------------- config.json

OURS = {  # what must be the same there, and by what it is set here
    "hidden_size": "model.d_model", "intermediate_size": "model.d_ff", "num_hidden_layers": "model.num_layers",
    "num_attention_heads": "model.num_heads", "num_key_value_heads": "model.num_kv_heads",
    "head_dim": "model.d_model / model.num_heads", "rms_norm_eps": "fixed", "rope_theta": "fixed",
    "rope_type": "fixed", "hidden_act": "fixed", "attention_bias": "fixed", "mlp_bias": "fixed",
}


def to_config(form: Form, dtype: str) -> dict:
    """config.json, for releases of transformers before and since `rope_parameters`."""
    m = form.model
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": form.vocab_size,
        "hidden_size": m.d_model, "intermediate_size": m.d_ff, "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads, "num_key_value_heads": m.num_kv_heads, "head_dim": m.head_dim,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
        "rms_norm_eps": NORM_EPS, "rope_theta": THETA,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "max_position_embeddings": form.seq_len, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        **form.symbols, "torch_dtype": dtype, "dtype": dtype,
    }


def _facts(config: dict) -> dict[str, Any]:
    """The values of OURS in a config.json, with transformers' defaults for what it leaves out."""
    heads, rope = config["num_attention_heads"], config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    return {
        "num_key_value_heads": heads, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "rope_theta": rope.get("rope_theta", 10_000.0),
        **{key: config[key] for key in OURS if config.get(key) is not None},
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "rope_type": rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"}


def check_config(config: dict, form: Form, where) -> None:
    """Raises UserError where a config.json is of another function than this model: names each difference."""
    try:
        theirs, ours = _facts(config), _facts(to_config(form, ""))
        other = [f"{key} = {theirs[key]} ({by}: {ours[key]})" for key, by in OURS.items()
                 if theirs[key] != ours[key]]
    except (KeyError, TypeError) as e:
        raise UserError(f"{where} is not the config.json of a Llama (it lacks {e})") from e
    if other:
        raise UserError(f"{where} is of another model than the config's: {', '.join(other)}; set the former, "
                        "the fixed ones cannot be")
