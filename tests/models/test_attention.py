"""Attention over key intervals and rotary positions, each against its formula written out in numpy.

B batch, T tokens, H query heads, K key/value heads, E head dimension.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfusion.models.attention import attention
from tfusion.models.rope import apply_rope, rope_tables

B, T, E = 2, 24, 8


def random_qkv(seed: int, H: int, K: int, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    return tuple(scale * rng.standard_normal((B, T, heads, E)).astype(np.float32) for heads in (H, K, K))


def random_intervals(seed: int):
    """Any intervals that hold their own query: more than documents and images can produce."""
    rng = np.random.default_rng(seed)
    own = np.arange(T)
    return (rng.integers(0, own + 1, (B, T)).astype(np.int32),
            rng.integers(own + 1, T + 1, (B, T)).astype(np.int32))


def naive_attention(q, k, v, k_start, k_end):
    """softmax(q k^T / sqrt(E)) v in float64, one query and head at a time; query head h reads key/value
    head h // (H / K)."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out, group = np.zeros(q.shape), q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(*q.shape[:3]):
        seen = slice(k_start[b, t], k_end[b, t])
        logits = k[b, seen, h // group] @ q[b, t, h] / np.sqrt(E)
        weights = np.exp(logits - logits.max())
        out[b, t, h] = weights / weights.sum() @ v[b, seen, h // group]
    return out


@pytest.mark.parametrize("H, K", [(4, 4), (4, 2), (6, 2), (4, 1)])
def test_attention_is_softmax_over_the_interval(H, K):
    qkv, intervals = random_qkv(H + K, H, K), random_intervals(H)
    np.testing.assert_allclose(attention(*qkv, *intervals), naive_attention(*qkv, *intervals), atol=2e-6)


def test_large_logits_stay_finite():
    """Logits of +-1000: the softmax subtracts its maximum."""
    qkv, intervals = random_qkv(0, 4, 2, scale=30.0), random_intervals(1)
    np.testing.assert_allclose(
        attention(*qkv, *intervals), naive_attention(*qkv, *intervals), rtol=1e-3, atol=1e-3)


def test_hidden_keys_change_no_bit():
    """Keys and values outside every interval may hold anything."""
    q, k, v = random_qkv(2, 4, 2)
    k_start, k_end = np.full((B, T), 4, np.int32), np.full((B, T), T - 4, np.int32)
    seen = ((np.arange(T) >= 4) & (np.arange(T) < T - 4))[None, :, None, None]
    other = [np.where(seen, x, 50 * x + 7) for x in (k, v)]
    np.testing.assert_array_equal(attention(q, k, v, k_start, k_end), attention(q, *other, k_start, k_end))


def test_hidden_keys_get_no_gradient():
    q, k, v = random_qkv(3, 4, 2)
    intervals = random_intervals(3)
    at = T // 2
    grads = jax.grad(lambda k, v: attention(q, k, v, *intervals)[0, at].sum(), argnums=(0, 1))(k, v)
    hidden = (np.arange(T) < intervals[0][0, at]) | (np.arange(T) >= intervals[1][0, at])
    for grad in grads:
        reached = np.abs(np.asarray(grad[0])).sum((1, 2)) > 0
        np.testing.assert_array_equal(reached[hidden], False)
    assert reached[~hidden].all()


def test_bfloat16_softmax_is_float32():
    """bf16 in, bf16 out, and no further from the float64 result than bf16's own rounding."""
    qkv, intervals = random_qkv(4, 4, 2), random_intervals(4)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in qkv]
    out = attention(*rounded, *intervals)
    exact = naive_attention(*(np.asarray(x, np.float32) for x in rounded), *intervals)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=0.03)


LONG = 4096  # a row's length, to which the tables reach


def rotate(x, positions):
    return np.asarray(apply_rope(x, rope_tables(positions, x.shape[-1], LONG)))


