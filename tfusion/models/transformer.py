"""A Llama-style decoder: RMSNorm, rotary attention, SwiGLU; depth by scan and remat. Two options are
Chameleon's (arXiv 2405.09818): queries and keys normalised, and each branch's norm after it.

With a cache, the tokens are some of their rows': their keys and values are written into it, and they attend to
what it holds. Without one they are the whole row.

B batch, T tokens, D d_model, H heads, K kv_heads, E head_dim, F d_ff.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from tfusion.config import check_divides, choice
from tfusion.errors import UserError
from tfusion.kernels.interval_attention import RESIDUAL_NAMES
from tfusion.models.attention import attention, write
from tfusion.models.rope import apply_rope
from tfusion.sharding import constrain, num_shards

NORM_EPS = 1e-5

ATTENTION = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)
REMAT_POLICIES = {  # what the backward pass finds kept; the rest of a block is computed again
    "attention": ATTENTION,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        ATTENTION, jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "full": None,
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    d_ff: int
    qk_norm: str = choice("none", "layernorm")  # of queries and keys, before they are rotated
    norm_order: str = choice("pre", "post")  # x + f(norm(x)), as Llama; x + norm(f(x)), as Swin and Chameleon
    remat: str = choice("none", *REMAT_POLICIES, may_change=True)
    compute_dtype: str = choice("float32", "bfloat16", may_change=True)

    def check(self, name: str) -> None:
        check_divides(name, self, "num_heads", "d_model")
        check_divides(name, self, "num_kv_heads", "num_heads")
        if self.head_dim % 2:
            raise UserError(f"{name}.d_model / {name}.num_heads = {self.head_dim} must be even for RoPE")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    def branch_std(self, fan_in: int) -> float:
        """Of the matrices that end a branch: a sum of 2L branches is as large as its first summand. Where a
        norm follows, it says how large they are."""
        return (fan_in * (1 if self.norm_order == "post" else 2 * self.num_layers)) ** -0.5

    @property
    def embedding_std(self) -> float:
        """As large as the branches that are added to it, where a norm follows each: it would drown in them."""
        return 1.0 if self.norm_order == "post" else self.d_model**-0.5


@jax.custom_vjp
def linear(x, w):
    """x (..., D) @ w (D, F) in x's dtype. w is cast before it is gathered; its gradient leaves the product in
    w's dtype, float32, and is summed over devices so: in bfloat16 a thousand of them would add up to noise."""
    return _product(x, w.astype(x.dtype))


@jax.custom_vjp
def linear_f32(x, w):
    """linear, but float32 leaves the product: not rounded to x's dtype and back. Its cotangent is cast to x's
    dtype before both backward products, which would else be float32 x bfloat16."""
    return _product_f32(x, w.astype(x.dtype))


def _product_f32(x, w):
    return jnp.einsum("...d,df->...f", x, w, preferred_element_type=jnp.float32)


def _product(x, w, subscripts: str = "nd,df->nf"):
    """Two-dimensional, for XLA:CPU's gradients are twice as fast so; but a row split over devices stays as it
    is, for merging it with the batch would gather it."""
    if num_shards("length") > 1:
        return jnp.einsum(subscripts.replace("n", "..."), x, w)
    y = jnp.einsum(subscripts, x.reshape(-1, x.shape[-1]), w)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _weight_gradient(x, g, dtype):
    """(D, F): the sum over positions of x (..., D) times g (..., F)."""
    if num_shards("length") == 1:
        x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return jnp.einsum("...f,...d->fd", g, x, preferred_element_type=dtype).T


def _linear_fwd(product, x, w):
    """Kept: w as it is gathered, so that a recomputed forward and the backward gather it once; w's dtype."""
    kept = x, w.astype(x.dtype), jnp.zeros(0, w.dtype)
    return product(*kept[:2]), kept


def _linear_bwd(kept, cotangent):
    x, w, like = kept
    cotangent = cotangent.astype(x.dtype)
    return _product(cotangent, w, "nf,df->nd"), _weight_gradient(x, cotangent, like.dtype)


linear.defvjp(partial(_linear_fwd, _product), _linear_bwd)
linear_f32.defvjp(partial(_linear_fwd, _product_f32), _linear_bwd)


# Under every policy the elementwise parts are made again from their inputs: on a CPU that is cheaper than to
# write and read all that their gradients need.
@jax.checkpoint
def rms_norm(x, scale):
    """x / rms(x) * scale over the last axis, in float32, returned in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + NORM_EPS)
    return (y * scale).astype(x.dtype)


@jax.checkpoint
def layer_norm(x, scale, bias):
    """(x - mean) / standard deviation * scale + bias over the last axis, in float32, returned in x's dtype."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + NORM_EPS)
    return (y * scale + bias).astype(x.dtype)


