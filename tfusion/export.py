"""Writes what others can use of a run: its parameters, with all that their use needs, in a folder of their own.

  python -m tfusion.export --workdir=runs/quickstart/transfusion --out=exports/quickstart
      an Orbax checkpoint; `sample` and `evaluate` take the folder like a run, and its README.md has the lines
      that read it without tfusion, on any number of devices
  python -m tfusion.export --workdir=... --out=... --format=llama
      the transformer as safetensors in Hugging Face's Llama layout, its text logits compared; adapters beside
  python -m tfusion.export --workdir=... --out=... --weights=raw --dtype=bfloat16 --step=20000 --mesh=fsdp=8

Both are read back and compared before they stand at --out.
"""

from pathlib import Path

import jax
from absl import flags

from tfusion import distributed, exported, exporting, paths, sharding
from tfusion.errors import UserError, run
from tfusion.exporting import base, place
from tfusion.inference import trained
from tfusion.types import FORMAT_VERSION

WORKDIR = paths.define("workdir", None, "workdir of a run, or an Orbax export; gs:// too", buckets=True)
OUT = paths.define("out", None, "folder to make")
FORMAT = flags.DEFINE_enum("format", "orbax", list(exporting.FORMATS), "for Orbax and tfusion, or for Hugging "
                           "Face's transformers and what reads its files")
WEIGHTS = flags.DEFINE_enum("weights", None, ["ema", "raw"], "the moving average, or the weights themselves; "
                            "default: the average where the run kept one")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of the weights")
STEP = flags.DEFINE_integer("step", None, "which checkpoint; default: the latest")
MESH = flags.DEFINE_string("mesh", None,
                           "devices to spread the model over, such as fsdp=4; default: one, or all processes'")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace an export that stands at --out")


def main() -> None:
    if WORKDIR.value is None or OUT.value is None:
        raise UserError("--workdir=DIR, the workdir of a run, and --out=DIR, the folder to make, are needed")
    source, out, form = paths.path(WORKDIR.value), Path(OUT.value).resolve(), exporting.FORMATS[FORMAT.value]
    place.check(out, OVERWRITE.value)
    paths.check_writable(out.parent, "--out")
    distributed.start_process()
    mesh = sharding.parse_mesh(MESH.value)
    run_ = trained.load(source, STEP.value, mesh, WEIGHTS.value)
    form.check(run_.cfg, source)
    weights = trained.check_weights(run_.cfg, exported.about(source), WEIGHTS.value, source)
    about = {"format": FORMAT.value, "weights": weights, "dtype": DTYPE.value, "step": run_.step,
             "format_version": FORMAT_VERSION}
    with jax.set_mesh(mesh), place.begun(out, OVERWRITE.value, about) as folder:
        lines = form.write(base.make(run_, source, weights, DTYPE.value), folder)
    if distributed.is_writer():
        print(*lines, f"wrote {out}", sep="\n")


if __name__ == "__main__":
    run(main)
