"""Mesh and logical axis rules: the only file that names mesh axes.

Everything else names *logical* axes ('batch', 'embed', ...). Three traps of the pinned versions are
closed here: a mesh's axes are Explicit unless told otherwise; constraints are silently
dropped unless the mesh was entered with `jax.set_mesh`; a misspelt axis would be silently unsharded.
"""

import math
import re

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from tfusion.config import MeshConfig
from tfusion.errors import UserError

AXES = ("data", "fsdp", "sequence", "tensor")

RULES = {  # logical axis -> mesh axes
    "batch": ("data", "fsdp"),
    "length": "sequence",
    "images": None,
    "hidden": None,  # an activation's width
    "embed": "fsdp",  # a parameter's width
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "vocab": "tensor",
    "patch": None,
    "time": None,
    "norm": None,
    "layers": None,
}


def num_slices(devices) -> int:
    """How many TPU slices the devices stand in: groups of them that only the slow network joins."""
    if devices[0].platform != "tpu":  # GPUs' hosts are numbered so too
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def mesh_shape(cfg: MeshConfig, num_devices: int, slices: int = 1) -> dict[str, int]:
    """{mesh axis: size}, an axis of -1 taking what is left. Raises UserError where the product is another, and
    where the slices cannot share the data axis."""
    sizes = {axis: getattr(cfg, axis) for axis in AXES}
    for axis in (axis for axis, size in sizes.items() if size == -1):
        sizes[axis] = max(num_devices // math.prod(size for size in sizes.values() if size != -1), 1)
    if math.prod(sizes.values()) != num_devices:
        text = " x ".join(f"{axis}={getattr(cfg, axis)}" for axis in AXES)
        raise UserError(f"mesh {text} does not fit {num_devices} devices; set mesh.* so that the product is "
                        f"{num_devices}")
    if sizes["data"] % slices:
        raise UserError(f"mesh.data = {sizes['data']} does not divide over {slices} slices, between which only "
                        f"data may cross the slow network; set --config.mesh.data={slices} or a multiple")
    return sizes


def make_mesh(cfg: MeshConfig, devices=None) -> Mesh:
    """A (data, fsdp, sequence, tensor) mesh over all devices, or over those given.

    Over several TPU slices the outermost axis, data, crosses the slow network between them, and nothing else
    does; within each the axes follow its torus. Raises UserError where that cannot be.
    """
    devices = jax.devices() if devices is None else devices
    slices = num_slices(devices)
    sizes = mesh_shape(cfg, len(devices), slices)
    inside = sizes["data"] // slices, *list(sizes.values())[1:]
    # jax.make_mesh would refuse an axis that takes part of a torus axis
    if slices == 1:
        grid = mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1, 1), devices,
                                                    allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse_mesh(text: str | None) -> Mesh:
    """'fsdp=4,tensor=2' -> a mesh over all devices; nothing -> one device, or of several processes all, on
    fsdp within slices. Raises UserError on another text."""
    if not text:
        if jax.process_count() == 1:
            return make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
        return make_mesh(MeshConfig(num_slices(jax.devices()), -1, 1, 1))
    sizes = [re.fullmatch(rf"({'|'.join(AXES)})=(-1|[1-9]\d*)", part) for part in text.split(",")]
    if not all(sizes) or len({size[1] for size in sizes}) < len(sizes):
        raise UserError(f"--mesh={text} must name sizes of {', '.join(AXES)}, such as --mesh=fsdp=4,tensor=2")
    cfg = MeshConfig(**{**dict.fromkeys(AXES, 1), **{size[1]: int(size[2]) for size in sizes}})
    cfg.check("--mesh")
    return make_mesh(cfg)


def local_mesh(number: int | None = None) -> Mesh:
    """A mesh over devices of this process alone, all or so many, on fsdp."""
    return make_mesh(MeshConfig(1, -1, 1, 1), jax.local_devices()[:number])


def spec(*names: str | None) -> PartitionSpec:
    """Logical axis names -> PartitionSpec. Raises UserError on a name that has no rule."""
    for name in names:
        if name is not None and name not in RULES:
            raise UserError(f"unknown logical axis '{name}'; known: {', '.join(RULES)}")
    return PartitionSpec(*(RULES[name] if name else None for name in names))


def constrain(x, *names: str | None):
    """Constrains x to the sharding its logical axes have on the current mesh (`jax.set_mesh`)."""
    if jax.sharding.get_abstract_mesh().empty:
        if jax.device_count() == 1:
            return x
        raise RuntimeError("constrain() needs a mesh: wrap the call in `with jax.set_mesh(mesh)`")
    return jax.lax.with_sharding_constraint(x, spec(*names))


def num_shards(name: str) -> int:
    """Over how many devices the current mesh spreads a logical axis."""
    mesh, axes = jax.sharding.get_abstract_mesh(), RULES[name]
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in axes)


