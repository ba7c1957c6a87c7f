"""Held-out losses of a trained model beside those of the baselines, source by source.

Every held-out document is looked at exactly once (data/heldout.py), on the noise of every evaluation. The
language-model loss is the mean over all scored positions: every token of the text, and the BOI and EOS that the
text could have been followed by instead. Per byte, the same nats, all of them, are divided by the bytes of the
text itself (UTF-8), so that models with different tokenizers can be compared.
"""

import math
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from tfusion import sharding
from tfusion.data.heldout import HeldOut
from tfusion.evals import statistics
from tfusion.evals.baselines import (
    count_ngrams,
    documents_read,
    fit_gaussian,
    linear_losses,
    scored_pairs,
)
from tfusion.inference.trained import Trained
from tfusion.objectives import kind_of, make_objective
from tfusion.objectives.transfusion import NUM_BINS, TransfusionConfig
from tfusion.training.step import make_eval_step

POSITIONS = 8192  # looked at at once by each share of the devices: the figures do not depend on it
BINS = [f"diffusion_loss_bin{i}" for i in range(NUM_BINS)]


class Sums(NamedTuple):
    """Of one source's held-out documents, or of several sources'."""

    model: dict  # {name: array (sum, count)}
    linear: dict  # the same of the linear predictor; empty without images
    images: int

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*({name: a.get(name, 0) + b.get(name, 0) for name in a | b}
                      for a, b in zip(self[:2], other[:2])), self.images + other.images)


def rows_at_once(cfg: TransfusionConfig) -> int:
    shards = sharding.num_shards("batch")
    return max(1, POSITIONS // cfg.data.seq_len) * shards


def measure(cfg: TransfusionConfig, run: Trained, held: HeldOut, eval_step, gaussian, name: str):
    """(Sums, (token, next token) at every scored position) of one source."""
    sums, pairs, rows = Sums({}, {}, 0), [], rows_at_once(cfg)
    for batch in tqdm(held.batches(rows), desc=f"held out: {name}", unit="batch", total=-(-len(held) // rows)):
        images = int((batch.max_t_BI > 0).sum())
        model, linear = (
            {key: np.array(pair, np.float64) for key, pair in losses.items()}
            for losses in (jax.device_get(eval_step(run.params, run.aux, batch)),
                           linear_losses(cfg, gaussian, batch) if images else {}))
        sums += Sums(model, linear, images)
        pairs.append(scored_pairs(batch.tokens_BT, batch.loss_mask_BT))
    return sums, [np.concatenate(x) for x in zip(*pairs)]


def mean(losses: dict, name: str) -> float:
    total, count = losses[name]
    return float(total / count)


def text_bytes(held: HeldOut, tokenizer) -> int:
    """UTF-8 bytes of a source's held-out texts, as far as they are looked at: whole records."""
    parts = (part for record in range(len(held.source.source)) for part in held.source.source.read(record))
    return sum(len(tokenizer.decode(part.values.tolist()).encode()) for part in parts if part.kind == "text")


def text_figures(name: str, row: dict, tokens: int) -> dict:
    """A source's figures: its loss, and how much less it is than the baselines'."""
    title = f"LM loss on held-out {name}"
    return {
        f"{name}_lm_loss": statistics.number(f"{title} (nats per token)", row["model"], "lower", n=tokens),
        f"{name}_bits_per_byte": statistics.number(
            f"{title} (bits per byte)", row["bits_per_byte"], "lower", n=row["bytes"]),
        f"{name}_vs_unigram": statistics.number(
            f"{title} less a unigram's (nats per token)", row["model"] - row["unigram"], "lower", -0.5,
            tokens),
        f"{name}_vs_bigram": statistics.number(
            f"{title} less an interpolated bigram's (nats per token)", row["model"] - row["bigram"], "lower",
            0.0, tokens)}


def diffusion_figures(sums: Sums) -> tuple[dict, dict]:
    """(figures over all images, {'bins': linear losses, 'model': model losses} by noise level)."""
    ours, theirs, n = sums.model, sums.linear, sums.images
    used = [name for name in BINS if ours[name][1]]  # of a few images, none may fall in a bin
    ratios = {name: mean(ours, name) / mean(theirs, name) for name in ("diffusion_loss", *used)}
    by_bin = [[mean(x, name) if name in used else None for name in BINS] for x in (theirs, ours)]
    title = "Diffusion loss / that of the best linear predictor, "
    return {
        "diffusion_loss": statistics.number(
            "Held-out diffusion loss", mean(ours, "diffusion_loss"), "lower", n=n),
        "diffusion_vs_linear": statistics.number(
            title + "all noise levels", ratios.pop("diffusion_loss"), "lower", 0.75, n),
        "diffusion_vs_linear_worst_bin": statistics.number(
            title + "worst noise level", max(ratios.values()), "lower", 0.75, n),
    }, dict(zip(("bins", "model"), by_bin))


def report(cfg: TransfusionConfig, run: Trained) -> tuple[dict, dict]:
    """(figures, {'held_out': losses by source, 'ngrams': table by source, 'linear_baseline': by noise level})
    on all held-out documents. Sources without any are named and left out (data/heldout.py).
    """
    objective, figures, total = make_objective(cfg), {}, Sums({}, {}, 0)
    eval_step, gaussian = jax.jit(make_eval_step(objective)), fit_gaussian(cfg)
    held_out, ngrams = {}, {}
    training = documents_read(cfg, kind_of(cfg).open_rows(cfg), run.step)
    for name, held in kind_of(cfg).open_heldout(cfg).items():
        sums, pairs = measure(cfg, run, held, eval_step, gaussian, name)
        total += sums
        held_out[name] = {key: mean(sums.model, key) for key in objective.weights if sums.model[key][1]}
        counts = count_ngrams(cfg, *training[name]) if len(pairs[0]) else None
        if counts:
            nats, size = float(sums.model["lm_loss"][0]), text_bytes(held, run.tokenizer)
            row = dict(zip(("unigram", "bigram"), counts.losses(*pairs)), model=held_out[name]["lm_loss"])
            ngrams[name] = row
            per_byte = {"bits_per_byte": nats / math.log(2) / max(size, 1), "bytes": size}
            held_out[name] |= per_byte
            figures |= text_figures(name, row | per_byte, len(pairs[0]))
    tables = {"held_out": held_out, "ngrams": ngrams}
    if total.images:
        more, tables["linear_baseline"] = diffusion_figures(total)
        figures |= more
    return figures, tables


def psnr(images, reconstructions) -> float:
    """dB, over uint8 pictures."""
    error = np.mean((images.astype(np.float64) - reconstructions) ** 2)
    return float(10 * np.log10(255**2 / error))
