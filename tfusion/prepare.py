"""Tokenises and encodes the sources of an experiment into the folder it trains from (data.prepared).

  python -m tfusion.prepare --config=experiments/quickstart.py --codec=runs/quickstart/autoencoder
  python -m tfusion.prepare --config=experiments/quickstart.py --inspect=rows.png     draws what is prepared:
      the attention mask of the first packed rows, and which blocks the attention kernels run

What data.prepared held before is replaced at the end, and only if this verb made it.
"""

import dataclasses
import time
from pathlib import Path

from absl import flags
from tqdm import tqdm

from tfusion import config, distributed, experiment, paths
from tfusion.data import pipeline, prepared
from tfusion.data.config import RowFormat
from tfusion.data.sources import pictures, records
from tfusion.data.tokenizers import load_tokenizer
from tfusion.errors import UserError, run
from tfusion.inference import decoder, trained
from tfusion.models.codecs import Codec
from tfusion.objectives import kind_of
from tfusion.reporting.inspect_rows import draw_rows
from tfusion.training.metrics import write_timing
from tfusion.workdir import CODEC

CONFIG = experiment.define()
CODEC_RUN = paths.define("codec", None, "workdir of a trained image tokenizer; not for text alone")
INSPECT = paths.define("inspect", None, "PNG to draw packed rows of the prepared data to, and exit")
INSPECT_ROWS = flags.DEFINE_integer("inspect_rows", 2, "how many rows to draw", lower_bound=1)
INSPECT_BLOCK = flags.DEFINE_integer("inspect_block", 16, "side of a kernel block", lower_bound=1)
STATISTICS_IMAGES = 4096
FEW = 20  # held-out records of a source


def open_codec(workdir: str, format: RowFormat) -> Codec:
    """A run's image tokenizer, fitted to the pictures that it is to encode."""
    run_ = trained.load(workdir)
    make = decoder(run_).make_codec
    if make is None:
        raise UserError(f"--codec={workdir} holds a run with objective = '{run_.cfg.objective}', which "
                        "trains no image tokenizer")
    codec = make(run_, lambda size: pictures(format.data.sources, "train", size, STATISTICS_IMAGES))
    if tuple(codec.shape) != format.image_shape:
        raise UserError(f"{workdir} makes latents of shape {codec.shape}, the config has {format.image_shape}: "
                        "change model.adapter.latent_* or the autoencoder")
    return codec


def text_alone(records):
    """The records, where none has a picture; raises UserError at the first that has."""
    for record in records:
        if not all(isinstance(part, str) for part in record):
            raise UserError("data.sources names a source with pictures: --codec=WORKDIR is needed to encode "
                            "them")
        yield record


def inspect(cfg: config.RunConfig, path: Path) -> None:
    if path.suffix != ".png" or not path.parent.is_dir():
        raise UserError(f"--inspect={path} must name a .png file in a folder that exists")
    batch = next(pipeline.batches(kind_of(cfg).open_rows(cfg), 0, 1, INSPECT_ROWS.value))
    print(draw_rows(batch, kind_of(cfg).trunk(cfg).image_attention, INSPECT_BLOCK.value, path))
    print(f"wrote {path}")


def write(format: RowFormat, root: Path, sources: dict, tokenizer, codec: Codec | None) -> None:
    """sources: {(name, split): opened source}."""
    bar = tqdm(sources.items(), desc="prepare", unit="split")
    for (name, split), source in bar:
        title = f"{name}/{split}"
        bar.set_postfix_str(title)
        shown = tqdm(records(source, title, split == "train"), title, len(source), unit="record", leave=False)
        meta = prepared.write_source(root / name / split, shown if codec else text_alone(shown),
                                     tokenizer.encode_batch, codec.encode if codec else None)
        few = "; few: figures of them say little" if split == "heldout" and meta["records"] < FEW else ""
        tqdm.write(f"{title}: {meta['records']} records, {meta['tokens']} text tokens, {meta['images']} "
                   f"pictures{few}")
    bar.close()
    if codec:
        codec.save(root / CODEC)
    prepared.write_meta(root, tokenizer, codec.fingerprint if codec else "", format.image_shape,
                        CODEC_RUN.value and str(Path(CODEC_RUN.value).absolute()),
                        {name: dataclasses.asdict(spec) for name, spec in format.data.sources.items()})


def main() -> None:
    if CONFIG.value is None:
        raise UserError("--config=experiments/FILE.py is needed, and --codec=WORKDIR where there are "
                        "pictures; see --help")
    distributed.start_process()
    began, cfg = time.perf_counter(), config.absolute(experiment.read(CONFIG))
    format = kind_of(cfg).row_format(cfg)
    if format is None:
        raise UserError(f"objective = '{cfg.objective}' trains on data.sources as they are: there is "
                        "nothing to prepare")
    if INSPECT.value:
        return inspect(cfg, Path(INSPECT.value))
    data, V = format.data, format.vocabulary.text_vocab_size
    tokenizer = load_tokenizer(data.tokenizer)
    if tokenizer.vocab_size != V:
        raise UserError(f"data.tokenizer = '{data.tokenizer}' has {tokenizer.vocab_size} pieces, "
                        f"model.text_vocab_size = {V}: set it to the former")
    with prepared.replacing(data.prepared) as root:
        codec = open_codec(CODEC_RUN.value, format) if CODEC_RUN.value else None
        size = codec.image_size if codec else None
        sources = {(name, split): spec.open(split, size)
                   for name, spec in data.sources.items() if spec.share > 0 for split in ("train", "heldout")}
        if codec is None:  # before a long wait for what comes first
            for source in sources.values():
                next(text_alone(records(source, "")), None)
        write(format, root, sources, tokenizer, codec)
        write_timing(root, "prepare", time.perf_counter() - began)


if __name__ == "__main__":
    run(main)
