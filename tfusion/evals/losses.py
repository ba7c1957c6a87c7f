"""Held-out losses of a trained model beside those of the baselines."""

import dataclasses

import jax
import numpy as np
from tqdm import tqdm

from tfusion.config import Config
from tfusion.data import pipeline
from tfusion.evals import statistics
from tfusion.evals.baselines import Ngrams, fit_gaussian, linear_losses
from tfusion.objectives import make_objective
from tfusion.objectives.transfusion import NUM_BINS
from tfusion.training.metrics import Losses
from tfusion.training.step import make_eval_step

TEXT_BATCHES, DIFFUSION_BATCHES = 64, 128


def only(cfg: Config, source: str) -> Config:
    """The config with one source alone, captions always first: language without pictures to look at."""
    data = dataclasses.replace(cfg.data, mixture={source: 1.0}, image_first_fraction=0.0,
                               caption_dropout=0.0)
    return dataclasses.replace(cfg, data=data)


def read(cfg: Config, split: str, batches: int):
    """The first batches of a split, one after the other."""
    rows = pipeline.open_rows(cfg, make_objective(cfg), split)
    return pipeline.batches(rows, 0, batches, cfg.train.batch_size)


def model_losses(cfg: Config, params, batches: list) -> dict:
    """{name: mean} over batches, on the fixed noise of evaluations."""
    step, losses = jax.jit(make_eval_step(make_objective(cfg), cfg)), Losses()
    for batch in batches:
        losses.add(0, step(params, batch))
    return losses.means("")


def diffusion_report(cfg: Config, params) -> tuple[dict, dict]:
    """(metrics, {'bins': linear losses, 'model': model losses} by noise level) on held-out rows."""
    batches = list(read(cfg, "heldout", DIFFUSION_BATCHES))
    gaussian, linear = fit_gaussian(cfg), Losses()
    for batch in tqdm(batches, desc="linear baseline", unit="batch"):
        linear.add(0, linear_losses(cfg, gaussian, batch))
    ours, theirs = model_losses(cfg, params, batches), linear.means("")
    names = [f"diffusion_loss_bin{i}" for i in range(NUM_BINS)]
    ratios = [ours[name] / theirs[name] for name in names]
    title = "Diffusion loss / that of the best linear predictor, "
    images = int(sum((batch.max_t_BI > 0).sum() for batch in batches))
    return {
        "diffusion_loss": statistics.number(
            "Held-out diffusion loss", ours["diffusion_loss"], "lower", n=images),
        "diffusion_vs_linear": statistics.number(
            title + "all noise levels", ours["diffusion_loss"] / theirs["diffusion_loss"], "lower", 0.75,
            images),
        "diffusion_vs_linear_worst_bin": statistics.number(
            title + "worst noise level", max(ratios), "lower", 0.75, images),
    }, {"bins": [theirs[name] for name in names], "model": [ours[name] for name in names]}


def count_ngrams(cfg: Config) -> dict[str, Ngrams]:
    """{title: n-grams of the very rows trained on}: of documents with images, and of the others."""
    ngrams = {"captions": Ngrams(cfg.model.vocab_size, True), "glosses": Ngrams(cfg.model.vocab_size, False)}
    for batch in tqdm(read(cfg, "train", cfg.train.num_steps), desc="n-grams", unit="batch",
                      total=cfg.train.num_steps):
        for counts in ngrams.values():
            counts.add(batch)
    return ngrams


def text_report(cfg: Config, params) -> tuple[dict, dict]:
    """(metrics, n-gram table): language-model loss on held-out captions and glosses, nats per token."""
    table, tokens = {}, {}
    ngrams = count_ngrams(cfg)
    for title, source in (("captions", "scenes"), ("glosses", "glosses")):
        if cfg.data.mixture.get(source):
            batches = list(read(only(cfg, source), "heldout", TEXT_BATCHES))
            unigram, bigram = ngrams[title].losses(batches)
            table[title] = {"model": model_losses(cfg, params, batches)["lm_loss"], "unigram": unigram,
                            "bigram": bigram}
            tokens[title] = int(sum(b.loss_mask_BT.sum() for b in batches))
    metrics = {}
    if "captions" in table:
        row = table["captions"]
        metrics["captions_vs_bigram"] = statistics.number(
            "LM loss on held-out captions less that of a bigram (nats)", row["model"] - row["bigram"],
            "lower", 0.0, tokens["captions"])
    if "glosses" in table:
        row = table["glosses"]
        metrics["glosses_vs_unigram"] = statistics.number(
            "LM loss on held-out glosses less that of a unigram (nats)", row["model"] - row["unigram"],
            "lower", -0.5, tokens["glosses"])
    return metrics, table


def psnr(images, reconstructions) -> float:
    """dB, over uint8 pictures."""
    error = np.mean((images.astype(np.float64) - reconstructions) ** 2)
    return float(10 * np.log10(255**2 / error))
