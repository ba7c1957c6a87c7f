"""Tokenises and encodes the sources of an experiment into the folder it trains from (data.prepared).

  python -m tfusion.prepare --config=experiments/quickstart.py --autoencoder=runs/quickstart/autoencoder
  python -m tfusion.prepare --config=experiments/quickstart.py --inspect=rows.png     draws what is prepared:
      the attention mask of the first packed rows, and which blocks the attention kernels run
"""

import shutil
import time
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from tfusion import config, distributed
from tfusion.data import pipeline, prepared
from tfusion.data.sources import make_source
from tfusion.data.tokenizers import load_tokenizer
from tfusion.errors import UserError, run
from tfusion.inference.autoencoder import FILE, LatentCodec
from tfusion.objectives import make_objective
from tfusion.reporting.inspect_rows import draw_rows
from tfusion.training.checkpoint import load_run
from tfusion.training.metrics import write_timing

CONFIG = config_flags.DEFINE_config_file("config", None, "experiments/FILE.py[:variant]")
AUTOENCODER = flags.DEFINE_string("autoencoder", None, "workdir of a trained autoencoder")
INSPECT = flags.DEFINE_string("inspect", None, "PNG to draw packed rows of the prepared data to, and exit")
INSPECT_ROWS = flags.DEFINE_integer("inspect_rows", 2, "how many rows to draw", lower_bound=1)
INSPECT_BLOCK = flags.DEFINE_integer("inspect_block", 16, "side of a kernel block", lower_bound=1)
STATISTICS_IMAGES = 4096


def fit_codec(workdir: str, cfg: config.Config) -> LatentCodec:
    """The autoencoder's run as a codec, normalised over training pictures."""
    run_cfg, params = load_run(workdir)
    if run_cfg.objective != "autoencoder":
        raise UserError(f"--autoencoder={workdir} holds a run with objective = '{run_cfg.objective}'")
    source = make_source("scenes", cfg.data, "train")
    images = [source[i][1] for i in range(min(STATISTICS_IMAGES, len(source)))]
    return LatentCodec.fit(run_cfg, params, np.stack(images))


def inspect(cfg: config.Config, path: Path) -> None:
    if path.suffix != ".png" or not path.parent.is_dir():
        raise UserError(f"--inspect={path} must name a .png file in a folder that exists")
    rows = pipeline.open_rows(cfg, make_objective(cfg), "train")
    batch = next(pipeline.batches(rows, 0, 1, INSPECT_ROWS.value))
    print(draw_rows(batch, cfg.model.image_attention, INSPECT_BLOCK.value, path))
    print(f"wrote {path}")


def main() -> None:
    if CONFIG.value is None or not (AUTOENCODER.value or INSPECT.value):
        raise UserError("--config=experiments/FILE.py and --autoencoder=WORKDIR (or --inspect=FILE.png) are "
                        "needed; see --help")
    distributed.start_process()
    began, cfg = time.perf_counter(), config.from_dict(CONFIG.value)
    if INSPECT.value:
        return inspect(cfg, Path(INSPECT.value))
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    if tokenizer.vocab_size != cfg.model.text_vocab_size:
        raise UserError(f"data.tokenizer = '{cfg.data.tokenizer}' has {tokenizer.vocab_size} pieces, "
                        f"model.text_vocab_size = {cfg.model.text_vocab_size}: set it to the former")
    root = Path(cfg.data.prepared)
    codec = fit_codec(AUTOENCODER.value, cfg)
    if codec.latent_shape != cfg.model.latent_shape:
        raise UserError(f"{AUTOENCODER.value} makes latents of shape {codec.latent_shape}, the config has "
                        f"{cfg.model.latent_shape}: change model.latent_* or the autoencoder")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    codec.save(root / FILE)
    jobs = [(name, split) for name, share in cfg.data.mixture.items() if share > 0
            for split in ("train", "heldout")]
    bar = tqdm(jobs, desc="prepare", unit="split")
    for name, split in bar:
        bar.set_postfix_str(f"{name}/{split}")
        source = tqdm(make_source(name, cfg.data, split), desc=f"{name}/{split}", unit="record", leave=False)
        prepared.write_source(root / name / split, source, tokenizer.encode_batch, codec.encode)
    prepared.write_meta(root, cfg.data.tokenizer, tokenizer.fingerprint, codec.fingerprint,
                        cfg.model.latent_shape)
    write_timing(root, "prepare", time.perf_counter() - began)


if __name__ == "__main__":
    run(main)
