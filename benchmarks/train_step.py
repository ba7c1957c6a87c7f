r"""One training step (forward, backward, clip, AdamW) on a CPU with two threads, against its alternatives.

  pip install -e '.[peers]'
  python benchmarks/train_step.py --out=benchmarks/results/train_step_cpu.json
  ... --peer_python=/path/to/python    where the peer has an environment of its own
  ... --contenders=ours,naive          without it

All see the same documents: rows of 512 positions, three texts around two images of 64 patches. Each contender
stays in its own process; short blocks of steps are timed in turn, round after round, and every ratio is taken
within one round: on a shared machine the rounds differ more than the contenders. A ratio's `min` is its worst
round.

  ours         width 256, 4 layers, float32, loss at the scored positions, no moving average
  naive        the same, with attention by a dense mask and logits at every position: plain JAX
  peer         transfusion-pytorch 0.20.0 of the same width and depth, float32
  peer_bf16    the same under bfloat16 autocast
  equal_params ours, widened to the peer's parameter count

B batch, T positions, H heads, E head dimension, V vocabulary.
"""

import datetime
import functools
import json
import os
import platform
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm
from worker import Worker, serve

from experiments.common import base
from tfusion import config, distributed, sharding
from tfusion.data import layout, packing
from tfusion.errors import UserError, run
from tfusion.models import transformer
from tfusion.objectives import make_objective, packed, transfusion
from tfusion.training import state as states
from tfusion.training import step as steps
from tfusion.training.optimizer import make_optimizer
from tfusion.types import Document

HERE = Path(__file__).resolve().parent
OUT = flags.DEFINE_string("out", None, "write the result here, as JSON")
PEER_PYTHON = flags.DEFINE_string("peer_python", sys.executable, "interpreter that has transfusion-pytorch")
CONTENDERS = flags.DEFINE_list("contenders", "ours,naive,peer,peer_bf16,equal_params", "which to time")
ROUNDS = flags.DEFINE_integer("rounds", 12, "blocks of every contender")
BLOCK_SECONDS = flags.DEFINE_float("block_seconds", 1.0, "length of a block, at least one step")
WORKER = flags.DEFINE_string("worker", None, "internal: be this contender, and answer on stdout")

SETTING = dict(width=256, layers=4, heads=4, head_dim=64, text_vocab_size=8192, latent_size=8,
               latent_channels=32, images=2, text_part=126, batch_size=4, seq_len=512, threads=2)
MODELS = {"ours": dict(d_model=256, num_heads=4, num_kv_heads=4, d_ff=688)}
MODELS["naive"] = MODELS["ours"]
MODELS["equal_params"] = dict(d_model=384, num_heads=6, num_kv_heads=6, d_ff=1152)
MATMUL = 2048  # the yardstick: a float32 product of two square matrices of this size

# name: (the slower, of which the best counts; the faster), how many times faster it has to be
SPEEDS = {
    "ours / peer": (("peer",), "ours", 2.5),
    "ours / best peer": (("peer", "peer_bf16"), "ours", 1.8),
    "equal_params / peer": (("peer",), "equal_params", 1.2),
    "ours / naive": (("naive",), "ours", None),
}
MEMORY = 0.6  # of the peer's, at most
SHARE = 0.5  # of the matmul's FLOP/s, at least


def make_config(name: str) -> config.RunConfig:
    s, c = SETTING, base()
    c.model.update(**MODELS[name], num_layers=s["layers"], text_vocab_size=s["text_vocab_size"], remat="none",
                   compute_dtype="float32")
    c.model.adapter.update(latent_size=s["latent_size"], latent_channels=s["latent_channels"], patch_size=1)
    c.data.update(seq_len=s["seq_len"], image_share=0.2)
    c.optimizer.ema_decay = 0.0  # the peer keeps no moving average
    c.train.batch_size = s["batch_size"]
    return config.from_dict(c)


def make_batch(cfg: config.RunConfig):
    """Random rows of one document each, which fills them."""
    rng, m = np.random.default_rng(0), cfg.model

    def text():
        return layout.text(rng.integers(4, m.text_vocab_size, SETTING["text_part"], dtype=np.int32))

    def document():
        parts = [x for _ in range(SETTING["images"])
                 for x in (text(), layout.image(rng.standard_normal(m.latent_shape, np.float32)))]
        return cfg.rows.layout.lay(Document((*parts, text())))

    batch = packing.stack_rows([packing.pack_row(i, [document()], cfg.rows)
                                for i in range(cfg.train.batch_size)])
    packing.check_batch(batch, cfg.vocabulary)
    assert batch.segment_ids_BT.all()
    return batch


