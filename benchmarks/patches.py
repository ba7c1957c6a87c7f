"""Patches into the row and out of it: what the compiler makes of two forms, ahead of time, for TPUs.

    python benchmarks/patches.py           needs libtpu, no TPU; writes benchmarks/results/patches_tpu.json

gather: tfusion/models/transfusion.py. Each position looks up its patch, each patch its position, forward and
backward. scatter: patches are written at their positions, and the gradient of reading them out is added there.
Shapes of the 0.76B model's rows: T 4096, D 1536, 256 patches an image. Around them stands an elementwise model;
losses and gradients are compiled, nothing is run. Cycles are the compiler's own estimates, summed once over
all that it estimates: they rank, they do not time.
"""

import math
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp

from benchmarks.report import machine, save
from experiments import transfusion as experiment
from tests import hlo
from tfusion import config, objectives, sharding  # noqa: F401 (registers)
from tfusion.accelerators import parse_accelerator
from tfusion.config import MeshConfig
from tfusion.models import transfusion
from tfusion.planning import topology

RESULT = Path(__file__).with_name("results") / "patches_tpu.json"
CASES = (("v5litepod-8", MeshConfig(data=1, fsdp=8, tensor=1, sequence=1), 16),
         ("v5litepod-8", MeshConfig(data=1, fsdp=2, tensor=1, sequence=4), 4),
         ("v5p-16", MeshConfig(data=1, fsdp=8, tensor=1, sequence=1), 16))
BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4}


def positions(image_start_BI, num_patches: int):
    rows = jnp.arange(len(image_start_BI))[:, None]
    return rows, (image_start_BI[:, :, None] + jnp.arange(num_patches)).reshape(len(rows), -1)


def scatter_put(x_BTD, patches_BIND, image_start_BI):
    B, _, N, D = patches_BIND.shape
    return x_BTD.at[positions(image_start_BI, N)].set(patches_BIND.reshape(B, -1, D), mode="drop")


def scatter_take(h_BTD, image_start_BI, num_patches: int):
    return h_BTD.at[positions(image_start_BI, num_patches)].get(mode="fill", fill_value=0)


def gather_put(x_BTD, patches_BIND, image_start_BI):
    places = transfusion.patch_places(image_start_BI, patches_BIND.shape[2], x_BTD.shape[1])
    return transfusion.put_patches(x_BTD, patches_BIND, places)


def gather_take(h_BTD, image_start_BI, num_patches: int):
    places = transfusion.patch_places(image_start_BI, num_patches, h_BTD.shape[1])
    return transfusion.take_patches(h_BTD, places, num_patches)


FORMS = {"scatter": (scatter_put, scatter_take), "gather": (gather_put, gather_take)}


def step(put, take, num_patches: int):
    """(x_BTD, patches_BIND, image_start_BI) -> (loss, gradients of the first two)."""
    def loss(x_BTD, patches_BIND, image_start_BI):
        x_BTD = put(jnp.tanh(x_BTD), jnp.tanh(patches_BIND), image_start_BI)
        h_BTD = jnp.tanh(sharding.constrain(x_BTD, "batch", "length", "hidden")) * x_BTD
        h_BTD = sharding.constrain(h_BTD, "batch", "length", "hidden")
        return jnp.sum(jnp.tanh(take(h_BTD, image_start_BI, num_patches)).astype(jnp.float32) ** 2)

    return jax.jit(jax.value_and_grad(loss, (0, 1)))


def compiled(form: str, accelerator: str, mesh_cfg: MeshConfig, rows: int) -> dict:
    cfg = config.from_dict(experiment.get_config("0.76b"))
    I, N, D = cfg.rows.image_slots, cfg.model.num_patches, cfg.model.d_model
    mesh, began = topology.make_mesh(mesh_cfg, parse_accelerator(accelerator)), time.perf_counter()

    def array(shape, dtype, *names):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, sharding.spec(*names)))

    with jax.set_mesh(mesh):
        made = step(*FORMS[form], N).lower(
            array((rows, cfg.data.seq_len, D), jnp.bfloat16, "batch", "length", "hidden"),
            array((rows, I, N, D), jnp.bfloat16, "batch"), array((rows, I), jnp.int32, "batch")).compile()
    text = made.as_text()
    exchanged = {array: n for array, n in hlo.collectives(text).items()}
    return {
        "form": form, "topology": accelerator, "mesh": dict(mesh.shape), "rows": rows,
        "collectives": hlo.listed(exchanged).splitlines(),
        "collective_mib": sum(n * BYTES[dtype] * math.prod(shape)
                              for (_, _, dtype, shape), n in exchanged.items()) / 2**20,
        **{f"{op}s": len(re.findall(rf" {op}\(", text)) for op in ("gather", "scatter", "sort")},
        "estimated_megacycles": sum(map(int, re.findall(r'estimated_cycles":"(\d+)"', text))) / 1e6,
        "accessed_mib": made.cost_analysis()["bytes accessed"] / 2**20,
        "temporary_mib": made.memory_analysis().temp_size_in_bytes / 2**20,
        "compile_seconds": round(time.perf_counter() - began)}


def main() -> None:
    topology.use_host_only()
    about, found = machine() | {"libtpu": topology.libtpu_version()}, []
    for case in CASES:
        for form in FORMS:
            found.append(compiled(form, *case))
            print(found[-1], flush=True)
    save(RESULT, about, {"compiled": found})


if __name__ == "__main__":
    main()
