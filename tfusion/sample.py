"""Samples from a trained Transfusion: pictures for prompts, captions for pictures, whole documents.

  python -m tfusion.sample --workdir=runs/quickstart/transfusion --prompt="a panda on a teal canvas"
  python -m tfusion.sample --workdir=... --prompt="a fox on a pink canvas" --prompt="two cars on a grey canvas"
  python -m tfusion.sample --workdir=... --image=photo.png          describes a picture
  python -m tfusion.sample --workdir=... --num_documents=4 --temperature=1   whole documents from nothing

Each row starts in LM mode, draws whenever the model writes BOI and goes on until EOS. Pictures and
documents.jsonl go to --out.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from absl import flags
from PIL import Image, UnidentifiedImageError

from tfusion import distributed, sharding
from tfusion.config import CHOICES
from tfusion.errors import UserError, run
from tfusion.inference import decode, trained

WORKDIR = flags.DEFINE_string("workdir", None, "workdir of a trained Transfusion")
PROMPTS = flags.DEFINE_multi_string("prompt", [], "text to go on from; repeat for several rows")
IMAGES = flags.DEFINE_multi_string("image", [], "picture file to go on from; repeat for several rows")
NUM_DOCUMENTS = flags.DEFINE_integer("num_documents", 0, "rows that start from nothing", lower_bound=0)
STEP = flags.DEFINE_integer("step", None, "which checkpoint; default: the latest")
MESH = flags.DEFINE_string("mesh", None, "devices to spread the model over, such as fsdp=4; default: one")
OUT = flags.DEFINE_string("out", None, "where to write; default: WORKDIR/samples")
SEED = flags.DEFINE_integer("seed", 0, "of the sampling")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "of the text; 0 = greedy", lower_bound=0.0)
MAX_IMAGES = flags.DEFINE_integer("max_images", None, "pictures per row; default: as many as fit",
                                  lower_bound=0)
SAMPLER = flags.DEFINE_enum("sampler", None, CHOICES["sampling.sampler"], "default: the run's config")
VARIANCE = flags.DEFINE_enum("variance", None, CHOICES["sampling.variance"],
                             "of DDPM's steps; default: the run's config")
STEPS = flags.DEFINE_integer("num_inference_steps", None, "default: the run's config", lower_bound=1)
GUIDANCE = flags.DEFINE_float("guidance_scale", None, "1 = off; default: the run's config", lower_bound=0.0)


def read_image(path: str, size: int):
    """A picture file, centre-cropped and resized to uint8 (size, size, 3)."""
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as e:
        raise UserError(f"--image={path} cannot be read as a picture ({e})") from e
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def with_flags(cfg):
    """The run's sampling settings, changed by the flags that were given."""
    given = {"sampler": SAMPLER.value, "variance": VARIANCE.value, "num_inference_steps": STEPS.value,
             "guidance_scale": GUIDANCE.value}
    sampling = dataclasses.replace(cfg.sampling, **{k: v for k, v in given.items() if v is not None})
    if sampling.num_inference_steps > cfg.diffusion.num_timesteps:
        raise UserError(f"--num_inference_steps={sampling.num_inference_steps} is more than the "
                        f"{cfg.diffusion.num_timesteps} steps of training")
    return dataclasses.replace(cfg, sampling=sampling)


def write(rows: list, prompts: list[str], codec, tokenizer, out: Path) -> None:
    """One line of documents.jsonl per row: its prompt and parts; pictures as <row>_<number>.png."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (prompt, parts) in enumerate(zip(prompts, rows)):
        names, line = 0, []
        for part in parts:
            if part.ndim == 1:
                line.append({"text": tokenizer.decode(part.tolist())})
                continue
            path = out / f"{number:03d}_{names}.png"
            Image.fromarray(codec.decode(part[None])[0]).save(path)
            line.append({"image": path.name})
            names += 1
        lines.append(json.dumps({"prompt": prompt, "parts": line}))
        print(prompt or "(nothing)", "->", *(p.get("text") or f"[{p['image']}]" for p in line))
    (out / "documents.jsonl").write_text("\n".join(lines) + "\n")
    print(f"wrote {out}")


def main() -> None:
    if WORKDIR.value is None or not (PROMPTS.value or IMAGES.value or NUM_DOCUMENTS.value):
        raise UserError("--workdir=DIR and one of --prompt, --image, --num_documents are needed; see --help")
    distributed.start_process()
    mesh = sharding.parse_mesh(MESH.value)
    cfg, params, codec, tokenizer = trained.load(WORKDIR.value, STEP.value, mesh)
    if cfg.objective != "transfusion":
        raise UserError(f"{WORKDIR.value} holds a run with objective = '{cfg.objective}', not 'transfusion'")
    cfg = with_flags(cfg)
    if codec is None:
        raise UserError(f"{WORKDIR.value} has no codec.npz to decode pictures with: its latents were made "
                        "elsewhere")
    pictures = [read_image(path, cfg.image_size) for path in IMAGES.value]
    prompts = [[np.array(tokenizer.encode(text))] for text in PROMPTS.value]
    prompts += [[latent] for latent in (codec.encode(np.stack(pictures)) if pictures else [])]
    prompts += [[]] * NUM_DOCUMENTS.value
    with jax.set_mesh(mesh):
        rows = decode.generate(cfg, params, prompts, seed=SEED.value, temperature=TEMPERATURE.value,
                               max_images=MAX_IMAGES.value)
    names = [*PROMPTS.value, *IMAGES.value, *[""] * NUM_DOCUMENTS.value]
    write(rows, names, codec, tokenizer, Path(OUT.value or f"{WORKDIR.value}/samples"))


if __name__ == "__main__":
    run(main)