def split_rows(x):
    """x with its first axis over the devices of the current mesh, as rows are; as it is where there is no mesh,
    or it does not divide."""
    number = num_shards("batch")
    return x if number == 1 or len(x) % number else jax.device_put(x, batch_sharding(jax.sharding.get_mesh()))


def sharded(fn, in_axes, out_axes):
    """shard_map by logical axes, for kernels, which the compiler cannot partition: fn sees one device's part.

    in_axes: one tuple of logical axis names (or None) per argument; out_axes: of the result, or of each. One
    named None is whole on every device: what was split is gathered on the way in, and its gradient summed on
    the way back. Mesh axes that some dimension does not divide over (a few rows to sample) are left out of
    all arguments alike: those devices repeat the work.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return fn

    def parts(axes):
        return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))

    def run(*arguments):
        uneven = {axes for x, names in zip(arguments, in_axes) for size, axes in zip(x.shape, spec(*names))
                  if axes and size % parts(axes)}

        def even(names):
            return PartitionSpec(*(None if axes in uneven else axes for axes in spec(*names)))

        several = isinstance(out_axes[0], tuple)
        return jax.shard_map(fn, in_specs=tuple(map(even, in_axes)), check_vma=False,
                             out_specs=tuple(map(even, out_axes)) if several else even(out_axes))(*arguments)

    return run


def sum_over(x, name: str):
    """Inside `sharded`: the sum over the devices that split a logical axis."""
    return jax.lax.psum(x, RULES[name]) if _split(name) else x


def max_over(x, name: str):
    """Inside `sharded`: the largest over the devices that split a logical axis."""
    return jax.lax.pmax(x, RULES[name]) if _split(name) else x


def _split(name: str) -> bool:
    """Whether the current mesh splits a logical axis, and `sharded` thus runs by parts."""
    return num_shards(name) > 1


def shardings(abstract_tree, mesh: Mesh):
    """Shardings for a tree of shapes, some boxed with logical axis names by `nn.Partitioned` boxes.

    Raises UserError where a dimension is not divisible by the mesh axes it is sharded over.
    """

    def one(path, leaf):
        names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else ()
        shape = (leaf.unbox() if names else leaf).shape
        partition = spec(*names)
        for size, name, axes in zip(shape, names, partition):
            axes = (axes,) if isinstance(axes, str) else axes or ()
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if size % parts:
                raise UserError(f"{jax.tree_util.keystr(path)}: axis '{name}' of size {size} does not "
                                 f"divide over {parts} devices ({'x'.join(axes)}); change mesh.*")
        return NamedSharding(mesh, partition)

    return jax.tree_util.tree_map_with_path(
        one, abstract_tree, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def placed(boxed, mesh: Mesh | AbstractMesh):
    """Shapes, boxed with logical axis names -> shapes with their shardings on the mesh."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                        nn.meta.unbox(boxed), shardings(boxed, mesh))


def whole(tree, mesh: Mesh | AbstractMesh):
    """Shapes -> shapes of arrays that every device has whole."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, spec("batch"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, num_microbatches: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError with the nearest batch sizes where rows do not divide over devices x micro-batches."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = devices * num_microbatches
    if batch_size % parts:
        below, above = batch_size // parts * parts, -(-batch_size // parts) * parts
        near = " or ".join(str(n) for n in (below, above) if n)
        raise UserError(
            f"train.batch_size = {batch_size} rows do not divide over {devices} devices (data x fsdp) x "
            f"{num_microbatches} micro-batches; set --config.train.batch_size={near}"
            + ("" if below else f", or --config.mesh.tensor={mesh.shape['tensor'] * -(-parts // batch_size)}"))


def check_length(seq_len: int, mesh: Mesh | AbstractMesh) -> None:
    if seq_len % mesh.shape["sequence"]:
        raise UserError(f"data.seq_len = {seq_len} does not divide over mesh.sequence = "
                        f"{mesh.shape['sequence']}; change one of them")


def check_heads(num_kv_heads: int, mesh: Mesh | AbstractMesh) -> None:
    if num_kv_heads % mesh.shape["tensor"]:
        raise UserError(f"model.num_kv_heads = {num_kv_heads} does not divide over mesh.tensor = "
                        f"{mesh.shape['tensor']}: a head is not split; change one of them")


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The numbers of a global batch's rows that devices of this process hold, sorted: where mesh axes other
    than those of rows span processes, several hold the same."""
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held.values()]))


def put_batch(batch, mesh: Mesh, batch_size: int):
    """The rows of `local_rows` (numpy, leading axis) -> arrays of the whole batch, sharded over rows."""
    sharding, rows = batch_sharding(mesh), local_rows(mesh, batch_size)

    def put(x):
        x = np.asarray(x)

        def part(index):  # of one device: rows that follow each other
            first, last, _ = index[0].indices(batch_size)
            return x[slice(*np.searchsorted(rows, (first, last)))]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, part)

    return jax.tree.map(put, batch)


def fetch(tree):
    """Arrays -> numpy, whole, in every process, wherever their parts are; every process calls it."""
    def one(x):
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(one, tree)
