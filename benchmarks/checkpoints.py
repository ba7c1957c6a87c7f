"""What checkpoints survive, and what their checksums cost.

  python benchmarks/checkpoints.py kills --out benchmarks/results/checkpoint_kills_cpu.json   # 50 random kills
  python benchmarks/checkpoints.py flips --out benchmarks/results/checkpoint_flips_cpu.json   # 100 flipped bits
  python benchmarks/checkpoints.py sums  --out benchmarks/results/checkpoint_sums_cpu.json    # a save of 1 GiB

kills: a tiny run (tests/toy.py) that saves every second step is killed (SIGKILL) and started again until it
has been killed often enough, then let go to its end. A kill falls at a random moment, or when the first trace
of a phase is seen on the disk: a save under way, one about to be renamed, a deletion. It must end with the
losses and the state of a run that nobody killed, bit by bit, and with nothing left over.
flips: one bit of one file of a checkpoint is flipped, and the checkpoint is restored: an error that names what
is damaged, or the values that were saved. Half of the flips are drawn over bytes, half over files, then bytes.
sums: the seconds of the checksums beside those of the whole save, its asynchronous part included, by turns; and
the same of processor time, all threads counted, which other work on the machine changes less.
"""

import argparse
import collections
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.report import machine, save
from tests import toy
from tfusion import checkpoint, checksum, config, distributed, sharding
from tfusion.checkpoint import Checkpoints
from tfusion.errors import UserError
from tfusion.training.loop import train

PHASES = ("any moment", "save", "commit", "deletion")
STEPS = 10  # of the run, a kill: each start makes 2 to 6 before it is killed, and those it needs to the phase


def tiny(num_steps: int):
    tree = toy.get_config()
    tree["train"] |= dict(num_steps=num_steps, checkpoint_every=2, log_every=1, eval_every=0,
                          diagnostics_every=0)
    return config.from_dict(tree | {"width": 4096})