def naive_attention(q_BTHE, k_BTHE, v_BTHE, k_start_BT, k_end_BT):
    """What one writes first: a dense boolean mask, softmax, all in (B, T, H, E)."""
    keys = jnp.arange(q_BTHE.shape[1])
    mask_BTS = (k_start_BT[..., None] <= keys) & (keys < k_end_BT[..., None])
    logits_BHTS = jnp.einsum("bthe,bshe->bhts", q_BTHE, k_BTHE) / q_BTHE.shape[-1] ** 0.5
    weights_BHTS = jax.nn.softmax(jnp.where(mask_BTS[:, None], logits_BHTS, -1e9))
    return jnp.einsum("bhts,bshe->bthe", weights_BHTS, v_BTHE)


def naive_next_token_loss(h_BTD, head_DV, tokens_BT, loss_mask_BT, vocab_size: int):
    """Logits at every position."""
    logits_BTV = jnp.where(jnp.arange(head_DV.shape[1]) < vocab_size, h_BTD @ head_DV, -1e9)
    targets_BT = jnp.roll(tokens_BT, -1, axis=1)
    nll_BT = -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), targets_BT[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(loss_mask_BT, nll_BT, 0.0)), jnp.sum(loss_mask_BT)


def work(name: str) -> None:
    """Be a contender of ours."""
    if name == "naive":
        transformer.attention = naive_attention
        transfusion.next_token_loss = naive_next_token_loss
    cfg = make_config(name)
    objective, mesh = make_objective(cfg), sharding.make_mesh(cfg.mesh)
    batch = make_batch(cfg)
    tx = make_optimizer(cfg.optimizer, cfg.train.num_steps)
    with jax.set_mesh(mesh):
        state = states.init_state(objective, tx, False, cfg.seed, mesh)
        placed = sharding.put_batch(batch, mesh, cfg.train.batch_size)
        train_step = steps.jit_train_step(objective, tx, cfg, state).lower(state, {}, placed).compile()
        distributed.return_freed_memory()  # as training does
        last = None

        def step():
            nonlocal state, last
            state, last = train_step(state, {}, sharding.put_batch(batch, mesh, cfg.train.batch_size))

        @functools.cache
        def operands():
            return jax.random.normal(jax.random.key(0), (2, MATMUL, MATMUL))

        product = jax.jit(lambda ab: ab[0] @ ab[1])

        def matmul():
            nonlocal last
            last = product(operands())

        step()
        losses = {key: float(value / count) for key, (value, count) in last.items() if key in objective.weights}
        needed = transfusion.model_flops(cfg, packed.count(cfg.model, batch))
        total = sum(weight * losses[key] for key, weight in objective.weights.items())
        serve({"params": sum(x.size for x in jax.tree.leaves(state.params)), "first_loss": total,
               "config": cfg.to_dict()["model"], "model_flops": jax.tree.map(float, needed),
               "versions": {"python": platform.python_version(), "jax": jax.__version__,
                            "jaxlib": version("jaxlib")}},
              {"step": step, "matmul": matmul}, finish=lambda: jax.block_until_ready((state, last)))


def command(name: str) -> list[str]:
    if name in MODELS:
        return [sys.executable, str(HERE / "train_step.py"), f"--worker={name}"]
    dtype = {"peer": "float32", "peer_bf16": "bfloat16"}[name]
    return [PEER_PYTHON.value, str(HERE / "peer_transfusion_pytorch.py"),
            f"--setting={json.dumps(SETTING)}", f"--dtype={dtype}"]


def start(name: str) -> Worker:
    try:
        return Worker(command(name), SETTING["threads"])
    except OSError as e:
        what = "did not start, its error is above" if name in MODELS else (
            "did not start: pip install -e '.[peers]', or --peer_python=/path/to/python that has it, or "
            "--contenders=ours,naive")
        raise UserError(f"contender '{name}' {what}") from e


def alternate(title: str, contenders: list) -> list[dict]:
    """Times (name, worker, function) in turn. A list of {name: {"seconds", "cpu_seconds"} of one call}."""
    times = {}
    for name, worker, function in contenders:
        worker.ask(run=function, times=1)
        took = worker.ask(run=function, times=1)["seconds"]
        times[name] = max(1, round(BLOCK_SECONDS.value / took))
    out = []
    for _ in tqdm(range(ROUNDS.value), desc=title, unit="round"):
        blocks = {name: worker.ask(run=function, times=times[name]) for name, worker, function in contenders}
        out.append({name: {key: value / times[name] for key, value in block.items()}
                    for name, block in blocks.items()})
    return out


