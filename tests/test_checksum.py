"""The sums of an array's bits: one wrong bit changes them, another mesh does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tfusion import checksum, config, sharding

X = np.random.default_rng(0).standard_normal((8, 4, 6), np.float32)


def sums(x, name="x"):
    (leaf,) = checksum.leaves("item", {name: x}).values()
    return leaf[1:]


@pytest.mark.parametrize(
    "spec", [(), ("data",), (None, "fsdp", "tensor"), (("data", "fsdp"), "tensor")], ids=str)
def test_the_same_on_any_mesh(spec):
    mesh = sharding.make_mesh(config.MeshConfig(2, 2, 2, 1), jax.devices())
    with jax.set_mesh(mesh):
        assert sums(jax.device_put(X, NamedSharding(mesh, PartitionSpec(*spec)))) == sums(X)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool"])
def test_every_bit_of_every_type_counts(dtype):
    x = np.asarray(jnp.asarray(X[0] > 0 if dtype == "bool" else X[0] * 50).astype(dtype))
    seen = {tuple(sums(x))}
    for byte in range(x.dtype.itemsize):
        for bit in range(1 if dtype == "bool" else 8):
            y = x.copy()
            y.view(np.uint8).reshape(-1)[7 * x.dtype.itemsize + byte] ^= 1 << bit
            seen.add(tuple(sums(y)))
    assert len(seen) == 1 + x.dtype.itemsize * (1 if dtype == "bool" else 8)


def test_both_sums_change_with_a_bit():
    y = X.copy()
    y.view(np.uint32)[3, 2, 1] ^= 1
    assert all(a != b for a, b in zip(sums(X), sums(y)))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_elements_that_changed_places_change_both_sums(axis):
    assert all(a != b for a, b in zip(sums(X), sums(np.flip(X, axis))))


def test_leaves_of_other_names_have_other_sums():
    assert sums(X, "a") != sums(X, "b")


def test_names_forms_and_what_is_empty():
    tree = {"a": [jnp.zeros((), jnp.int32), {"b": jnp.zeros((0, 3), jnp.bfloat16)}], "none": None}
    assert checksum.forms("item", tree) == {"item/a/0": "int32[]", "item/a/1/b": "bfloat16[0,3]"}
    assert checksum.leaves("item", tree)["item/a/1/b"] == ["bfloat16[0,3]", 0, 0]
    assert checksum.leaves("item", None) == {}
