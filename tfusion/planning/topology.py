"""Devices and meshes of a TPU slice that this machine does not have.

libtpu describes a slice and compiles for it on any x86 host. That libtpu accepts a shape does not make it
valid: the shapes are those of tfusion/accelerators.py.
"""

import importlib.metadata
import importlib.util
import os

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh

from tfusion import sharding
from tfusion.accelerators import Accelerator
from tfusion.config import MeshConfig
from tfusion.errors import UserError

# libtpu reads these when it is loaded: let several processes load it, ask no metadata server, keep quiet.
LIBTPU_ENVIRONMENT = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1",
                      "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
                      "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}


def use_host_only() -> None:
    """Keeps this process off any accelerator; call it before jax starts a backend or loads libtpu."""
    os.environ.update(LIBTPU_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")


def have_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def libtpu_version() -> str | None:
    return importlib.metadata.version("libtpu") if have_libtpu() else None


class Unknown(UserError):
    """A slice that the installed libtpu does not know."""


def why_by_formula(accelerator: Accelerator) -> str:
    """Why nothing is compiled for it; "" where libtpu does. Raises UserError where it would and is not
    installed."""
    if not accelerator.chip.is_tpu:
        return "GPUs"
    try:
        devices(accelerator)
    except Unknown as e:
        return str(e)
    return ""


def devices(accelerator: Accelerator) -> list:
    """The devices of a TPU slice, ordered by slice and id. Raises UserError where libtpu is not installed, and
    Unknown where it cannot describe the slice."""
    if not have_libtpu():
        raise UserError("compiling for a TPU needs libtpu: pip install '.[tpu]' (no TPU is needed)")
    os.environ.update(LIBTPU_ENVIRONMENT)
    options = dict(accelerator.chip.topology_options)
    if accelerator.num_slices > 1:
        options["num_slices"] = accelerator.num_slices
    if accelerator.chips_per_slice == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{accelerator.chip.name}:{accelerator.topology}"
    try:
        found = topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices
    except Exception as e:  # whatever libtpu raises: its first line is what a user can act on
        raise Unknown(f"libtpu {libtpu_version()} cannot describe {accelerator.name} ({name}): "
                      f"{str(e).splitlines()[0]}") from e
    return sorted(found, key=lambda d: (getattr(d, "slice_index", 0) or 0, d.id))


def mesh_shape(cfg: MeshConfig, accelerator: Accelerator) -> dict[str, int]:
    """{axis: size} over the devices. Raises UserError where training could not make that mesh."""
    return sharding.mesh_shape(cfg, accelerator.num_devices, accelerator.num_slices)


def abstract_mesh(cfg: MeshConfig, accelerator: Accelerator) -> AbstractMesh:
    """The mesh without devices: enough for shapes, shardings and traces, of GPUs too."""
    shape = mesh_shape(cfg, accelerator)
    return AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def make_mesh(cfg: MeshConfig, accelerator: Accelerator) -> Mesh:
    """The mesh that training would make."""
    mesh_shape(cfg, accelerator)
    return sharding.make_mesh(cfg, devices(accelerator))