def spread(rounds: list, required, ratio) -> dict:
    """Median and worst of ratio(round, unit) over the rounds."""
    values = [ratio(r, "seconds") for r in rounds]
    out = {"median": statistics.median(values), "min": min(values),
           "by_cpu_time": statistics.median(ratio(r, "cpu_seconds") for r in rounds), "rounds": values}
    return out if required is None else {**out, "required": required, "reached": out["median"] >= required}


def machine() -> dict:
    cpu = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
           if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else [platform.processor()]
    return {"cpu": cpu[0], "cores": os.cpu_count(), "platform": platform.platform(),
            "load_average": os.getloadavg()[0],
            "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")}


def compare(workers: dict) -> dict:
    """Every contender against the others, by wall time and, less sensitive to other load, by CPU time."""
    positions = SETTING["batch_size"] * SETTING["seq_len"]
    rounds = alternate("training steps", [(name, worker, "step") for name, worker in workers.items()])
    result = {"contenders": {}, "speed": {}}
    for name, worker in workers.items():
        ms = [1e3 * r[name]["seconds"] for r in rounds]
        result["contenders"][name] = {
            **worker.about, "tokens_per_second": 1e3 * positions / statistics.median(ms),
            "step_ms": {"median": statistics.median(ms), "min": min(ms)},
            "cpu_ms": statistics.median(1e3 * r[name]["cpu_seconds"] for r in rounds),
            **worker.ask(memory=True)}
    for name, (slow, fast, required) in SPEEDS.items():
        if {*slow, fast} <= set(workers):
            result["speed"][name] = spread(rounds, required, lambda r, unit: (
                min(r[s][unit] for s in slow) / r[fast][unit]))  # noqa: B023 (used at once)
    if {"ours", "peer"} <= set(workers):
        ratio = result["contenders"]["ours"]["peak_mib"] / result["contenders"]["peer"]["peak_mib"]
        result["memory ours / peer"] = {"ratio": ratio, "required": MEMORY, "reached": ratio <= MEMORY}
    return result


def compare_matmul(worker: Worker) -> dict:
    """The step's model FLOP/s as a share of a matrix product's, timed in turn in one process."""
    rounds = alternate("matmul", [(name, worker, name) for name in ("step", "matmul")])
    step, product = sum(worker.about["model_flops"].values()), 2 * MATMUL**3

    def gflops(name, count):
        return count / statistics.median(r[name]["seconds"] for r in rounds) / 1e9

    return {**spread(rounds, SHARE, lambda r, unit: step / r["step"][unit] / (product / r["matmul"][unit])),
            "flops_per_step": step, "gflops_step": gflops("step", step),
            "gflops_matmul": gflops("matmul", product)}


def show(result: dict) -> None:
    print(f"{'':14s}{'params':>12s}{'tokens/s':>10s}{'step ms':>9s}{'min':>9s}{'CPU ms':>9s}{'peak MiB':>10s}")
    for name, c in result["contenders"].items():
        print(f"{name:14s}{c['params']:12,d}{c['tokens_per_second']:10.0f}{c['step_ms']['median']:9.0f}"
              f"{c['step_ms']['min']:9.0f}{c['cpu_ms']:9.0f}{c['peak_mib']:10.0f}")
    ratios = {f"speed {name}": ratio for name, ratio in result["speed"].items()}
    ratios |= {key: value for key, value in result.items() if key.endswith(("peer", "matmul"))}
    for name, r in ratios.items():
        wanted = f"  to reach {r['required']}: {'yes' if r['reached'] else 'NO'}" if "required" in r else ""
        value = f"median {r['median']:.3f}  min {r['min']:.3f}  by CPU time {r['by_cpu_time']:.3f}" \
            if "median" in r else f"{r['ratio']:.3f}"
        print(f"{name:36s}{value}{wanted}")


def main() -> None:
    if WORKER.value:
        work(WORKER.value)
        return
    unknown = set(CONTENDERS.value) - {*MODELS, "peer", "peer_bf16"}
    if unknown:
        raise UserError(f"--contenders: unknown '{min(unknown)}'; known: {', '.join(MODELS)}, peer, peer_bf16")
    workers = {}
    try:
        for name in tqdm(CONTENDERS.value, desc="compiling", unit="contender"):
            workers[name] = start(name)
        result = {"setting": SETTING, "machine": machine(), **compare(workers)}
        if "ours" in workers:
            result["model FLOP/s as a share of matmul"] = compare_matmul(workers["ours"])
    finally:
        for worker in workers.values():
            worker.close()
    show(result)
    if OUT.value:
        Path(OUT.value).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
