"""What preparing holds in memory, and that being killed or shared leaves no trace in the bytes.

  python benchmarks/data_prepare.py                                                    # a table
  python benchmarks/data_prepare.py --out benchmarks/results/data_prepare_cpu.json     # and a file

Synthetic records, made from their numbers: four of five a caption and a picture (32 x 32 pixels, encoded as
16 x 16 x 4 by block means), one a text of 200 words. `tfusion.prepare.prepare` writes them, in a process of its
own each time: ten thousand records, a hundred thousand and a million, whose peaks of memory are compared
(`--parts=memory`); some with SIGKILL at random moments, the same command again and again, and some by two
processes side by side, both compared, file by file, with what one process made in one go (`--parts=bytes`).
A folder of 256 px JPEGs is prepared in turns with decoding it and nothing else (`--parts=jpegs`), and the
quickstart's data with encoding its pictures and nothing else (`--parts=quickstart`). The million takes ten
minutes on two cores that do nothing else, the rest as long. What the file has of parts that are not run stays.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from PIL import Image

from benchmarks.report import machine, save
from benchmarks.worker import peak_mib
from experiments.quickstart import get_config
from tfusion import config, prepare
from tfusion.data import store
from tfusion.data.pictures import read_picture
from tfusion.data.sources.base import READERS, Source, Unreadable, attempts
from tfusion.data.sources.folder import FolderSource
from tfusion.data.tokenizers import ByteTokenizer, load_tokenizer
from tfusion.models.codecs.kl import Autoencoder, KLCodec
from tfusion.preparing import shards

WORDS = ("a", "fox", "left", "of", "an", "apple", "on", "teal", "canvas", "and", "the", "moon", "above", "it")
PER_SHARD = 128  # records, where processes are killed or work side by side
TIMING = ("timing.json", ".lock")  # not made of the data


class Records:
    """Record i is made from i alone; one in a thousand is damaged."""

    def __init__(self, number: int):
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, record):
        if record % 1000 == 999:
            raise Unreadable(f"{record}.png is damaged", "damaged picture", f"{record}.png")
        draw = np.random.default_rng(record)
        text = " ".join(WORDS[i] for i in draw.integers(0, len(WORDS), 200 if record % 5 == 4 else 10))
        return [text] if record % 5 == 4 else [text, draw.integers(0, 256, (32, 32, 3), np.uint8)]


@dataclasses.dataclass(frozen=True)
class RecordsSource(Source):
    number: int = 0

    def open(self, split, image_size=None):
        return Records(self.number if split == "train" else self.number // 50)


class BlockMeans:
    """A codec: 32 x 32 pixels -> 16 x 16 x 4."""

    image_size, shape, dtype, fingerprint = 32, (16, 16, 4), np.float32, "block means"

    def encode(self, images):
        x = images.reshape(-1, 16, 2, 16, 2, 3).astype(np.float32).mean((2, 4)) / 64 - 2
        return np.concatenate([x, x.mean(-1, keepdims=True)], -1)

    def save(self, path):
        path.write_text("block means")


def without_fitting() -> None:
    """`prepare` takes codecs as they are, and of no run."""
    prepare.CODEC_RUN, prepare.fitted = SimpleNamespace(value=None), lambda folder, codec: codec


def child(root: Path, number: int, worker: str, per_shard: int) -> None:
    shards.RECORDS = per_shard or shards.RECORDS
    format = SimpleNamespace(data=SimpleNamespace(prepared=str(root), sources={
        "pairs": RecordsSource("x", 1.0, number)}), image_shape=BlockMeans.shape)
    without_fitting()
    print("began", flush=True)
    began, before = time.perf_counter(), peak_mib()
    prepare.prepare(format, ByteTokenizer(), BlockMeans(), prepare.parse_worker(worker), began)
    print(json.dumps({"seconds": round(time.perf_counter() - began, 2), "peak_mib": round(peak_mib(), 1),
                      "peak_mib_before": round(before, 1)}), flush=True)


def start(root: Path, number: int, worker: str = "0/1", per_shard: int = 0) -> subprocess.Popen:
    """A process that prepares; returns when it begins to."""
    process = subprocess.Popen([sys.executable, __file__, "--child", str(root), str(number), worker,
                                str(per_shard)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if process.stdout.readline() != "began\n":
        raise SystemExit(f"a process ended with status {process.wait()}: {' '.join(process.args)}")
    return process


def end(process: subprocess.Popen) -> dict:
    last = process.stdout.read().strip().splitlines()[-1]
    assert process.wait() == 0, process.args
    return json.loads(last)


def digest(root: Path) -> str:
    """Of all files that are made of the data."""
    found = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file() and path.name not in TIMING):
        found.update(f"{path.relative_to(root)} ".encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def memory(folder: Path, number: int) -> list[dict]:
    """A hundredth of the records, a tenth, and all."""
    out = []
    for some in (number // 100, number // 10, number):
        result = {"records": some, **end(start(folder / str(some), some))}
        size = sum(path.stat().st_size for path in (folder / str(some)).rglob("*") if path.is_file())
        out.append(result | {"store_mib": round(size / 2**20, 1),
                             "records_per_second": round(some * 1.02 / result["seconds"])})
        print(out[-1], file=sys.stderr)
    return out


class EighthPixels(BlockMeans):
    """A codec that costs little beside decoding: 256 x 256 pixels -> every eighth, as 32 x 32 x 8."""

    image_size, shape = 256, (32, 32, 8)

    def encode(self, images):
        x = images[:, ::8, ::8].astype(np.float32) / 64 - 2
        return np.concatenate([x, x, x[..., :2]], -1)


class Clock:
    """Processor seconds of this thread inside some calls."""

    def __init__(self):
        self.seconds = collections.Counter()

    def around(self, name: str, fn):
        def timed(*args):
            began = time.thread_time()
            out = fn(*args)
            self.seconds[name] += time.thread_time() - began
            return out

        return timed


@contextlib.contextmanager
def writers(clock: Clock):
    """Writers of shards, timed."""
    real = store.Writer.add
    store.Writer.add = clock.around("writer", real)
    try:
        yield
    finally:
        store.Writer.add = real


def jpegs(folder: Path, number: int, rounds: int = 5) -> dict:
    """A folder of 256 px JPEGs with captions: decoded by as many threads as prepare has and dropped; read as
    prepare reads them; prepared. Of the last, which part of the processor time is the codec's of this
    benchmark, and which the writer's: checks, bfloat16, hash, compression, file."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for i in range(number):
        noise = Image.fromarray(draw.integers(0, 256, (64, 64, 3), np.uint8))
        noise.resize((256, 256), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
        (folder / f"{i}.txt").write_text("a fox left of an apple on a teal canvas")
    source = FolderSource("folder", 1.0, str(folder), 0.0).open("train", 256)

    def bare():
        with ThreadPoolExecutor(READERS) as pool:
            for _ in pool.map(lambda item: read_picture(source.root / item.file, 256).shape, source.items):
                pass

    def read():
        for _ in attempts(source, range(number)):
            pass

    def prepared():
        encode = clock.around("codec", EighthPixels().encode)
        with writers(clock):
            for job in shards.jobs({("photos", str(len(took["prepared"]))): source}, shards.RECORDS):
                shards.write(folder.with_name("jpeg_store"), job,
                             shards.Encoders(ByteTokenizer().encode_batch, encode))

    clock = Clock()
    took = {"bare": [], "read": [], "prepared": []}
    for _ in range(rounds):
        for fn in (bare, read, prepared):
            wall, cpu = time.perf_counter(), time.process_time()
            fn()
            took[fn.__name__].append((time.perf_counter() - wall, time.process_time() - cpu))

    def ratio(name: str, which: int) -> float:
        return round(statistics.median(a[which] / b[which] for a, b in zip(took["bare"], took[name])), 3)

    bare, read, whole = (sum(cpu for _, cpu in took[name]) for name in took)
    parts = {"decoding": bare, "captions and threads": read - bare, **clock.seconds}
    parts["batches, tokens and the rest"] = whole - sum(parts.values())
    return {"pictures": number, "bytes": sum(path.stat().st_size for path in folder.glob("*.jpg")),
            "wall_seconds": {name: [round(wall, 2) for wall, _ in some] for name, some in took.items()},
            "cpu_seconds": {name: [round(cpu, 2) for _, cpu in some] for name, some in took.items()},
            **{f"bare_over_{name}": {"wall": ratio(name, 0), "cpu": ratio(name, 1)}
               for name in ("read", "prepared")},
            "prepared_cpu_split": {name: round(seconds / whole, 3) for name, seconds in parts.items()},
            "bare_over_prepared_without_codec_cpu": round(bare / (whole - clock.seconds["codec"]), 3)}


def untrained(cfg) -> KLCodec:
    """A codec of the quickstart's size, that has learnt nothing; compiled."""
    size, channels = cfg.image_size, np.zeros(cfg.latent_channels, np.float32)
    params = jax.jit(Autoencoder(cfg).init)(jax.random.key(0), np.zeros((1, size, size, 3), np.float32))
    codec = KLCodec(cfg, params["params"], channels, channels + 1)
    codec.encode(np.zeros((shards.PICTURES, size, size, 3), np.uint8))
    return codec


def quickstart(folder: Path, rounds: int = 3) -> dict:
    """The quickstart's records made, their texts tokenised, their pictures encoded, each alone; and prepared,
    which is all of that and the store. In processor seconds."""
    cfg, tokens = config.from_dict(get_config()), shards.TEXTS
    codec = untrained(config.from_dict(get_config("autoencoder")).autoencoder)
    tokenizer, took = load_tokenizer(cfg.data.tokenizer), collections.defaultdict(list)
    without_fitting()

    @contextlib.contextmanager
    def timed(name: str):
        began = time.process_time()
        yield
        took[name].append(round(time.process_time() - began, 2))

    for number in range(rounds):
        with timed("sources"):
            opened = [spec.open(split, codec.image_size) for spec in cfg.data.sources.values()
                      for split in ("train", "heldout")]
            parts = [part for some in opened for record in attempts(some, range(len(some))) for part in record]
        texts = [part for part in parts if isinstance(part, str)]
        images = np.stack([part for part in parts if not isinstance(part, str)])
        with timed("tokens"):
            for start in range(0, len(texts), tokens):
                tokenizer.encode_batch(texts[start : start + tokens])
        with timed("codec"):
            for start in range(0, len(images), shards.PICTURES):
                codec.encode(images[start : start + shards.PICTURES])
        data = dataclasses.replace(cfg.data, prepared=str(folder / str(number)))
        with timed("prepare"), contextlib.redirect_stdout(sys.stderr):
            prepare.prepare(cfg.rows._replace(data=data), tokenizer, codec, (0, 1), time.perf_counter())
    alone = [sum(some) for some in zip(*(took[name] for name in ("sources", "tokens", "codec")))]
    return {"cpu_seconds": dict(took), "prepare_over_parts": round(statistics.median(
        whole / parts for whole, parts in zip(took["prepare"], alone)), 3)}


def kills(folder: Path, number: int, times: int) -> dict:
    whole = end(start(folder / "whole", number, per_shard=PER_SHARD))
    draw, after = random.Random(0), []
    while len(after) < times:
        process = start(folder / "killed", number, per_shard=PER_SHARD)
        seconds = draw.uniform(0, 1.5 * whole["seconds"] / times)
        time.sleep(seconds)
        if process.poll() is not None or (folder / "killed").exists():
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        lines = len(list((folder / "killed.unfinished").glob("*/*/ledger.*.jsonl")))
        after.append({"seconds": round(seconds, 2), "shards_written": lines})
        print(after[-1], file=sys.stderr)
    end(start(folder / "killed", number, per_shard=PER_SHARD))
    both = [start(folder / "shared", number, f"{worker}/2", PER_SHARD) for worker in (0, 1)]
    told = [process.communicate()[0] for process in both]
    same = digest(folder / "whole")
    return {"records": number, "records_per_shard": PER_SHARD, "kills": after,
            "killed_equals_whole": digest(folder / "killed") == same,
            "two_processes_equal_whole": digest(folder / "shared") == same,
            "who_was_last": [text.count("left to other workers") == 0 for text in told]}


PARTS = {"jpegs": lambda folder, args: jpegs(folder / "jpegs", args.jpegs),
         "quickstart": lambda folder, args: quickstart(folder),
         "memory": lambda folder, args: memory(folder, args.records),
         "bytes": lambda folder, args: kills(folder, args.records // 40, args.kills)}


def tell(part: str, result) -> None:
    if part == "memory":
        for line in result:
            print(f"{line['records']:>10,} records: {line['seconds']:>7} s, peak {line['peak_mib']} MiB "
                  f"({line['peak_mib_before']} before it began), store {line['store_mib']} MiB")
    elif part == "jpegs":
        for name in ("read", "prepared"):
            ratio = result[f"bare_over_{name}"]
            print(f"256 px JPEGs {name}: {ratio['wall']:.0%} of bare decoding's rate, {ratio['cpu']:.0%} by "
                  "CPU")
        print(f"  of its CPU: {result['prepared_cpu_split']}")
    elif part == "quickstart":
        print(f"the quickstart prepared: {result['prepare_over_parts']:.2f} times the CPU of its sources, "
              "tokenizer and codec alone")
    else:
        print(f"killed {len(result['kills'])} times: same bytes {result['killed_equals_whole']}; "
              f"two processes: {result['two_processes_equal_whole']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--parts", default=",".join(PARTS), help="which to run")
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--jpegs", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        root, number, worker, per_shard = args.child
        return child(Path(root), int(number), worker, int(per_shard))
    about, there = machine(), args.out and args.out.exists()
    result = json.loads(args.out.read_text())["result"] if there else {}
    for part in args.parts.split(","):
        with tempfile.TemporaryDirectory() as folder:
            result[part] = PARTS[part](Path(folder), args)
        tell(part, result[part])
        save(args.out, about, result)


if __name__ == "__main__":
    main()