def run(cfg, workdir: Path) -> None:
    """What is killed: a process of its own."""
    sys.stderr = open(workdir.with_suffix(".stderr"), "w")  # noqa: SIM115
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    distributed.start_process()
    mesh = sharding.make_mesh(config.MeshConfig(1, 1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        train(cfg, workdir, mesh)


def start(cfg, workdir: Path):
    """Forked from a server that has imported all and started no device, so that a start takes a second."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tfusion.training.loop", "tests.toy"])
    workdir.mkdir(exist_ok=True)
    process = context.Process(target=run, args=(cfg, workdir))
    process.start()
    return process


def phase(folder: Path) -> str:
    """What the disk says is under way."""
    if any(folder.glob(f"{checkpoint.DELETING}/*")):
        return "deletion"
    unfinished = list(folder.glob(checkpoint.UNFINISHED))
    if any((path / "commit_success.txt").exists() for path in unfinished):
        return "commit"
    return "save" if unfinished else "any moment"


def steps(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in folder.glob("[0-9]*") if p.name.isdecimal())


def kill_at(process, folder: Path, wanted: str, draw: random.Random) -> str | None:
    """Kills it a moment after one of its first checkpoints, or at the wanted phase's next trace after that. The
    phase it was in; None where it had ended by itself."""
    until = max(steps(folder), default=0) + 2 * draw.randint(1, 3)
    while process.is_alive() and max(steps(folder), default=0) < until:
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.2))
    deadline = time.monotonic() + 60
    while process.is_alive() and wanted not in (PHASES[0], phase(folder)) and time.monotonic() < deadline:
        pass
    if not process.is_alive():
        return None
    process.kill()
    process.join()
    return phase(folder) if process.exitcode == -signal.SIGKILL else None


def lines(workdir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k.startswith(("train/", "total/", "step"))} for row in rows]


def last_state(workdir: Path) -> dict:
    """{item/leaf: [form, sum, sum]} of the last checkpoint, and the bits it holds."""
    checkpoints = Checkpoints(workdir)
    step = max(checkpoints.steps())
    return {"step": step, **checkpoints.meta(step)["leaves"]}


def kill_many(root: Path, number: int, seed: int = 0) -> dict:
    """{phase: kills}. Raises AssertionError where the killed run is not the whole one in the end."""
    cfg, draw, found = tiny(STEPS * number), random.Random(seed), collections.Counter()
    whole = start(cfg, root / "whole")
    whole.join()
    assert whole.exitcode == 0, (root / "whole.stderr").read_text()[-2000:]
    folder, starts = root / "killed" / "checkpoints", 0
    while found.total() < number:
        process, starts = start(cfg, root / "killed"), starts + 1
        fell = kill_at(process, folder, PHASES[starts % len(PHASES)], draw)
        if fell is None:
            assert process.exitcode == 0, (root / "killed.stderr").read_text()[-2000:]
            break  # at its end too early
        found[fell] += 1
        print(f"killed {found.total()} of {number} at step {max(steps(folder))}: {dict(found)}", flush=True)
    last = start(cfg, root / "killed")
    last.join()
    assert last.exitcode == 0, (root / "killed.stderr").read_text()[-2000:]
    assert lines(root / "killed") == lines(root / "whole"), "the curves differ"
    assert last_state(root / "killed") == last_state(root / "whole"), "the last states differ"
    assert sorted(p.name for p in folder.iterdir() if p.name != checkpoint.DELETING) == [
        str(n) for n in steps(root / "whole" / "checkpoints")], "something is left over"
    return dict(found)


def kills(args) -> dict:
    with tempfile.TemporaryDirectory() as root:
        number, began = args.number or 50, time.perf_counter()
        found = kill_many(Path(root), number)
        return {"kills": sum(found.values()), "phase_seen_on_disk": found, "num_steps": STEPS * number,
                "curve_and_state": "bit for bit those of the run that nobody killed", "left_over": 0,
                "seconds": round(time.perf_counter() - began)}


def restored(workdir: Path, step: int, target) -> tuple:
    checkpoints = Checkpoints(workdir)
    meta = checkpoints.meta(step)
    items = checkpoints.restore(step, target)
    checkpoints.close()
    return meta, jax.device_get(items)


def outcome(workdir: Path, step: int, target, good) -> str:
    """'named' by the error's first words, 'equal', or what must not be."""
    try:
        meta, items = restored(workdir, step, target)
    except UserError as e:
        text = str(e).removeprefix(f"checkpoint {workdir / 'checkpoints' / str(step)}")
        return f"named: {re.split(r'[,:;(]', text)[0].strip()}"
    except Exception as e:
        return f"WRONG: {type(e).__name__}"
    same = meta == good[0] and all(a.tobytes() == b.tobytes() for a, b in zip(
        *map(jax.tree.leaves, (items, good[1])), strict=True))
    return "equal" if same else "WRONG: another value, without a word"


def small_state() -> dict:
    """Items as a run has them: nested, with scalars, zeros (which are stored as nothing) and bfloat16."""
    draw = np.random.default_rng(0)
    params = {"blocks": {f"w{i}": draw.standard_normal((2, 48, 64), np.float32) for i in range(4)},
              "embed": draw.standard_normal((260, 32)).astype(jnp.bfloat16), "norm": np.ones(32, np.float32)}
    adam = optax.ScaleByAdamState(np.int32(4), jax.tree.map(np.zeros_like, params), params)
    items = {"params": params, "ema": params, "optimizer": (adam, optax.EmptyState()),
             "buffers": {"seen": np.int32(7)}}
    return jax.tree.map(jnp.asarray, items)


def flips(args) -> dict:
    draw, number, found, rows = random.Random(0), args.number or 100, collections.Counter(), []
    with tempfile.TemporaryDirectory() as root:
        root, items = Path(root), small_state()
        checkpoints, mesh = Checkpoints(root, writing=True), sharding.parse_mesh(None)
        checkpoints.save(2, items, {"next_row": 16, "totals": {"tokens": 4096, "flops": 1.25e9},
                                    "identity": {"tokenizer": "a9c1"}, "config": {"seed": 0}})
        checkpoints.close()
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh)), items)
        good, folder = restored(root, 2, target), root / "checkpoints/2"
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
        sizes = [p.stat().st_size for p in files]
        for i in range(number):
            path = draw.choices(files, sizes)[0] if i % 2 else draw.choice(files)
            data = bytearray(path.read_bytes())
            at, bit = draw.randrange(len(data)), draw.randrange(8)
            data[at] ^= 1 << bit
            path.write_bytes(data)
            said = outcome(root, 2, target, good)
            data[at] ^= 1 << bit
            path.write_bytes(data)
            found[said] += 1
            rows.append({"file": str(path.relative_to(folder)), "byte": at, "bit": bit, "outcome": said})
        assert outcome(root, 2, target, good) == "equal"
    for said, n in found.most_common():
        print(f"{n:4d}  {said}")
    return {"flips": number, "outcomes": dict(found.most_common()), "each": rows}


