"""Tokenises and encodes the sources of an experiment into the folder it trains from (data.prepared).

  python -m tfusion.prepare --config=experiments/quickstart.py --codec=runs/quickstart/autoencoder
  python -m tfusion.prepare --config=FILE --codec=vae/diffusion_pytorch_model.safetensors#SHA256     with a
      pretrained image tokenizer, as diffusers saves it, config.json beside the weights
  python -m tfusion.prepare --config=FILE --codec=data/other/codec.npz     with that of other prepared data
  python -m tfusion.prepare --config=experiments/quickstart.py --inspect=data.html     a page to look at what
      is prepared before training on it: counts, how rows fill, the first rows in words and pictures

What data.prepared held before is replaced at the end, and only if this verb made it. Killed, the same command
goes on. Several processes of one job share the work; so do some that know nothing of each other, by
--worker=0/2 and --worker=1/2.
"""

import dataclasses
import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from tfusion import config, distributed, experiment, paths, sharding
from tfusion.data import store
from tfusion.data.config import RowFormat
from tfusion.data.sources import pictures
from tfusion.data.tokenizers import load_tokenizer
from tfusion.errors import UserError, run
from tfusion.inference import decoder, trained
from tfusion.models import codecs
from tfusion.models.codecs import Codec, diffusers, num_codes
from tfusion.objectives import kind_of
from tfusion.preparing import card, plan, shards, unfinished
from tfusion.preparing.shards import Encoders, Job
from tfusion.reporting.data_page import write_data_page
from tfusion.training.metrics import write_timing
from tfusion.workdir import CODEC

CONFIG = experiment.define()
CODEC_RUN = paths.define("codec", None, "workdir of a trained image tokenizer, codec.npz of prepared data, or "
                         "FILE.safetensors#SHA256 of a pretrained one in diffusers' layout; not for text alone")
WORKER = flags.DEFINE_string("worker", None, "K/N: this process, started alone, writes every N-th shard, from "
                             "the K-th on; default: each process of a job its part")
INSPECT = paths.define("inspect", None, "HTML page to write about the prepared data; nothing is prepared")
STATISTICS_IMAGES = 4096


class Unfitted(NamedTuple):
    """An image tokenizer."""

    image_size: int
    fingerprint: str  # of what it has learnt
    fit: Callable[[], Codec]  # to the pictures that it is to encode


def open_codec(named: str, format: RowFormat) -> Unfitted:
    """Of the workdir of a run, prepared data's codec.npz, or a pretrained one's 'FILE.safetensors#SHA256'."""
    def check(codec: Codec) -> None:
        format.check_images(f"{named} makes", codec.shape, num_codes(codec), "the image tokenizer")

    pretrained = named.partition("#")[0].endswith(".safetensors")
    if pretrained or named.endswith(".npz"):
        if not pretrained and not Path(named).is_file():
            raise UserError(f"--codec={named} is not there")
        codec = diffusers.open_file(named, format.image_shape[0]) if pretrained else codecs.load(Path(named))
        check(codec)
        return Unfitted(codec.image_size, codec.fingerprint, lambda: codec)
    run_ = trained.load(named, mesh=sharding.local_mesh(1))
    can = decoder(run_)
    if can.make_codec is None:
        raise UserError(f"--codec={named} holds a run with objective = '{run_.cfg.objective}', which "
                        "trains no image tokenizer")

    def fit() -> Codec:
        codec = can.make_codec(
            run_, lambda size: pictures(format.data.sources, "train", size, STATISTICS_IMAGES))
        check(codec)
        return codec

    return Unfitted(can.image_size, trained.fingerprint(run_), fit)


def fitted(folder: Path, unfitted: Unfitted) -> Codec:
    """By whichever worker came first, for all: another one's processor may sum in another order, and latents
    normalised in two ways are two kinds of latents."""
    if not (path := folder / CODEC).exists():
        unfinished.first(path, unfitted.fit().save)
    return codecs.load(path)


def inspect(cfg: config.RunConfig, page: Path) -> None:
    """Writes the page on what is prepared; of several processes one does."""
    if page.suffix != ".html" or page.is_dir():
        raise UserError(f"--inspect={page} must name a page to write, such as data.html")
    if not distributed.is_writer():
        return
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=page.parent).close()  # before a long wait
    except OSError as e:
        raise UserError(f"--inspect={page} cannot be written ({e.strerror}): name another file") from e
    with jax.set_mesh(sharding.local_mesh()):
        write_data_page(cfg, page)
    print(f"wrote {page} ({page.stat().st_size / 1e6:.1f} MB)")