def test_rope_is_hugging_faces_half_split():
    """x cos + rotate_half(x) sin with angle position * 10000^(-2i/E), written out per element."""
    x = random_qkv(5, 2, 2)[0]
    positions = np.random.default_rng(5).integers(0, LONG, (B, T)).astype(np.int32)
    expected = np.zeros(x.shape)
    for b, t, h, i in np.ndindex(B, T, 2, E // 2):
        angle = positions[b, t] * 10_000.0 ** (-2 * i / E)
        first, second = np.float64(x[b, t, h, i]), np.float64(x[b, t, h, i + E // 2])
        expected[b, t, h, i] = first * np.cos(angle) - second * np.sin(angle)
        expected[b, t, h, i + E // 2] = second * np.cos(angle) + first * np.sin(angle)
    np.testing.assert_allclose(rotate(x, positions), expected, atol=3e-6)  # the angles are float64's


def test_rope_of_one_token_is_the_rows():
    """The angle is the position's, whatever stands beside it in the call; past the tables it is none."""
    x = np.random.default_rng(5).standard_normal((1, LONG, 2, E)).astype(np.float32)
    row = rotate(x, np.arange(LONG)[None])
    for position in (1, 4000, LONG - 1):
        one = rotate(x[:, position : position + 1], np.array([[position]]))
        np.testing.assert_array_equal(one, row[:, position : position + 1])
    assert np.isnan(rope_tables(np.array([[LONG]]), E, LONG)).all()


def test_rope_position_zero_is_the_identity():
    x = random_qkv(6, 2, 2)[0]
    np.testing.assert_array_equal(rotate(x, np.zeros((B, T), np.int32)), x)


@pytest.mark.parametrize("shift", [1, 17, 500])
def test_rope_scores_depend_on_distance_only(shift):
    q, k, _ = random_qkv(7, 2, 2)
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))

    def scores(offset):
        return np.einsum("bthe,bshe->bhts", rotate(q, positions + offset), rotate(k, positions + offset))

    np.testing.assert_allclose(scores(shift), scores(0), atol=1e-3)
    assert np.abs(scores(0) - np.einsum("bthe,bshe->bhts", q, k)).max() > 0.1  # and positions do matter


def in_float64(x, positions):
    """The exact rotation: pairs as complex numbers."""
    z = np.float64(x[..., : x.shape[-1] // 2]) + 1j * np.float64(x[..., x.shape[-1] // 2 :])
    z = z * np.exp(1j * positions[:, :, None, None] * 10_000.0 ** (-2 * np.arange(z.shape[-1]) / x.shape[-1]))
    return np.concatenate([z.real, z.imag], axis=-1)


def test_rope_of_bfloat16_rounds_once():
    """bf16 in, bf16 out: the exact rotation within half a unit in its last place (2^-8 of its size), so what
    is lost is what bf16 must lose. With tables in bf16, differences of near equals lose all their digits."""
    x = np.asarray(jnp.asarray(random_qkv(8, 2, 2)[0], jnp.bfloat16))
    for offset in (0, 4000):
        positions = np.tile(offset + np.arange(T, dtype=np.int32), (B, 1))
        out, exact = rotate(x, positions), in_float64(x, positions)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float64(out), exact, rtol=1.01 * 2**-8, atol=1e-5)


@pytest.mark.parametrize("offset", [0, 500, 4000])
def test_rope_scores_of_bfloat16_depend_on_distance_only(offset):
    """q at p against k at s is the exact score of distance p - s, but for rounding both once: 0.23 % of a
    score's size, with tables in bf16 0.39 %."""
    rng, E = np.random.default_rng(9), 128
    q, k = (np.asarray(jnp.asarray(rng.standard_normal((1, 64, 4, E)), jnp.bfloat16)) for _ in range(2))
    positions = np.arange(64, dtype=np.int32)[None]
    rotated = (np.float64(rotate(x, offset + positions)) for x in (q, k))
    got, exact = (np.einsum("bthe,bshe->bhts", *pair) for pair in
                  (rotated, (in_float64(x, positions) for x in (q, k))))
    assert np.linalg.norm(got - exact) < 0.0028 * np.linalg.norm(exact)


def test_rope_of_bfloat16_computes_its_angles_in_float32():
    """bf16 cannot tell position 4094 from 4095; the tables can."""
    cos, sin = rope_tables(np.array([[4094, 4095]], np.int32), E, LONG)
    assert cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_allclose(cos[0, :, 0], np.cos([4094, 4095]), atol=1e-6)
    np.testing.assert_allclose(sin[0, :, 0], np.sin([4094, 4095]), atol=1e-6)
