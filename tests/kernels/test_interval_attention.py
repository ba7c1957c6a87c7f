"""Every implementation of interval attention against the dense definition, forward and backward."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tfusion.errors import UserError
from tfusion.kernels import interval_attention as ia
from tfusion.kernels import interval_attention_cpu as cpu
from tfusion.kernels import interval_attention_gpu as gpu
from tfusion.kernels import interval_attention_tpu as tpu
from tfusion.models.masks import dense_mask, key_intervals
from tfusion.models.transformer import REMAT_POLICIES

REPO = Path(__file__).resolve().parents[2]
F32, BF16 = jnp.float32, jnp.bfloat16
CASES = [  # packing, T, (H, K), E, dtype
    ("adjacent images", 200, (4, 2), 16, F32),
    ("one-patch images", 200, (4, 4), 16, F32),
    ("many documents", 200, (4, 1), 24, F32),
    ("padding", 160, (6, 2), 16, F32),
    ("random", 150, (4, 2), 16, BF16),
    ("one document", 200, (2, 1), 16, BF16),
]


def inputs(T, S, H, K, E, dtype, B=2):
    """q, k, v, dout (numpy)."""
    rng = np.random.default_rng(T + H)
    shapes = (B, T, H, E), (B, S, K, E), (B, S, K, E), (B, T, H, E)
    return tuple(rng.standard_normal(shape, np.float32).astype(dtype) for shape in shapes)


def with_gradients(attend, q, k, v, dout, k_start, k_end):
    """(out, dq, dk, dv) of attend(q, k, v, k_start, k_end)."""
    out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, k_start, k_end), q, k, v)
    return out, *pullback(dout)


def as_attention(module, **options):
    """A differentiable function of one platform's forward and backward."""

    @jax.custom_vjp
    def attend(*arguments):
        return module.forward(*arguments, **options)[0]

    def forward(*arguments):
        out, lse = module.forward(*arguments, **options)
        return out, (*arguments, out, lse)

    def backward(residuals, dout):
        return *module.backward(*residuals, dout, **options), None, None

    attend.defvjp(forward, backward)
    return attend


def assert_close(actual, expected, dtype):
    """Norm-wise, as DESIGN's equalities are: out, dq, dk, dv."""
    limit = 1e-5 if dtype == F32 else 1e-2
    for name, a, b in zip(("out", "dq", "dk", "dv"), actual, expected):
        assert a.shape == b.shape and a.dtype == dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= limit * np.linalg.norm(b), name


def check(attend, packed, name, T, heads, E, dtype, queries=slice(None)):
    """attend(q, k, v, k_start, k_end) against the reference in float32."""
    k_start, k_end = (x[:, queries] for x in key_intervals(*packed(name, 2, T)))
    q, k, v, dout = inputs(k_start.shape[1], T, *heads, E, dtype)
    actual = jax.jit(partial(with_gradients, attend))(q, k, v, dout, k_start, k_end)
    expected = jax.jit(partial(with_gradients, ia.reference))(
        *(x.astype(F32) for x in (q, k, v, dout)), k_start, k_end)
    assert_close(actual, expected, dtype)


@pytest.fixture
def small_blocks(monkeypatch):
    """The CPU's form for long rows, on rows of a test's size."""
    monkeypatch.setattr(cpu, "DENSE_UP_TO", 0)
    monkeypatch.setattr(cpu, "BLOCK_Q", 32)
    monkeypatch.setattr(cpu, "BLOCK_K", 16)


@pytest.fixture(params=["dense", "one piece", "blocks"])
def form(request, monkeypatch):
    """Each of the CPU's forms."""
    if request.param != "dense":
        request.getfixturevalue("small_blocks")
    if request.param == "one piece":
        monkeypatch.setattr(cpu, "BLOCK_K", 128)  # rows of these tests have two such blocks