@jax.checkpoint
def swiglu(gate, up):
    return jax.nn.silu(gate) * up


def kernel(module: nn.Module, name: str, shape, axes, std: float | None = None):
    """Declares a float32 matrix with logical axes; normal with std 1/sqrt(fan in) unless given."""
    std = shape[0] ** -0.5 if std is None else std
    init = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
    return module.param(name, init, shape, jnp.float32)


def norm_scale(module: nn.Module, name: str, size: int):
    init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
    return module.param(name, init, (size,), jnp.float32)


def qk_norm(module: nn.Module, name: str, x_BTHE):
    """LayerNorm of each head, all with the same weights."""
    E = x_BTHE.shape[-1]
    init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("norm",))
    bias = module.param(f"{name}_norm_bias", init, (E,), jnp.float32)
    return layer_norm(x_BTHE, norm_scale(module, f"{name}_norm_scale", E), bias)


class Attention(nn.Module):
    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD, cache, layer, rope, sight):
        cfg, (B, T, D) = self.cfg, x_BTD.shape
        H, K, E = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        wq = kernel(self, "wq_kernel", (D, H * E), ("embed", "heads"))
        wk = kernel(self, "wk_kernel", (D, K * E), ("embed", "kv_heads"))
        wv = kernel(self, "wv_kernel", (D, K * E), ("embed", "kv_heads"))
        wo = kernel(self, "wo_kernel", (H * E, D), ("heads", "embed"), std=cfg.branch_std(H * E))
        q_BTHE = linear(x_BTD, wq).reshape(B, T, H, E)
        k_BTKE = linear(x_BTD, wk).reshape(B, T, K, E)
        if cfg.qk_norm == "layernorm":
            q_BTHE, k_BTKE = qk_norm(self, "q", q_BTHE), qk_norm(self, "k", k_BTKE)
        q_BTHE, k_BTKE = apply_rope(q_BTHE, rope), apply_rope(k_BTKE, rope)
        v_BTKE = linear(x_BTD, wv).reshape(B, T, K, E)
        q_BTHE = constrain(q_BTHE, "batch", "length", "heads", "head_dim")
        k, v = k_BTKE, v_BTKE
        if cache is not None:
            cache = write(cache, layer, k, v, sight.positions_BT)
            k, v = (x[layer] for x in cache)
        out_BTHE = attention(q_BTHE, k, v, sight.k_start_BT, sight.k_end_BT)
        return linear(out_BTHE.reshape(B, T, H * E), wo), cache


class MLP(nn.Module):
    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD):
        D, F = self.cfg.d_model, self.cfg.d_ff
        gate = kernel(self, "gate_kernel", (D, F), ("embed", "mlp"))
        up = kernel(self, "up_kernel", (D, F), ("embed", "mlp"))
        down = kernel(self, "down_kernel", (F, D), ("mlp", "embed"), std=self.cfg.branch_std(F))
        h_BTF = constrain(swiglu(linear(x_BTD, gate), linear(x_BTD, up)), "batch", "length", "mlp")
        return linear(h_BTF, down)


class Block(nn.Module):
    cfg: TransformerConfig

    @nn.compact
    def __call__(self, carry, layer, rope, sight):
        (x_BTD, cache), D, post = carry, self.cfg.d_model, self.cfg.norm_order == "post"
        scale = norm_scale(self, "attention_norm_scale", D)
        h = x_BTD if post else rms_norm(x_BTD, scale)
        h, cache = Attention(self.cfg, name="attention")(h, cache, layer, rope, sight)
        x_BTD = x_BTD + (rms_norm(h, scale) if post else h)
        scale = norm_scale(self, "mlp_norm_scale", D)
        h = MLP(self.cfg, name="mlp")(x_BTD if post else rms_norm(x_BTD, scale))
        x_BTD = x_BTD + (rms_norm(h, scale) if post else h)
        return (constrain(x_BTD, "batch", "length", "hidden"), cache), None


class Decoder(nn.Module):
    """num_layers blocks, scanned over stacked parameters (leading axis 'layers'), then RMSNorm."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD, rope, sight, cache=None):
        """(x_BTD, the cache with these tokens in it)"""
        block, L = Block, self.cfg.num_layers
        if self.cfg.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[self.cfg.remat])
        # Without remat every layer's residuals are kept anyway, and unrolled they need not be stacked:
        # on a CPU the step takes half the time.
        blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast), length=L, unroll=L if self.cfg.remat == "none" else 1,
            metadata_params={nn.PARTITION_NAME: "layers"})
        layers = None if cache is None else jnp.arange(L)
        (x_BTD, cache), _ = blocks(self.cfg, name="blocks")((x_BTD, cache), layers, rope, sight)
        return rms_norm(x_BTD, norm_scale(self, "final_norm_scale", self.cfg.d_model)), cache