def sums(args) -> dict:
    """The save of a state as Adam has it, float32, in a few large arrays and many small ones."""
    big = round(args.gib * 2**30 / 4 / 12) // 1024
    key, rounds = jax.random.key(0), []
    tree = {name: {f"w{i}": jax.random.normal(jax.random.fold_in(key, i), (big, 1024)) for i in range(3)} | {
        f"norm{i}": jax.random.normal(jax.random.fold_in(key, i), (1024,)) for i in range(12)}
        for name in ("params", "ema", "mu", "nu")}
    items = {"params": tree["params"], "ema": tree["ema"], "optimizer": {"mu": tree["mu"], "nu": tree["nu"]}}
    jax.block_until_ready(items)
    size = sum(x.nbytes for x in jax.tree.leaves(items))
    began = time.perf_counter()
    checksum.leaves("first", items)
    first = time.perf_counter() - began
    with tempfile.TemporaryDirectory(dir=args.dir) as root:
        for i in itertools.count(1):
            began, cpu = time.perf_counter(), time.process_time()
            for name, item in items.items():
                checksum.leaves(name, item)
            row = {"sums_s": time.perf_counter() - began, "sums_cpu_s": time.process_time() - cpu}
            checkpoints = Checkpoints(root, writing=True)
            began, cpu = time.perf_counter(), time.process_time()
            checkpoints.save(i, items, {})
            row["save_blocks_s"] = time.perf_counter() - began
            checkpoints.close()
            rounds.append(row | {"save_whole_s": time.perf_counter() - began,
                                 "save_whole_cpu_s": time.process_time() - cpu})
            print(rounds[-1], flush=True)
            if i == (args.number or 5):
                break
            shutil.rmtree(Path(root) / "checkpoints")
    share = [r["sums_s"] / r["save_whole_s"] for r in rounds]
    cpu = statistics.median(r["sums_cpu_s"] / r["save_whole_cpu_s"] for r in rounds)
    print(f"{size / 2**30:.2f} GiB: sums are {statistics.median(share):.2%} of a save ({min(share):.2%} to "
          f"{max(share):.2%}), {cpu:.2%} of its processor time; the first time, compiling, {first:.2f} s")
    return {"bytes": size, "share_of_save_median": statistics.median(share), "share_of_processor_time": cpu,
            "shares": share, "rounds": rounds, "first_with_compilation_s": first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("kills", "flips", "sums"))
    parser.add_argument("--number", type=int, help="of kills, flips or rounds")
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--dir", help="where the save of `sums` is written")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    here = machine()
    save(args.out, here, globals()[args.what](args))


if __name__ == "__main__":
    main()