@pytest.mark.parametrize("name", ["adjacent images", "padding", "random"])
@pytest.mark.parametrize("image_attention", ["bidirectional", "causal"])
def test_reference_is_softmax_under_the_dense_mask(packed, name, image_attention):
    rows = packed(name, 2, 120)
    q, k, v, _ = (np.asarray(x, np.float64) for x in inputs(120, 120, 4, 2, 8, F32))
    logits = np.einsum("bthe,bshe->bhts", q, k.repeat(2, axis=2)) / np.sqrt(8)
    logits = np.where(np.asarray(dense_mask(*rows, image_attention))[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshe->bthe", weights, v.repeat(2, axis=2))
    q, k, v = (jnp.asarray(x, F32) for x in (q, k, v))
    actual = ia.reference(q, k, v, *key_intervals(*rows, image_attention))
    np.testing.assert_allclose(actual, expected, atol=2e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_cpu_forms(packed, form, case):
    check(ia.attention, packed, *case)


@pytest.mark.parametrize("queries", [slice(70, 153), slice(170, 171)], ids=["a slice", "one token"])
def test_some_queries_against_all_keys(packed, form, queries):
    """A device's part of a row; a token that is decoded."""
    check(ia.attention, packed, "random", 200, (4, 2), 16, F32, queries)


def test_no_gradient_leaves_an_interval(packed, form):
    """Exactly zero, not small: from one query to every key that it does not see; and no bit of it changes."""
    rows = packed("adjacent images", 2, 200)
    k_start, k_end = key_intervals(*rows)
    q, k, v, _ = inputs(200, 200, 4, 2, 16, F32)
    visible = np.asarray(dense_mask(*rows))
    attend = jax.jit(with_gradients, static_argnums=0)
    for at in (5, 60, 85, 119, 199):
        dout = np.zeros_like(q)
        dout[:, at] = 1
        out, _, dk, dv = attend(ia.attention, q, k, v, dout, k_start, k_end)
        for grad in (dk, dv):
            reached = np.abs(np.asarray(grad)).sum((2, 3)) > 0
            np.testing.assert_array_equal(reached, visible[:, at])
        hidden = ~visible[:, at, :, None, None]
        other, *_ = attend(ia.attention, q, *(np.where(hidden, 50 * x + 7, x) for x in (k, v)), dout,
                           k_start, k_end)
        np.testing.assert_array_equal(out[:, at], other[:, at])


def test_inside_shard_map(packed):
    """Rows, heads and, with keys gathered, positions over eight devices: the same numbers."""
    k_start, k_end = map(np.asarray, key_intervals(*packed("random", 2, 160)))
    q, k, v, dout = inputs(160, 160, 4, 2, 16, F32)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("row", "length", "head"),
                axis_types=(AxisType.Auto,) * 3)
    x, interval = PartitionSpec("row", "length", "head"), PartitionSpec("row", "length")

    def attend(q, k, v, k_start, k_end):
        k, v = (jax.lax.all_gather(x, "length", axis=1, tiled=True) for x in (k, v))
        return ia.attention(q, k, v, k_start, k_end)

    with jax.set_mesh(mesh):
        sharded = jax.shard_map(attend, in_specs=(x, x, x, interval, interval), out_specs=x, check_vma=False)
        actual = jax.jit(partial(with_gradients, sharded))(q, k, v, dout, k_start, k_end)
    expected = jax.jit(partial(with_gradients, ia.reference))(q, k, v, dout, k_start, k_end)
    assert_close(actual, expected, F32)


def rematerialised(policy):
    attend = jax.checkpoint(lambda *arguments: jnp.sin(ia.attention(*arguments)), policy=policy)
    return lambda *arguments: with_gradients(attend, *arguments)


@pytest.mark.parametrize("policy, loops", [
    (REMAT_POLICIES["attention"], 4), (REMAT_POLICIES["dots"], 4), (REMAT_POLICIES["full"], 6)])
def test_saved_residuals_spare_the_backward_a_forward(packed, small_blocks, policy, loops):
    """Forward and backward are two loops each (query blocks, key blocks); remat alone adds one forward."""
    k_start, k_end = key_intervals(*packed("random", 2, 160))
    arguments = *inputs(160, 160, 4, 2, 16, F32), k_start, k_end
    assert jax.jit(rematerialised(policy)).lower(*arguments).compile().as_text().count(" while(") == loops


@pytest.mark.parametrize("shapes, message", [
    (((2, 8, 3, 4), (2, 8, 2, 4), (2, 8)), "multiple"),
    (((2, 8, 4, 4), (1, 8, 2, 4), (2, 8)), "do not fit"),
    (((2, 8, 4, 4), (2, 9, 2, 4), (2, 9)), "intervals"),
])
def test_shapes_that_disagree_are_refused(shapes, message):
    q, k, interval = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(UserError, match=message):
        ia.attention(q, k, k, interval, interval)


# TPU kernel

TPU_CASES = [  # the fast two first; 300 and 200 are no multiples of a block
    (("adjacent images", 200, (2, 1), 16, F32), slice(None)),
    (("random", 200, (2, 2), 16, BF16), slice(None)),
    (("many documents", 300, (4, 2), 32, F32), slice(None)),
    (("padding", 384, (4, 1), 32, F32), slice(None)),
    (("one-patch images", 300, (4, 4), 64, F32), slice(None)),
    (("random", 512, (4, 2), 128, BF16), slice(None)),
    (("random", 400, (4, 2), 32, F32), slice(130, 333)),
    (("random", 300, (4, 2), 32, F32), slice(270, 271)),
    (("image across blocks", 400, (4, 2), 80, F32), slice(None)),
    (("one document", 400, (2, 1), 32, BF16), slice(None)),
]


@pytest.mark.parametrize("case, queries", [
    pytest.param(*case, marks=[pytest.mark.slow] * (n > 1), id=case[0][0]) for n, case in enumerate(TPU_CASES)])
def test_tpu_kernel_interpreted(packed, case, queries):
    check(as_attention(tpu, blocks=(128, 128), interpret=True), packed, *case, queries)


def test_tpu_blocks_fit():
    assert tpu.block_sizes(4096, 32768, 128, BF16) == (512, 512)
    assert tpu.block_sizes(4096, 4096, 256, F32) == (256, 256)
    assert tpu.block_sizes(640, 100, 64, BF16) == (128, 128)


def ahead_of_time(topology: str, attend, T, S, heads, E, dtype):
    """Compiles attend's forward and backward for four chips: rows over two, heads over two."""
    os.environ.update(ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices[:4]).reshape(2, 2), ("row", "head"), axis_types=(AxisType.Auto,) * 2)
    x, interval = PartitionSpec("row", None, "head"), PartitionSpec("row")
    shapes = [((2, T, heads[0], E), dtype, x), *[((2, S, heads[1], E), dtype, x)] * 2,
              ((2, T, heads[0], E), dtype, x), *[((2, T), jnp.int32, interval)] * 2]
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
                 for shape, dtype, spec in shapes]
    with jax.set_mesh(mesh):
        sharded = jax.shard_map(attend, in_specs=(x, x, x, interval, interval), out_specs=x, check_vma=False)
        return jax.jit(partial(with_gradients, sharded)).lower(*arguments).compile()


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='libtpu is not installed (pip install "jax[tpu]"): no ahead-of-time compile for TPUs')


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("T, S, heads, E, dtype", [
    (4096, 4096, (8, 4), 128, BF16),
    (1000, 2000, (4, 2), 64, F32),
    (4096, 4096, (4, 4), 256, F32),
    (32768, 32768, (4, 2), 128, BF16),
    (192, 192, (4, 2), 8, F32),
])
def test_tpu_kernel_compiles(topology, T, S, heads, E, dtype):
    """On a CPU host, through the dispatch: memory stays linear, so a T x S array was not made."""
    compiled = ahead_of_time(topology, ia.attention, T, S, heads, E, dtype)
    assert compiled.memory_analysis().temp_size_in_bytes < 256 * 2**20


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("policy, kernels", [(REMAT_POLICIES["attention"], 3), (None, 4)])
def test_tpu_kernel_is_not_run_again(policy, kernels):
    attend = jax.checkpoint(lambda *arguments: jnp.sin(ia.attention(*arguments)), policy=policy)
    compiled = ahead_of_time("v5e:2x2", attend, 1024, 1024, (4, 2), 64, BF16)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == kernels


