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
    assert dict(sharding.make_mesh(MeshConfig(2, -1, 1, 1)).shape) == {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (2, 2, 1), (4, 4, 1), (3, -1, 1), (16, -1, 1)])
def test_mesh_that_does_not_fit_raises(sizes):
    with pytest.raises(UserError, match=r"does not fit 8 devices; set mesh\.\*"):
        sharding.make_mesh(MeshConfig(*sizes, 1))


def test_indivisible_dimension_names_the_parameter():
    mesh = sharding.make_mesh(MeshConfig(1, 4, 2, 1))
    tree = {"decoder": {"wq_kernel": boxed((8, 6), "embed", "heads"), "odd": boxed((6, 8), "embed", None)}}
    with pytest.raises(UserError, match=r"'odd'\]: axis 'embed' of size 6 does not divide over 4.*\(fsdp\)"):
        sharding.shardings(tree, mesh)


def test_the_model_on_a_mesh_it_does_not_divide_over(cfg):
    params = jax.eval_shape(make_objective(cfg).init, jax.random.key(0))  # 2 kv heads of 8
    sharding.shardings(params, sharding.make_mesh(MeshConfig(1, 1, 8, 1)))
    odd = {"w": boxed((cfg.model.patch_values, 12), "patch", "mlp")}
    with pytest.raises(UserError, match=r"\['w'\]: axis 'mlp' of size 12 does not divide over 8"):
        sharding.shardings(odd, sharding.make_mesh(MeshConfig(1, 1, 8, 1)))


def test_unboxed_leaves_are_replicated():
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2, 1))
    got = sharding.shardings({"step": jax.ShapeDtypeStruct((), jnp.int32)}, mesh)
    assert got["step"].spec == PartitionSpec()


def test_batch_size_that_does_not_divide_raises():
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2, 1))
    sharding.check_batch_size(8, mesh)
    with pytest.raises(UserError, match=r"= 6 does not divide over 4 devices \(data x fsdp\)"):
        sharding.check_batch_size(6, mesh)


def test_put_batch_round_trip():
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2, 1))
    rng = np.random.default_rng(0)
    batch = ImageBatch(np.arange(8, dtype=np.int32), rng.integers(0, 256, (8, 4, 4, 3), np.uint8))
    got = sharding.put_batch(batch, mesh)
    assert type(got) is ImageBatch
    for x, y in zip(got, batch):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), y)
        assert {s.data.shape for s in x.addressable_shards} == {(2, *y.shape[1:])}
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), y[shard.index])
