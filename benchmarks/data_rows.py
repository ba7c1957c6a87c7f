"""How fast rows of training are read, how full they are, and what opening and restarting cost.

  python benchmarks/data_rows.py                                                 # a table
  python benchmarks/data_rows.py --out benchmarks/results/data_rows_cpu.json     # and a file

The rows of experiments/transfusion.py (T = 4096, 512 rows a window) of a store of two sources, equally shared:
pictures as (32, 32, 8) bfloat16 latents, 256 patches each, with captions of 30 tokens; and texts of 900 tokens,
lognormal. Their documents are read record by record, as training reads them, and, by turns and of the same
rows, by one call a shard. Tokens are positions of full rows; per core is per second of processor time, all
threads counted. The store is in memory or not as the system pleases. The same for pictures of a source of 8
records; memory over many rows; the first batch of 10,000 shards, each written by a `store.Writer`, and what
listing and reading their ledger costs; a restart at step 10^6. Takes four minutes on two cores.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ml_dtypes
import numpy as np

from benchmarks.report import machine, save
from experiments import transfusion
from tfusion import config, objectives  # noqa: F401 (registers)
from tfusion.data import layout, packing, pipeline, store
from tfusion.data.documents import Documents
from tfusion.data.rows import PackedRows
from tfusion.data.tokenizers import ByteTokenizer

VOCABULARY, BATCH, ROUNDS, WINDOWS = 32_000, 32, 8, 4
MANY = 10_000  # shards
PAIRS, TEXTS, PER_SHARD = 4096, 16_384, 512


class Tokenizer(ByteTokenizer):
    vocab_size = VOCABULARY  # ids are drawn


def write(root: Path) -> None:
    draw, latents = np.random.default_rng(0), []
    for _ in range(64):
        latents.append(draw.standard_normal((32, 32, 8)).astype(ml_dtypes.bfloat16))

    def ids(mean: float, spread: float):
        number = int(np.exp(draw.normal(np.log(mean) - spread**2 / 2, spread)))
        return layout.text(draw.integers(4, VOCABULARY, max(1, number)))

    def records(number: int, make):
        for shard in range(-(-number // PER_SHARD)):
            yield shard, [make() for _ in range(min(PER_SHARD, number - shard * PER_SHARD))]

    def pair():
        return [ids(30, 0.6), layout.image(latents[draw.integers(64)])]

    for name, number, make in (("images", PAIRS, pair), ("text", TEXTS, lambda: [ids(900, 1.0)]),
                               ("few", 8, pair)):
        for shard, some in records(number, make):
            with store.Writer(root, name, "train", shard) as writer:
                for parts in some:
                    writer.add(parts)
    for shard in range(MANY):
        with store.Writer(root, "many", "train", shard) as writer:
            for _ in range(8):
                writer.add([ids(900, 1.0)])


def open_rows(root: Path, **shares) -> PackedRows:
    cfg = config.from_dict(transfusion.get_config())
    spec = cfg.data.sources["text"]
    data = dataclasses.replace(cfg.data, prepared=str(root), image_share=1.0 if "few" in shares else 0.5,
                               sources={name: dataclasses.replace(spec, share=share)
                                        for name, share in shares.items()})
    return PackedRows(dataclasses.replace(cfg, data=data).rows, cfg.seed)


def read_one_by_one(source: Documents) -> None:
    """Makes a source read each record of a batch by a call of its own."""
    read = source.source.read
    source.source.read = lambda shard, records: [read(shard, [record])[0] for record in records]


def rate(rows: PackedRows, first: int, number: int) -> dict:
    """Of `number` rows from `first` on, in batches, on this thread."""
    wall, cpu, positions = time.perf_counter(), time.process_time(), 0
    for row in range(first, first + number, BATCH):
        batch = packing.stack_rows(rows.read(range(row, row + BATCH)))
        rows.check(batch)
        positions += batch.tokens_BT.size
    return {"tokens_per_second": round(positions / (time.perf_counter() - wall)),
            "tokens_per_core_second": round(positions / (time.process_time() - cpu))}


def reading(root: Path) -> dict:
    """Single and batched reads, by turns, each over the same window, and who is first changes; 8 records."""
    out = {"single": [], "batched": [], "few": []}
    for turn in range(ROUNDS):
        for name in list(out)[:: (-1) ** turn]:
            rows = open_rows(root, **({"few": 1.0} if name == "few" else {"images": 0.5, "text": 0.5}))
            if name == "single":
                for source in rows.sources:
                    read_one_by_one(source)
            out[name].append(rate(rows, turn * 512, 512))
    middle = {name: {key: statistics.median(one[key] for one in all_of_them) for key in all_of_them[0]}
              for name, all_of_them in out.items()}
    pairs = {key: [round(a[key] / b[key], 3) for a, b in zip(out["single"], out["batched"])]
             for key in middle["single"]}
    return {"rounds": out, "median": middle, "single_over_batched": pairs, "single_over_batched_median": {
        key: statistics.median(some) for key, some in pairs.items()}}


def filling(root: Path) -> dict:
    rows, filled, taken = open_rows(root, images=0.5, text=0.5), [], np.zeros(2)
    dropped = []
    for window in range(1, WINDOWS + 1):
        plan = rows.plan(window)
        sizes = {name: length for w in (window - 1, window) for name, length in zip(
            rows.offered(w).named(slice(None)), rows.offered(w).lengths.tolist())}
        for document in (document for row in plan.rows for document in row):
            taken[document[0]] += sizes[document]
        filled.append(round(plan.num_positions / (512 * 4096), 4))
        dropped.append(round(rows.stats(window * 512)["data/dropped_documents"], 4))
    return {"windows": WINDOWS, "fill": filled, "dropped": dropped,
            "shares": {source.name: round(float(x), 4) for source, x in zip(rows.sources, taken / taken.sum())}}


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(root: Path, number: int) -> dict:
    """Resident size after each eighth of the rows, read as the loop does."""
    rows, after = open_rows(root, images=0.5, text=0.5), {}
    for k, _ in enumerate(pipeline.batches(rows, 0, number // BATCH, BATCH), start=1):
        if k % (number // BATCH // 8) == 0:
            after[k * BATCH] = round(resident_mib())
    return after


def seconds(fn) -> dict:
    wall, cpu = time.perf_counter(), time.process_time()
    fn()
    return {"seconds": round(time.perf_counter() - wall, 3), "cpu_seconds": round(time.process_time() - cpu, 3)}


def completing(root: Path) -> dict:
    """What 10,000 shards cost who goes on with writing them, who completes the folder, and who opens it."""
    folder = root / "many" / "train"
    return {"files while written": len(list(folder.iterdir())),
            "shards listed while written": seconds(lambda: store.finished(root, "many", "train")),
            "folder completed": seconds(lambda: store.write_meta(root, Tokenizer(), "none", (32, 32, 8))),
            **listing(root)}


def listing(root: Path) -> dict:
    return {"ledger read": seconds(lambda: store.ledger(root / "many" / "train")),
            "splits found": seconds(lambda: store.split_folders(root))}


def opening(root: Path) -> dict:
    """Rows opened, and the first batch of them."""
    out = {}
    for name, shares, row in (("first batch of 10,000 shards", {"many": 1.0}, 0),
                              ("restart at step 10^6 of 10,000 shards", {"many": 1.0}, 10**6 * BATCH),
                              ("restart at step 10^6", {"images": 0.5, "text": 0.5}, 10**6 * BATCH)):
        rows = []
        opened = seconds(lambda: rows.append(open_rows(root, **shares)))  # noqa: B023 (called here)
        batch = seconds(lambda: packing.stack_rows(rows[0].read(range(row, row + BATCH))))  # noqa: B023
        out[name] = {"open": opened, "batch": batch}
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rows", type=int, default=20_480, help="over which memory is looked at")
    args = parser.parse_args()
    about = machine()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root)
        result = {"folder": completing(root), "opening": opening(root), "filling": filling(root),
                  "reading": reading(root), "resident_mib_after_rows": memory(root, args.rows)}
    for name, values in (*result["opening"].items(), *result["reading"]["median"].items()):
        print(f"{name:>40}: {values}")
    print(f"{'single / batched':>40}: {result['reading']['single_over_batched_median']}")
    print(f"{'folder':>40}: {result['folder']}")
    print(f"{'filling':>40}: {result['filling']}\n{'MiB after rows':>40}: {result['resident_mib_after_rows']}")
    save(args.out, about, result)


if __name__ == "__main__":
    main()
