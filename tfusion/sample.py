"""Samples from a trained Transfusion: pictures for prompts, captions for pictures, whole documents.

  python -m tfusion.sample --workdir=runs/quickstart/transfusion --prompt="a panda on a teal canvas"
  python -m tfusion.sample --workdir=... --prompt="a fox on a pink canvas" --prompt="two cars on a grey canvas"
  python -m tfusion.sample --workdir=... --prompt="a fox on a pink canvas" --draw    draws, whatever comes next
  python -m tfusion.sample --workdir=... --image=photo.png          describes a picture
  python -m tfusion.sample --workdir=... --num_documents=4 --temperature=1   whole documents from nothing

A model invents where a prompt is not in the words it was trained on, capitals included. Each row starts in
LM mode, draws whenever the model writes BOI and goes on until EOS. Pictures and documents.jsonl, a line a row,
go to --out, behind what earlier commands left there: row numbers go on, and nothing is overwritten.
"""

import json
import re
import sys
from pathlib import Path

import jax
from absl import flags
from PIL import Image

from tfusion import config, distributed, paths, sharding
from tfusion.data.pictures import read_picture
from tfusion.errors import UserError, run
from tfusion.inference import decoder, trained

WORKDIR = paths.define("workdir", None, "workdir of a trained run; gs:// too", buckets=True)
PROMPTS = flags.DEFINE_multi_string("prompt", [], "text to go on from; repeat for several rows")
IMAGES = paths.define_multi("image", [], "picture file to go on from; repeat for several rows")
NUM_DOCUMENTS = flags.DEFINE_integer("num_documents", 0, "rows that start from nothing", lower_bound=0)
DRAW = flags.DEFINE_bool("draw", False, "start a picture right after each prompt")
STEP = flags.DEFINE_integer("step", None, "which checkpoint; default: the latest")
MESH = flags.DEFINE_string("mesh", None,
                           "devices to spread the model over, such as fsdp=4; default: one, or all processes'")
OUT = paths.define("out", None, "where to write, behind what is there; default: WORKDIR/samples", buckets=True)
SEED = flags.DEFINE_integer("seed", 0, "of the sampling", lower_bound=0, upper_bound=2**32 - 1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "of the text; 0 = greedy", lower_bound=0.0)
MAX_IMAGES = flags.DEFINE_integer("max_images", None, "pictures per row; default: as many as fit",
                                  lower_bound=0)
SAMPLER = flags.DEFINE_string("sampler", None, "ddpm or ddim; default: the run's config")
VARIANCE = flags.DEFINE_string("variance", None, "of DDPM's steps, fixed_small or fixed_large; default: the "
                               "run's config")
STEPS = flags.DEFINE_integer("num_inference_steps", None, "default: the run's config", lower_bound=1)
GUIDANCE = flags.DEFINE_float("guidance_scale", None, "1 = off; default: the run's config", lower_bound=0.0)


def with_flags(cfg: config.RunConfig) -> config.RunConfig:
    """The run's config with the flags that were given put in, held to the config's own rules."""
    config.check_number("--temperature", TEMPERATURE.value, may_be_zero=True)
    return config.changed(cfg, {
        "sampling.sampler": SAMPLER.value, "sampling.variance": VARIANCE.value,
        "sampling.num_inference_steps": STEPS.value, "sampling.guidance_scale": GUIDANCE.value})


def make_documents(codec) -> tuple[list[list], list[str]]:
    """(beginnings of documents, their names). White space around a text is taken off: it would be tokens that
    no training text ends in."""
    texts = [text.strip() for text in PROMPTS.value]
    pictures = [read_picture(path, codec.image_size) for path in IMAGES.value]
    documents = [[part] for part in (*texts, *pictures)] + [[] for _ in range(NUM_DOCUMENTS.value)]
    return documents, [*texts, *IMAGES.value, *[""] * NUM_DOCUMENTS.value]


def note_undrawn(rows: list, drawing: bool) -> None:
    """Says on stderr that prompts got no picture, where one was to be had."""
    number = len(PROMPTS.value)
    undrawn = sum(all(isinstance(part, str) for part in parts) for parts in rows[:number])
    if undrawn and drawing:
        print(f"no picture for {undrawn} of {number} prompts, the model wrote text: --draw starts one right "
              "after the prompt", file=sys.stderr)


def write(rows: list, names: list[str], step: int, out: Path) -> None:
    """One line of documents.jsonl per row: its prompt, the run's step, and its parts; pictures as
    <row>_<number>.png. Rows are numbered on from what is there, which stays."""
    out.mkdir(parents=True, exist_ok=True)
    told = out / "documents.jsonl"
    before = told.read_text() if told.exists() else ""
    pictures = (re.fullmatch(r"(\d+)_\d+\.png", path.name) for path in out.iterdir())
    first = max([len(before.splitlines()), *(int(match[1]) + 1 for match in pictures if match)])
    documents = []
    for number, (name, parts) in enumerate(zip(names, rows), start=first):
        drawn, line = 0, []
        for part in parts:
            if isinstance(part, str):
                line.append({"text": part})
                continue
            path = out / f"{number:03d}_{drawn}.png"
            paths.replace_by(path, lambda file, part=part: Image.fromarray(part).save(file, "PNG"))
            line.append({"image": path.name})
            drawn += 1
        documents.append({"prompt": name, "step": step, "parts": line})
    paths.replace_text(told, before + "".join(json.dumps(d) + "\n" for d in documents))
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a letter loses that letter only
    for document in documents:
        shown = (part["text"] if "text" in part else f"[{part['image']}]" for part in document["parts"])
        print(document["prompt"] or "(nothing)", "->", *shown)
    print(f"wrote {out}")


def main() -> None:
    if WORKDIR.value is None or not (PROMPTS.value or IMAGES.value or NUM_DOCUMENTS.value):
        raise UserError("--workdir=DIR and one of --prompt, --image, --num_documents are needed; see --help")
    if DRAW.value and MAX_IMAGES.value == 0:
        raise UserError("--draw and --max_images=0 exclude each other")
    distributed.start_process()
    mesh = sharding.parse_mesh(MESH.value)
    run_ = trained.load(WORKDIR.value, STEP.value, mesh)
    go_on = decoder(run_).go_on
    if go_on is None:
        raise UserError(f"{WORKDIR.value} holds a run with objective = '{run_.cfg.objective}', which writes no "
                        "documents")
    if run_.codec is None and (IMAGES.value or DRAW.value):
        raise UserError(f"{WORKDIR.value} has no codec.npz to decode pictures with: it saw none, or latents "
                        "made elsewhere; text alone can be sampled")
    run_ = run_._replace(cfg=with_flags(run_.cfg))
    documents, names = make_documents(run_.codec)
    out = paths.path(OUT.value or f"{WORKDIR.value}/samples")
    if distributed.is_writer():
        paths.check_writable(out, "--out")
    with jax.set_mesh(mesh):
        rows = go_on(run_, documents, seed=SEED.value, temperature=TEMPERATURE.value,
                     max_images=MAX_IMAGES.value, draw_first=DRAW.value)
    if distributed.is_writer():
        write(rows, names, run_.step, out)
        note_undrawn(rows, drawing=bool(run_.codec) and MAX_IMAGES.value != 0)


if __name__ == "__main__":
    run(main)
