"""Tokenises and encodes the sources of an experiment into the folder it trains from (data.prepared).

  python -m tfusion.prepare --config=experiments/quickstart.py --autoencoder=runs/quickstart/autoencoder
  python -m tfusion.prepare --config=experiments/quickstart.py --inspect=rows.png     draws what is prepared:
      the attention mask of the first packed rows, and which blocks the attention kernels run

What data.prepared held before is replaced at the end, and only if this verb made it.
"""

import time
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from tfusion import config, distributed, paths
from tfusion.data import pipeline, prepared
from tfusion.data.sources import make_source, pictures
from tfusion.data.tokenizers import load_tokenizer
from tfusion.errors import UserError, run
from tfusion.inference import trained
from tfusion.inference.autoencoder import LatentCodec
from tfusion.objectives import make_objective
from tfusion.reporting.inspect_rows import draw_rows
from tfusion.training.metrics import write_timing
from tfusion.workdir import CODEC

CONFIG = config_flags.DEFINE_config_file("config", None, "experiments/FILE.py[:variant]")
AUTOENCODER = paths.define("autoencoder", None, "workdir of a trained autoencoder; not for text alone")
INSPECT = paths.define("inspect", None, "PNG to draw packed rows of the prepared data to, and exit")
INSPECT_ROWS = flags.DEFINE_integer("inspect_rows", 2, "how many rows to draw", lower_bound=1)
INSPECT_BLOCK = flags.DEFINE_integer("inspect_block", 16, "side of a kernel block", lower_bound=1)
STATISTICS_IMAGES = 4096


def fit_codec(workdir: str, cfg: config.Config) -> LatentCodec:
    """The autoencoder's run as a codec, normalised over the pictures that it is to encode."""
    run_cfg, params, *_ = trained.load(workdir)
    if run_cfg.objective != "autoencoder":
        raise UserError(f"--autoencoder={workdir} holds a run with objective = '{run_cfg.objective}'")
    codec = LatentCodec.fit(run_cfg, params, pictures(cfg.data, "train", STATISTICS_IMAGES))
    if codec.latent_shape != cfg.model.latent_shape:
        raise UserError(f"{workdir} makes latents of shape {codec.latent_shape}, the config has "
                        f"{cfg.model.latent_shape}: change model.latent_* or the autoencoder")
    return codec


def no_codec(_):
    raise UserError("data.mixture names a source with pictures: --autoencoder=WORKDIR is needed to encode them")


def inspect(cfg: config.Config, path: Path) -> None:
    if path.suffix != ".png" or not path.parent.is_dir():
        raise UserError(f"--inspect={path} must name a .png file in a folder that exists")
    rows = pipeline.open_rows(cfg, make_objective(cfg), "train")
    batch = next(pipeline.batches(rows, 0, 1, INSPECT_ROWS.value))
    print(draw_rows(batch, cfg.model.image_attention, INSPECT_BLOCK.value, path))
    print(f"wrote {path}")


def write(cfg: config.Config, root: Path, sources: dict, tokenizer, codec: LatentCodec | None) -> None:
    """sources: {(name, split): records}."""
    bar = tqdm(sources.items(), desc="prepare", unit="split")
    for (name, split), source in bar:
        bar.set_postfix_str(f"{name}/{split}")
        records = tqdm(source, desc=f"{name}/{split}", unit="record", leave=False)
        prepared.write_source(root / name / split, records, tokenizer.encode_batch,
                              codec.encode if codec else no_codec)
    if codec:
        codec.save(root / CODEC)
    prepared.write_meta(root, tokenizer, codec.fingerprint if codec else "", cfg.model.latent_shape)


def main() -> None:
    if CONFIG.value is None:
        raise UserError("--config=experiments/FILE.py is needed, and --autoencoder=WORKDIR where there are "
                        "pictures; see --help")
    distributed.start_process()
    began, cfg = time.perf_counter(), config.from_dict(CONFIG.value)
    if INSPECT.value:
        return inspect(cfg, Path(INSPECT.value))
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    if tokenizer.vocab_size != cfg.model.text_vocab_size:
        raise UserError(f"data.tokenizer = '{cfg.data.tokenizer}' has {tokenizer.vocab_size} pieces, "
                        f"model.text_vocab_size = {cfg.model.text_vocab_size}: set it to the former")
    sources = {(name, split): make_source(name, cfg.data, split)
               for name, share in cfg.data.mixture.items() if share > 0 for split in ("train", "heldout")}
    first = [source[0] for source in sources.values() if len(source)]
    if not AUTOENCODER.value and not all(isinstance(part, str) for record in first for part in record):
        no_codec(None)  # before a long wait for what comes first
    with prepared.replacing(cfg.data.prepared) as root:
        codec = fit_codec(AUTOENCODER.value, cfg) if AUTOENCODER.value else None
        write(cfg, root, sources, tokenizer, codec)
        write_timing(root, "prepare", time.perf_counter() - began)


if __name__ == "__main__":
    run(main)