# GPU kernel


@pytest.mark.parametrize("case, queries", [
    pytest.param(*case, marks=[pytest.mark.slow] * (n > 0), id=case[0][0]) for n, case in enumerate(TPU_CASES)])
def test_gpu_kernel_interpreted(packed, case, queries):
    check(as_attention(gpu, sizes=gpu.Launch(32, 64, 4, 1), interpret=True), packed, *case, queries)


@pytest.mark.slow
@pytest.mark.parametrize("T, S, heads, E, dtype", [
    (4096, 4096, (8, 4), 128, BF16),
    (1000, 2000, (4, 2), 64, F32),
    (2048, 2048, (4, 4), 256, BF16),
    (2048, 2048, (4, 1), 80, F32),
])
def test_gpu_kernel_lowers_for_cuda(T, S, heads, E, dtype):
    """Forward, dq and dkv reach Triton; this checks neither registers nor speed."""
    target = "__gpu$xla.gpu.triton"
    shapes = [((2, T, heads[0], E), dtype), *[((2, S, heads[1], E), dtype)] * 2, ((2, T, heads[0], E), dtype),
              *[((2, T), jnp.int32)] * 2]
    exported = jax.export.export(
        jax.jit(partial(with_gradients, ia.attention)), platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(target)],
    )(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    assert exported.mlir_module().count(f"custom_call @{target}") == 3


# CPU memory


@pytest.mark.slow
def test_cpu_memory_grows_with_the_length_only():
    """T = 32k, 8 heads of 64, forward and backward, where dense scores are 32 GiB. The whole process peaked at
    894 MiB on a processor with AVX2 only and 1,137 to 1,160 MiB on one with AVX-512, the same revision too:
    the program's own temporaries are 9 MiB, the rest is outside its account.
    """
    command = [sys.executable, "benchmarks/attention.py", "--child", "interval", "32768", "--seconds", "0"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    result = subprocess.run(command, cwd=REPO, env=environment, check=True, stdout=subprocess.PIPE)
    assert json.loads(result.stdout)["forward_backward_peak_mib"] < 1280
