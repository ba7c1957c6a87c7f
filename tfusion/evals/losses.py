"""Held-out losses of a trained model, source by source; per token and per byte where there is text.

Every held-out document is looked at exactly once (data/heldout.py), on the noise of every evaluation; of
pictures alone, which cannot be padded, as many as fill whole batches. The language-model loss is the mean over
all scored positions: every token of the text, and the BOI and EOS that the text could have been followed by
instead. Per byte, the same nats, all of them, are divided by the bytes of the text itself (UTF-8), so that
models with different tokenizers can be compared.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from tfusion import sharding
from tfusion.evals import figure
from tfusion.evals.base import Evaluator, Options, open_heldout, register, section, write_card
from tfusion.inference.trained import Trained
from tfusion.objectives import kind_of, make_objective
from tfusion.paths import replace_text
from tfusion.training.step import make_eval_step

POSITIONS = 8192  # looked at at once by each share of the devices: the figures do not depend on it
AT_ONCE = 1024  # records that are read together
SUMS = "sums.json"


class Sums(NamedTuple):
    """Of one source's held-out documents, or of several sources'."""

    losses: dict  # {name: [sum, count]}
    images: int

    def __add__(self, other: "Sums") -> "Sums":
        names = self.losses | other.losses
        pairs = {name: [a + b for a, b in zip(self.losses.get(name, (0, 0)), other.losses.get(name, (0, 0)))]
                 for name in names}
        return Sums(pairs, self.images + other.images)

    def mean(self, name: str) -> float | None:
        """None where nothing was counted."""
        total, count = self.losses.get(name, (0, 0))
        return total / count if count else None


NOTHING = Sums({}, 0)


def rows_at_once(held) -> int:
    """A row's positions, or a picture's side, decide how many go at once."""
    longest = max((size for x in held.read([0])[0] for size in np.shape(x)), default=1)
    shards = sharding.num_shards("batch")
    return max(1, min(POSITIONS // longest, len(held) // shards)) * shards


def batches(held, source: str, local_rows=None):
    """Iterator over a source's held-out rows, with a progress bar; of each batch those named, else all."""
    rows = rows_at_once(held)
    return tqdm(held.batches(rows, local_rows), desc=f"held out: {source}", unit="batch",
                total=-(-len(held) // rows))


def make_step(cfg):
    """(params, aux, batch) -> (losses, images)."""
    eval_step, totals = make_eval_step(make_objective(cfg)), kind_of(cfg).totals
    return jax.jit(lambda params, aux, batch: (
        eval_step(params, aux, batch), totals(cfg, batch).get("images", 0)))


def measure(run: Trained, held, step, source: str) -> Sums:
    """The losses of one source's held-out documents. step: of `make_step`."""
    sums, mesh, rows = NOTHING, jax.sharding.get_mesh(), rows_at_once(held)
    for batch in batches(held, source, sharding.local_rows(mesh, rows)):
        losses, images = jax.device_get(step(run.params, run.aux, sharding.put_batch(batch, mesh, rows)))
        sums += Sums({name: [float(x) for x in pair] for name, pair in losses.items()}, int(images))
    return sums


def read_sums(folder: Path) -> dict[str, Sums]:
    """{source: its sums}, as this evaluator left them in its folder."""
    return {source: Sums(**sums) for source, sums in json.loads((folder / SUMS).read_text()).items()}


def text_bytes(held, tokenizer) -> int:
    """UTF-8 bytes of a source's held-out texts, as far as they are looked at: whole records."""
    records = held.source.records
    parts = (part for first in range(0, len(records), AT_ONCE)
             for record in held.source.parts(records[first : first + AT_ONCE]) for part in record)
    return sum(len(tokenizer.decode(part.values.tolist()).encode()) for part in parts if part.kind == "text")


def text_figures(source: str, sums: Sums, size: int) -> dict:
    """Its loss per token and per byte; size: bytes of its texts."""
    title, (nats, tokens) = f"LM loss on held-out {source}", sums.losses["lm_loss"]
    return {
        f"{source}_lm_loss": figure.number(
            f"{title} (nats per token)", nats / tokens, "lower", n=int(tokens)),
        f"{source}_bits_per_byte": figure.number(
            f"{title} (bits per byte)", nats / math.log(2) / max(size, 1), "lower", n=size)}


def other_figures(name: str, sums: dict[str, Sums], total: Sums) -> dict:
    """Any other loss: over all sources, and each source's as a part of it."""
    title = f"Held-out {name.replace('_', ' ')}"

    def loss(title, some):
        return figure.number(title, some.mean(name), "lower", n=some.images or None)

    parts = {f"{name}/{source}": loss(f"{title}, {source}", some) for source, some in sums.items()
             if some.mean(name) is not None}
    return {name: loss(title, total)} | (parts if len(parts) > 1 else {})


def table(sums: dict[str, Sums], names, figures: dict) -> dict:
    """The block of the report: a source a row, a loss a column."""
    head, rows = ["held out", *names], []
    per_byte = any(name.endswith("_bits_per_byte") for name in figures)
    for source, some in sums.items():
        bits = figures.get(f"{source}_bits_per_byte", {"value": None})["value"]
        rows.append([source, *(some.mean(name) for name in names), *[bits] * per_byte])
    head = [word.replace("_", " ").replace("lm ", "LM ") for word in head] + ["bits per byte"] * per_byte
    return {"kind": "table", "title": "Held-out losses by source", "head": head, "rows": rows,
            "reading": "Held-out documents: the same, on the same noise, in every run on these data."}


def run(run: Trained, folder: Path, options: Options) -> dict:
    """Sources without held-out documents are named and left out (data/heldout.py)."""
    objective, step, sums, figures = make_objective(run.cfg), make_step(run.cfg), {}, {}
    names = (*objective.weights, *objective.reported)
    for source, held in open_heldout(run.cfg).items():
        sums[source] = some = measure(run, held, step, source)
        if some.mean("lm_loss") is not None:
            figures |= text_figures(source, some, text_bytes(held, run.tokenizer))
    total = sum(sums.values(), NOTHING)
    for name in names:
        if name != "lm_loss" and total.mean(name) is not None:
            figures |= other_figures(name, sums, total)
    replace_text(folder / SUMS, json.dumps({source: some._asdict() for source, some in sums.items()}) + "\n")
    write_card(folder, section("held-out", "Held-out losses", table(sums, names, figures)))
    return figures


register(Evaluator("losses", ("data",), run, order=50))
