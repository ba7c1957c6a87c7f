"""Pretrained image tokenizers from local files in diffusers' layout: AutoencoderKL (Stable Diffusion's KL-f8
and its kin) and VQModel. Their mathematics on their own arrays, under their own names; no torch.

x is (B, h, w, c) throughout; weights are as torch has them, (out, in, height, width).
"""

import hashlib
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from safetensors import SafetensorError
from safetensors.flax import load_file

from tfusion.errors import UserError
from tfusion.models.codecs import base
from tfusion.models.codecs.network import to_pixels, to_unit
from tfusion.models.codecs.vq import nearest

KINDS = {"AutoencoderKL": "diffusers_kl", "VQModel": "diffusers_vq"}  # a config.json's _class_name: our kind
BLOCKS = {"DownEncoderBlock2D": False, "UpDecoderBlock2D": False,  # whether each of its layers attends
          "AttnDownEncoderBlock2D": True, "AttnUpDecoderBlock2D": True}
KNOWN = {"_class_name": tuple(KINDS), "act_fn": ("silu",), "norm_type": ("group",), "in_channels": (3,),
         "out_channels": (3,), "latents_mean": (None,), "latents_std": (None,)}
USED = {"norm_num_groups": 32, "layers_per_block": 1, "scaling_factor": 0.18215, "shift_factor": 0.0,
        "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True}  # and defaults
DEFAULTS = USED | {key: values[0] for key, values in KNOWN.items() if key != "_class_name"}
FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers' before 2023
CODEBOOK = "quantize.embedding.weight"


# ---------------------------------------------------------------- the network

def conv(w, name: str, x, stride: int = 1, padding=None):
    kernel = w[f"{name}.weight"]
    padding = [(kernel.shape[-1] // 2,) * 2] * 2 if padding is None else padding
    y = jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding,
                                     dimension_numbers=("NHWC", "OIHW", "NHWC"))
    return y + w[f"{name}.bias"]


def group_norm(w, name: str, x, groups: int):
    y = rearrange(x, "b h w (g c) -> b (h w c) g", g=groups)
    y = (y - y.mean(1, keepdims=True)) * jax.lax.rsqrt(y.var(1, keepdims=True) + 1e-6)
    y = rearrange(y, "b (h w c) g -> b h w (g c)", h=x.shape[1], w=x.shape[2])
    return y * w[f"{name}.weight"] + w[f"{name}.bias"]


def resnet(w, name: str, x, groups: int):
    h = conv(w, f"{name}.conv1", jax.nn.silu(group_norm(w, f"{name}.norm1", x, groups)))
    h = conv(w, f"{name}.conv2", jax.nn.silu(group_norm(w, f"{name}.norm2", h, groups)))
    return h + (x if h.shape == x.shape else conv(w, f"{name}.conv_shortcut", x))


def attention(w, name: str, x, groups: int):
    """One head, over all places."""
    def linear(part, x):
        return x @ w[f"{name}.{part}.weight"].T + w[f"{name}.{part}.bias"]

    h = rearrange(group_norm(w, f"{name}.group_norm", x, groups), "b h w c -> b (h w) c")
    q, k, v = (linear(part, h) for part in ("to_q", "to_k", "to_v"))
    weights = jax.nn.softmax(jnp.einsum("bqc,bkc->bqk", q, k) / np.sqrt(q.shape[-1]), axis=-1)
    return x + linear("to_out.0", jnp.einsum("bqk,bkc->bqc", weights, v)).reshape(x.shape)


def middle(cfg: dict, w, name: str, x):
    x = resnet(w, f"{name}.resnets.0", x, cfg["norm_num_groups"])
    if cfg["mid_block_add_attention"]:
        x = attention(w, f"{name}.attentions.0", x, cfg["norm_num_groups"])
    return resnet(w, f"{name}.resnets.1", x, cfg["norm_num_groups"])


def block(cfg: dict, w, name: str, x, layers: int, attends: bool):
    for layer in range(layers):
        x = resnet(w, f"{name}.resnets.{layer}", x, cfg["norm_num_groups"])
        if attends:
            x = attention(w, f"{name}.attentions.{layer}", x, cfg["norm_num_groups"])
    return x


def out(cfg: dict, w, name: str, x):
    return conv(w, f"{name}.conv_out", jax.nn.silu(group_norm(w, f"{name}.conv_norm_out", x,
                                                              cfg["norm_num_groups"])))


def encode(cfg: dict, w, x):
    """(B, H, W, 3) in -1..1 -> (B, h, w, c): after `quant_conv`, mean and log variance in a KL's."""
    x, last = conv(w, "encoder.conv_in", x), len(cfg["down"]) - 1
    for i, attends in enumerate(cfg["down"]):
        x = block(cfg, w, f"encoder.down_blocks.{i}", x, cfg["layers_per_block"], attends)
        if i < last:
            x = conv(w, f"encoder.down_blocks.{i}.downsamplers.0.conv", x, 2, [(0, 1), (0, 1)])
    x = out(cfg, w, "encoder", middle(cfg, w, "encoder.mid_block", x))
    return conv(w, "quant_conv", x) if cfg["use_quant_conv"] else x


def decode(cfg: dict, w, z):
    """The inverse: (B, h, w, c) -> (B, H, W, 3)."""
    z, last = conv(w, "post_quant_conv", z) if cfg["use_post_quant_conv"] else z, len(cfg["up"]) - 1
    x = middle(cfg, w, "decoder.mid_block", conv(w, "decoder.conv_in", z))
    for i, attends in enumerate(cfg["up"]):
        x = block(cfg, w, f"decoder.up_blocks.{i}", x, cfg["layers_per_block"] + 1, attends)
        if i < last:
            x = x.repeat(2, axis=1).repeat(2, axis=2)
            x = conv(w, f"decoder.up_blocks.{i}.upsamplers.0.conv", x)
    return out(cfg, w, "decoder", x)


# ---------------------------------------------------------------- codecs

class Pretrained(base.Arrays):
    """cfg: JSON values, of `read_config`, and `grid`: h = w of an encoded picture. Raises KeyError, TypeError
    or ValueError where the weights are not what it says."""

    chunk = 32  # of 256 x 256 pixels: a gigabyte for each activation of the full-size networks

    def __init__(self, cfg: dict, weights: dict):
        self.cfg, self.weights = cfg, weights
        self.image_size = size = cfg["grid"] * 2 ** (len(cfg["down"]) - 1)
        image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        encoded = jax.eval_shape(lambda x: self.encoded(cfg, weights, x), image)
        if jax.eval_shape(lambda z: self.decoded(cfg, weights, z), encoded).shape != image.shape:
            raise ValueError("it decodes to another size than it encodes")
        self.shape = encoded.shape[1:]
        placed = jax.tree.map(jnp.asarray, dict(weights))  # arguments of a program: constants would be its text
        self._encode = partial(jax.jit(lambda w, x: self.encoded(cfg, w, to_unit(x))), placed)
        self._decode = partial(jax.jit(lambda w, z: to_pixels(self.decoded(cfg, w, z))), placed)

    def _arrays(self) -> dict:
        return self.weights | {"cfg": np.frombuffer(json.dumps(self.cfg, sort_keys=True).encode(), np.uint8)}

    def _about(self) -> dict:
        return self.cfg

    @classmethod
    def read(cls, about: dict, arrays: dict) -> "Pretrained":
        return cls(about["cfg"], {name: x for name, x in arrays.items() if name != "cfg"})


@base.register("diffusers_kl")
class DiffusersKL(Pretrained):
    """The posterior's mean, less shift_factor, times scaling_factor."""

    @staticmethod
    def encoded(cfg: dict, w, x):
        return (jnp.split(encode(cfg, w, x), 2, axis=-1)[0] - cfg["shift_factor"]) * cfg["scaling_factor"]

    @staticmethod
    def decoded(cfg: dict, w, z):
        return decode(cfg, w, z / cfg["scaling_factor"] + cfg["shift_factor"])


@base.register("diffusers_vq")
class DiffusersVQ(Pretrained):
    """The nearest of the codebook's vectors."""

    dtype = np.int32

    @property
    def num_codes(self) -> int:
        return len(self.weights[CODEBOOK])

    @staticmethod
    def encoded(cfg: dict, w, x):
        return nearest(encode(cfg, w, x), w[CODEBOOK])

    @staticmethod
    def decoded(cfg: dict, w, codes):
        return decode(cfg, w, jnp.take(w[CODEBOOK], codes, axis=0))


# ---------------------------------------------------------------- files

class Asked(dict):
    """Remembers which of its names were asked for."""

    def __init__(self, values: dict):
        super().__init__(values)
        self.names = set()

    def __getitem__(self, name: str):
        self.names.add(name)
        return super().__getitem__(name)


def open_file(named: str, grid: int) -> Pretrained:
    """'FILE.safetensors#SHA256', a config.json beside it, for pictures of grid x grid when encoded.

    Raises UserError where the file is not the one of that hash, or not of a layout that is known here.
    """
    path, _, wanted = named.partition("#")
    path = Path(path)
    kind, cfg = read_config(path.with_name("config.json"))
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wanted.lower():
            raise UserError(f"{path} has the sha256 {found}, " + (f"{wanted} is wanted: bring it anew" if wanted
                            else f"which must be named: {path}#{found}, if its publisher says the same"))
        weights = Asked({current_name(name): np.asarray(x, np.float32) for name, x in load_file(path).items()})
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} cannot be read as safetensors: {e}") from e
    try:
        codec = base.CODECS[kind](cfg | {"grid": grid}, weights)
        if left := sorted(weights.keys() - weights.names):
            raise ValueError(f"nothing in it is a place for {left[0]}, and {len(left) - 1} more")
    except KeyError as e:
        raise UserError(f"{path} has no tensor {e}, which its config.json asks for") from e
    except (TypeError, ValueError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"{path} does not hold what its config.json describes: {reason}") from e
    return codec


def current_name(name: str) -> str:
    for former, now in FORMER.items():
        name = name.replace(f".{former}.", f".{now}.")
    return name


def read_config(path: Path) -> tuple[str, dict]:
    """(kind, what is computed). Raises UserError where that is not known here."""
    try:
        config = DEFAULTS | json.loads(path.read_text())
        wrong = [key for key, known in KNOWN.items() if config[key] not in known]
        wrong += [key for key in ("down_block_types", "up_block_types") if not BLOCKS.keys() >= {*config[key]}]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is missing or broken ({type(e).__name__}: {e}): the config.json that "
                        "diffusers saves must stand beside the weights") from e
    if wrong:
        raise UserError(f"{path}: {wrong[0]} = {config[wrong[0]]!r} is not known here")
    blocks = {key: [BLOCKS[name] for name in config[f"{key}_block_types"]] for key in ("down", "up")}
    shift = config["shift_factor"] or 0.0  # null is none
    return KINDS[config["_class_name"]], {key: config[key] for key in USED} | {"shift_factor": shift} | blocks
