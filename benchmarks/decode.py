"""Text decoding with keys and values kept against recomputing the row for every token, on this machine.

  python benchmarks/decode.py                                           # a table
  python benchmarks/decode.py --out benchmarks/results/decode_cpu.json  # and a file

The transformer of experiments/quickstart.py with random weights writes a row of 1,024 positions from its BOS,
greedily, never ending it early. `kept` is tfusion/inference/writing.py:write_text; `recomputed` runs the
whole row for each token, as it did before. Both are compiled first, then take turns, round after round, and a
ratio is taken within one round. The tokens they write must be the same. On two cores it takes three minutes.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks.report import machine, save
from experiments import quickstart
from tfusion import config, sharding
from tfusion.inference import writing as decoding
from tfusion.models.transfusion import Transfusion
from tfusion.objectives import make_objective
from tfusion.types import EOS


@partial(jax.jit, static_argnums=0)
def recomputed(model: Transfusion, params, rows: decoding.Rows, limit_B, temperature) -> decoding.Rows:
    """decoding.write_text, without a cache; rows never end before their limit."""
    apply, each = partial(model.apply, {"params": params}), jnp.arange(len(limit_B))

    def body(rows: decoding.Rows) -> decoding.Rows:
        x_BTD, _ = apply(rows.tokens_BT, rows.image_start_BI, rows.latents_BIhwc,
                         jnp.zeros(rows.image_start_BI.shape), method="embed")
        h_BTD, _ = apply(x_BTD, decoding.sight(model, rows), method="hidden")
        logits_BV = apply(h_BTD[each, rows.length_B - 1], method="logits")
        token = decoding._next_tokens(model, logits_BV, rows, temperature)
        return decoding.append(rows, token, rows.length_B < limit_B)

    return jax.lax.while_loop(lambda rows: jnp.any(rows.length_B < limit_B), body, rows)


CONTENDERS = {"kept": decoding.write_text, "recomputed": recomputed}


def setting(length: int):
    """(config, parameters): at init, but EOS is never the likeliest."""
    tree = quickstart.get_config()
    tree.data.update(seq_len=length, image_share=0.0)
    cfg = config.from_dict(tree)
    params = nn.unbox(jax.jit(make_objective(cfg).init)(jax.random.key(0)))
    params["lm_head_kernel"] = params["lm_head_kernel"].at[:, EOS].set(0.0)
    return cfg, params


def measure(length: int, num_rows: int, rounds: int) -> dict:
    cfg, params = setting(length)
    model = Transfusion(cfg.model, length)
    rows = decoding.start_rows(cfg, [[]] * num_rows, 0, length)
    began, seconds, texts = time.time(), {name: [] for name in CONTENDERS}, {}
    programs = {name: fn.lower(model, params, rows, rows.length_B, jnp.float32(0)).compile()
                for name, fn in CONTENDERS.items()}
    for n in range(rounds):
        for name, program in programs.items():
            print(f"\rround {n + 1}/{rounds}: {name}, {time.time() - began:.0f} s so far    ", end="",
                  file=sys.stderr, flush=True)
            start = time.perf_counter()
            out = jax.block_until_ready(program(params, rows, jnp.full(num_rows, length), jnp.float32(0)))
            seconds[name].append(time.perf_counter() - start)
            texts[name] = np.asarray(out.tokens_BT)
    print(file=sys.stderr)
    kept, whole = texts["kept"], texts["recomputed"]
    assert (kept == whole).all(), f"they part at position {np.argwhere(kept != whole)[0, 1]}"
    tokens = num_rows * (length - 1)
    return {
        "T": length, "rows": num_rows, "tokens": tokens, "layers": cfg.model.num_layers,
        "width": cfg.model.d_model, "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "dtype": cfg.model.compute_dtype, "distinct_tokens": len(np.unique(kept)),
        "seconds": {name: [round(s, 3) for s in took] for name, took in seconds.items()},
        "tokens_per_second": {name: round(tokens / min(took), 1) for name, took in seconds.items()},
        "recomputed_over_kept": [round(b / a, 1) for a, b in zip(seconds["kept"], seconds["recomputed"])]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--length", type=int, default=1024, help="positions of a row")
    parser.add_argument("--rows", type=int, default=1, help="rows written at once")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    about = machine()
    with jax.set_mesh(sharding.parse_mesh(None)):
        result = measure(args.length, args.rows, args.rounds)
    for name, rate in result["tokens_per_second"].items():
        print(f"{name:>10}: {rate:>9} tokens/s")
    print(f"     ratio: {statistics.median(result['recomputed_over_kept'])} "
          f"(rounds {', '.join(map(str, result['recomputed_over_kept']))})")
    save(args.out, about, result)


if __name__ == "__main__":
    main()
