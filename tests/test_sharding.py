"""The mesh, the logical axis rules, and the three traps that tfusion/sharding.py closes."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec

from tfusion import sharding
from tfusion.config import MeshConfig
from tfusion.errors import UserError
from tfusion.objectives import make_objective
from tfusion.types import ImageBatch


def without_mesh(fn):
    """fn() where no mesh was set: the current mesh belongs to the thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(fn).result()


def boxed(shape, *names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def test_unknown_logical_axis_raises():
    with pytest.raises(UserError, match=r"unknown logical axis 'embd'; known: batch, .*embed"):
        sharding.spec("batch", "embd")
    with pytest.raises(UserError, match="'head'"):
        sharding.constrain(jnp.zeros((2, 2)), "batch", "head")
    with pytest.raises(UserError, match="'mpl'"):
        sharding.shardings({"w": boxed((8, 8), "embed", "mpl")}, sharding.make_mesh(MeshConfig(2, 2, 2, 1)))


def test_spec_names_mesh_axes():
    want = PartitionSpec(("data", "fsdp"), None, "tensor", None)
    assert sharding.spec("batch", None, "mlp", "hidden") == want


def test_every_rule_names_axes_of_the_mesh():
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2, 1))
    for axes in sharding.RULES.values():
        assert set((axes,) if isinstance(axes, str) else axes or ()) <= set(mesh.axis_names)


def test_constrain_without_a_mesh_raises():
    assert jax.device_count() == 8
    with pytest.raises(RuntimeError, match=r"jax\.set_mesh"):
        without_mesh(lambda: sharding.constrain(jnp.zeros((8, 4)), "batch", "hidden"))


def test_entering_the_mesh_the_old_way_raises():
    """`with mesh:` drops constraints in silence; here it is as if there were no mesh."""
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2, 1))

    def old_way():
        with mesh:
            return jax.jit(lambda x: sharding.constrain(x, "batch", "hidden")).lower(jnp.zeros((8, 4)))

    with pytest.raises(RuntimeError, match=r"jax\.set_mesh"):
        without_mesh(old_way)


def test_constrain_shards():
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2, 1))
    with jax.set_mesh(mesh):
        lowered = jax.jit(lambda x: sharding.constrain(x, "batch", "mlp")).lower(jnp.zeros((8, 4)))
        assert "sdy.sharding_constraint" in lowered.as_text()
        out = jax.jit(lambda x: sharding.constrain(x, "batch", "mlp"))(jnp.zeros((8, 4)))
    assert {s.data.shape for s in out.addressable_shards} == {(2, 2)}


def test_axes_are_auto():
    assert sharding.make_mesh(MeshConfig(2, 2, 2, 1)).axis_types == (AxisType.Auto,) * 4


def test_fsdp_takes_the_devices_left_over():
    shape = sharding.make_mesh(MeshConfig(data=1, fsdp=-1, tensor=1, sequence=2)).shape
    assert dict(shape) == {"data": 1, "fsdp": 4, "sequence": 2, "tensor": 1}
    shape = sharding.make_mesh(MeshConfig(2, -1, 1, 1)).shape
    assert dict(shape) == {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1, 1), (2, 2, 1, 1), (4, 4, 1, 1), (3, -1, 1, 1), (16, -1, 1, 1),
                                   (2, 2, 2, 2), (1, -1, 1, 3)])
def test_mesh_that_does_not_fit_raises(sizes):
    with pytest.raises(UserError, match=r"does not fit 8 devices; set mesh\.\*"):
        sharding.make_mesh(MeshConfig(*sizes))


def test_indivisible_dimension_names_the_parameter():
    mesh = sharding.make_mesh(MeshConfig(1, 4, 2, 1))
    tree = {"decoder": {"wq_kernel": boxed((8, 6), "embed", "heads"), "odd": boxed((6, 8), "embed", None)}}
    with pytest.raises(UserError, match=r"'odd'\]: axis 'embed' of size 6 does not divide over 4.*\(fsdp\)"):
        sharding.shardings(tree, mesh)


def test_the_model_on_a_mesh_it_does_not_divide_over(cfg):
    params = jax.eval_shape(make_objective(cfg).init, jax.random.key(0))  # 2 kv heads of 8
    sharding.shardings(params, sharding.make_mesh(MeshConfig(1, 1, 8, 1)))
    odd = {"w": boxed((cfg.model.adapter.patch_values, 12), "patch", "mlp")}
    with pytest.raises(UserError, match=r"\['w'\]: axis 'mlp' of size 12 does not divide over 8"):
        sharding.shardings(odd, sharding.make_mesh(MeshConfig(1, 1, 8, 1)))


def test_unboxed_leaves_are_replicated():
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2, 1))
    got = sharding.shardings({"step": jax.ShapeDtypeStruct((), jnp.int32)}, mesh)
    assert got["step"].spec == PartitionSpec()


def test_batch_size_that_does_not_divide_raises():
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2, 1))
    sharding.check_batch_size(8, 2, mesh)
    with pytest.raises(UserError, match=r"= 6 rows do not divide over 4 devices .*batch_size=4 or 8$"):
        sharding.check_batch_size(6, 1, mesh)