def parse_worker(text: str | None) -> tuple[int, int]:
    """'0/2' -> (0, 2); nothing -> this process, and how many the job has."""
    if text is None:
        return jax.process_index(), jax.process_count()
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    worker, workers = map(int, match.groups()) if match else (0, 0)
    if worker >= workers:
        raise UserError(f"--worker={text}: K/N is wanted, K from 0 to N - 1, such as 0/2 and 1/2")
    return worker, workers


def unwritten(folder: Path, jobs: list[Job]) -> list[Job]:
    done = {split: store.finished(folder, *split) for split in {(job.source, job.split) for job in jobs}}
    return [job for job in jobs if job.shard not in done[job.source, job.split]]


def write(folder: Path, jobs: list[Job], encoders: Encoders) -> None:
    """The shards that are not written yet."""
    left = unwritten(folder, jobs)
    total = sum(len(job.records) for job in jobs)
    before = total - sum(len(job.records) for job in left)
    with tqdm(desc="prepare", total=total, initial=before, unit="record") as bar:
        for job in left:
            bar.set_postfix_str(f"{job.source}/{job.split}", refresh=False)
            shards.write(folder, job, encoders, bar.update)


def finish(folder: Path, format: RowFormat, tokenizer, codec: Codec | None, began: float) -> None:
    """What a folder holds beside shards."""
    about = card.make(folder)
    card.check(about)
    paths.replace_text(folder / card.NAME, json.dumps(about, indent=2) + "\n")
    write_timing(folder, "prepare", time.perf_counter() - began)
    store.write_meta(folder, tokenizer, codec.fingerprint if codec else "", format.image_shape,
                     CODEC_RUN.value and str(Path(CODEC_RUN.value).absolute()),
                     {name: dataclasses.asdict(spec) for name, spec in format.data.sources.items()},
                     store.stored_dtype(codec.dtype if codec else np.float32),
                     num_codes(codec) if codec else format.vocabulary.num_codes)
    print("\n".join(card.lines(about)))


def prepare(format: RowFormat, tokenizer, unfitted: Unfitted | None, worker: tuple[int, int],
            began: float) -> None:
    data, size = format.data, unfitted.image_size if unfitted else None
    specs = {name: spec for name, spec in data.sources.items() if spec.takes_part}
    opened = {(name, split): spec.open(split, size)
              for name, spec in specs.items() for split in ("train", "heldout")}
    wanted, all_jobs = plan.make(specs, opened, tokenizer, unfitted), shards.jobs(opened, shards.RECORDS)
    with unfinished.begun(data.prepared, wanted, *worker) as folder:
        if folder:
            codec = fitted(folder, unfitted) if unfitted else None
            write(folder, all_jobs[worker[0] :: worker[1]],
                  Encoders(tokenizer.encode_batch, codec.encode if codec else None))
    distributed.wait_for_all()  # until all have let go of the folder
    if not distributed.is_writer():
        return
    if folder is None:
        print(f"{data.prepared} holds these data already; delete it to prepare them anew")
        return

    def finish_all(folder: Path) -> bool:
        if left := unwritten(folder, all_jobs):
            print(f"{len(left)} shards are left to other workers; who is last completes {data.prepared}")
            return False
        finish(folder, format, tokenizer, codec, began)
        return True

    unfinished.complete(data.prepared, wanted, finish_all)


def main() -> None:
    if CONFIG.value is None:
        raise UserError("--config=experiments/FILE.py is needed, and --codec=WORKDIR where there are "
                        "pictures; see --help")
    distributed.start_process(alone=WORKER.value is not None)
    began, cfg = time.perf_counter(), config.absolute(experiment.read(CONFIG))
    worker, format = parse_worker(WORKER.value), kind_of(cfg).row_format(cfg)
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
    unfinished.check(data.prepared)  # before a long wait
    with jax.set_mesh(sharding.local_mesh()):  # all devices encode
        unfitted = open_codec(CODEC_RUN.value, format) if CODEC_RUN.value else None
        prepare(format, tokenizer, unfitted, worker, began)


if __name__ == "__main__":
    run(main)
