"""What the model owes an adapter: its own number of patches, its skips, the slots' t.

T positions, I image slots, N patches per image, h w c latent.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tests.models.test_transfusion import MODEL
from tfusion.models.adapters.linear import LinearConfig
from tfusion.models.transfusion import Transfusion
from tfusion.types import BOS, EOS, PAD, Batch

N, BOI, EOI = 4, 20, 21


@dataclasses.dataclass(frozen=True)
class HalvesConfig:
    latent_shape: tuple = (4, 4, 2)
    num_patches: int = N

    def make(self, d_model: int) -> nn.Module:
        return Halves(d_model)


class Halves(nn.Module):
    """A toy U-Net: 2 x 2 means are the patches, what they lose goes past the transformer."""

    d_model: int

    def setup(self):
        self.into = nn.Dense(self.d_model)
        self.out = nn.Dense(2)

    def encode(self, x_BIhwc, t_BI):
        B, I, h, w, c = x_BIhwc.shape
        means = x_BIhwc.reshape(B, I, h // 2, 2, w // 2, 2, c).mean((3, 5))
        return self.into(means.reshape(B, I, N, c)), (x_BIhwc - self.double(means),)

    def decode(self, h_BIND, t_BI, skips):
        B, I, _, _ = h_BIND.shape
        coarse = self.double(self.out(h_BIND).reshape(B, I, 2, 2, -1))
        return coarse + t_BI[..., None, None, None] * skips[0]

    def double(self, x_BIhwc):
        return x_BIhwc.repeat(2, axis=2).repeat(2, axis=3)


def test_an_adapter_with_skips():
    """Its patches are where it says, detail that only its skips hold reaches the prediction, by the slot's own
    t, and nothing else."""
    cfg = dataclasses.replace(MODEL, adapter=HalvesConfig())
    tokens = np.array([[BOS, BOI, *[PAD] * N, EOI, 5, BOI, *[PAD] * N, EOI, EOS]], np.int32)
    images = np.array([[0, 0, *[1] * N, 0, 0, 0, *[2] * N, 0, 0]], np.int32)
    T, I = tokens.shape[1], 3
    batch = Batch(None, tokens, np.ones_like(tokens), images, np.arange(T)[None], None, None,
                  np.array([[2, 9, T]], np.int32), None, None)
    rng, t = np.random.default_rng(0), np.float32([[0.5, 0.25, 0.7]])
    x = rng.standard_normal((1, I, *cfg.latent_shape)).astype(np.float32)
    detail = rng.standard_normal((1, I, *cfg.latent_shape)).astype(np.float32)
    detail -= Halves(cfg.d_model).double(detail.reshape(1, I, 2, 2, 2, 2, -1).mean((3, 5)))
    model = Transfusion(cfg, T)
    params = jax.jit(model.init)(jax.random.key(0), batch, x, t)
    (h, prediction), (h_moved, moved) = (
        jax.jit(model.apply)(params, batch, each, t) for each in (x, x + detail))
    np.testing.assert_allclose(moved - prediction, t[..., None, None, None] * detail, atol=1e-5)
    np.testing.assert_allclose(h_moved, h, atol=1e-5)
    assert jnp.abs(prediction[0, 0] - prediction[0, 1]).max() > 0.1


def test_near_times_differ_in_bfloat16_too():
    """t itself is never rounded: bfloat16 knows one t for .995 and .997."""
    cfg = LinearConfig("linear", 4, 2, 2, "none")
    adapter, t = cfg.make(32), np.float32([[0.995, 0.997]])
    x = np.zeros((1, 2, *cfg.latent_shape), np.float32)
    params = jax.jit(lambda: nn.unbox(adapter.init(jax.random.key(0), x, t, method="encode")))()

    def moved(dtype):
        h_BIND, _ = jax.jit(lambda: adapter.apply(params, x.astype(dtype), t, method="encode"))()
        return np.asarray(h_BIND[0, 1] - h_BIND[0, 0], np.float32)

    want = moved(np.float32)
    assert np.linalg.norm(moved(jnp.bfloat16) - want) < 0.2 * np.linalg.norm(want)