def test_put_batch_round_trip():
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2, 1))
    rng = np.random.default_rng(0)
    batch = ImageBatch(np.arange(8, dtype=np.int32), rng.integers(0, 256, (8, 4, 4, 3), np.uint8))
    got = sharding.put_batch(batch, mesh, 8)
    assert type(got) is ImageBatch
    for x, y in zip(got, batch):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), y)
        assert {s.data.shape for s in x.addressable_shards} == {(2, *y.shape[1:])}
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), y[shard.index])


# ---------------------------------------------------------------- shard_map by logical axes

def weigh(x_BTH, y_BSH, w_T):
    """Each query's weight times the sum of the keys of its row: every output needs every key."""
    return w_T[None, :, None] * x_BTH * (y_BSH**2).sum(axis=1, keepdims=True)


AXES = (("batch", "length", "heads"), ("batch", None, "heads"), ("length",))
SHAPES = (4, 8, 2), (4, 8, 2), (8,)
MESHES = [(2, 2, 2, 1), (1, 2, 2, 2), (1, 1, 1, 8), (2, 1, 1, 4)]


def arrays():
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]


@pytest.mark.parametrize("sizes", MESHES)
def test_sharded_splits_and_gathers(sizes):
    """fn sees its part of what is split and the whole of what is not; the result is put together again."""
    seen = []

    def fn(*parts):
        seen.append([part.shape for part in parts])
        return weigh(*parts)

    data, fsdp, tensor, sequence = sizes
    with jax.set_mesh(sharding.make_mesh(MeshConfig(*sizes))):
        got = jax.jit(sharding.sharded(fn, AXES, AXES[0]))(*arrays())
    B, T, H = 4 // (data * fsdp), 8 // sequence, 2 // tensor
    assert seen[0] == [(B, T, H), (B, 8, H), (T,)]
    np.testing.assert_allclose(got, weigh(*arrays()), rtol=1e-5)
    assert {s.data.shape for s in got.addressable_shards} == {(B, T, H)}


@pytest.mark.parametrize("sizes", MESHES)
def test_gradients_of_gathered_arguments_are_summed(sizes):
    """Over queries elsewhere for the keys, over rows and heads elsewhere for the weights."""
    rng = np.random.default_rng(1)
    probe = rng.standard_normal(SHAPES[0]).astype(np.float32)

    def gradients(fn):
        return jax.jit(jax.grad(lambda *xs: (probe * fn(*xs)).sum(), argnums=(0, 1, 2)))(*arrays())

    want = gradients(weigh)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(*sizes))):
        got = gradients(sharding.sharded(weigh, AXES, AXES[0]))
    for a, b in zip(got, want):
        assert np.abs(b).min() > 0
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 4, 2, 1), (2, 2, 1, 2), (1, 1, 2, 4)])
def test_what_does_not_divide_is_repeated(sizes):
    """Three rows, six positions, two heads: axes that do not divide are left out, nothing changes."""
    rng = np.random.default_rng(2)
    odd = [rng.standard_normal(shape).astype(np.float32) for shape in ((3, 6, 2), (3, 6, 2), (6,))]

    def both(fn):
        return jax.jit(jax.value_and_grad(lambda *xs: (fn(*xs) ** 2).sum(), argnums=(0, 1, 2)))(*odd)

    want, want_grads = both(weigh)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(*sizes))):
        got, grads = both(sharding.sharded(weigh, AXES, AXES[0]))
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    for a, b in zip(grads, want_grads):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4)


def test_heads_that_do_not_divide_raise():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=4, sequence=1))
    sharding.check_heads(8, mesh)
    with pytest.raises(UserError, match=r"^model\.num_kv_heads = 2 does not divide over mesh\.tensor = 4"):
        sharding.check_heads(2, mesh)


def test_sharded_on_one_device_or_without_a_mesh_is_the_function_itself():
    assert sharding.sharded(weigh, AXES, AXES[0]) is weigh  # the tests' own mesh: one device
    assert without_mesh(lambda: sharding.sharded(weigh, AXES, AXES[0])) is weigh


@pytest.mark.parametrize("sizes, split", [
    ((1, 1, 1, 8), {"length": 8}), ((1, 8, 1, 1), {"batch": 8, "embed": 8}),
    ((4, 2, 1, 1), {"batch": 8, "embed": 2}),
    ((1, 2, 2, 2), {"batch": 2, "embed": 2, "length": 2, "heads": 2, "kv_heads": 2, "mlp": 2, "vocab": 2})])
def test_num_shards(sizes, split):
    with jax.set_mesh(sharding.make_mesh(MeshConfig(*sizes))):
        assert {name: sharding.num_shards(name) for name in sharding.RULES} == {
            name: split.get(name, 1) for name in sharding.RULES}
    assert {sharding.num_shards(name) for name in sharding.RULES} == {1}  # one device
    assert without_mesh(lambda: {sharding.num_shards(name) for name in sharding.RULES}) == {1}


def test_length_that_does_not_divide_raises():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=1, sequence=4))
    sharding.check_length(128, mesh)
    with pytest.raises(UserError, match=r"^data\.seq_len = 130 does not divide over mesh\.sequence = 4"):
        sharding.check_length(130, mesh)
