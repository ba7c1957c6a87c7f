"""What a model must beat: the best linear denoiser, and n-grams of the training tokens.

Both are scored on exactly the positions, t and noise that the model was scored on (evals/losses.py). Of a
large data set they see a sample, which is plenty for what they can learn.
"""

import itertools
from pathlib import Path

import jax
import numpy as np

from tfusion.config import RunConfig
from tfusion.data.documents import Documents
from tfusion.data.store import Split
from tfusion.diffusion.losses import NUM_BINS, diffusion_losses, draw_noise
from tfusion.diffusion.process import Process
from tfusion.evals import figure, losses
from tfusion.evals.base import (
    Evaluator,
    LeftOut,
    Options,
    open_heldout,
    register,
    scenes_source,
    section,
    sources,
    write_card,
)
from tfusion.evals.losses import NOTHING, Sums
from tfusion.inference.trained import Trained
from tfusion.objectives import kind_of
from tfusion.training.step import eval_key

LAMBDAS = np.linspace(0.05, 0.95, 19)
MAX_LATENTS = 20_000  # of each source
MAX_RECORDS = 200_000  # of each source
AT_ONCE = 1024  # records that are read together
MAX_VALUES = 4096  # of a latent: its covariance has the square of that
BINS = [f"diffusion_loss_bin{i}" for i in range(NUM_BINS)]


def stored_images(source: Split):
    """Iterator over a split's encoded images."""
    for shard, about in enumerate(source.shards):
        for first in range(0, about.records if about.images else 0, AT_ONCE):
            for parts in source.read(shard, list(range(first, min(first + AT_ONCE, about.records)))):
                yield from (part.values for part in parts if part.kind == "image")


def fit_gaussian(cfg: RunConfig):
    """(mean (D,), eigenvalues (D,), eigenvectors (D, D)) of the training latents, D = h w c; None of none, and
    where D is beyond MAX_VALUES."""
    latents, D = [], int(np.prod(kind_of(cfg).row_format(cfg).image_shape))
    if D > MAX_VALUES:
        print(f"left out: the linear predictor (latents of {D} numbers, more than {MAX_VALUES})")
        return None
    for name in sources(cfg):
        latents += itertools.islice(stored_images(Split(cfg.data.prepared, name, "train")), MAX_LATENTS)
    if not latents:
        return None
    x = np.stack(latents).reshape(-1, D).astype(np.float64)
    mean = x.mean(0)
    values, vectors = np.linalg.eigh(np.cov(x - mean, rowvar=False))
    return mean, np.maximum(values, 0), vectors


def linear_prediction(process: Process, gaussian, x_t, t):
    """The linear predictor of the diffusion target with least squared error, for data of that mean and
    covariance: of x_t = a x0 + b eps, E[x0 | x_t] = m + a S (a^2 S + b^2 I)^-1 (x_t - a m), and from it the
    target.
    """
    mean, values, vectors = gaussian
    signal, noise = (np.float64(scale)[..., None] for scale in process.scales(t))
    flat = np.asarray(x_t, np.float64).reshape(*np.shape(t), -1)
    gain = signal * values / (signal**2 * values + noise**2)
    x0 = mean + ((flat - signal * mean) @ vectors * gain) @ vectors.T
    eps = (flat - signal * x0) / noise
    x0, eps = (v.reshape(x_t.shape).astype(np.float32) for v in (x0, eps))
    return process.target(x0, eps, t)


def linear_losses(cfg: RunConfig, gaussian, batch) -> dict:
    """{name: (sum, count)} of the linear predictor, as the model's diffusion losses on held-out rows."""
    process = cfg.process.make()
    t, eps = draw_noise(process, eval_key(), batch.noise_ids_BI2, batch.max_t_BI, batch.latents_BIhwc.shape[2:])
    x_t = process.corrupt(batch.latents_BIhwc, eps, t)
    used = np.where(batch.max_t_BI > 0, t, np.float32(0.5))  # unused slots: t = 0 divides by 0
    prediction = linear_prediction(process, gaussian, x_t, used)
    target = process.target(batch.latents_BIhwc, eps, t)
    return jax.device_get(diffusion_losses(prediction, target, t, batch.max_t_BI))


def scored_pairs(tokens, mask, first_code: int):
    """(token, next token) wherever a position is scored on text, each (n,). tokens, mask: (..., T)."""
    following = np.roll(tokens, -1, axis=-1)
    mask = mask & (following < first_code)
    return tokens[mask], following[mask]


class Ngrams:
    """Unigram with add-one smoothing, and a bigram interpolated with it, of pairs (token, next token)."""

    def __init__(self, vocab_size: int, first, second):
        self.V = vocab_size
        self.keys, self.pairs = np.unique(first.astype(np.int64) * vocab_size + second, return_counts=True)
        self.first, self.second = (np.bincount(x, minlength=vocab_size) for x in (first, second))

    def losses(self, first, second) -> tuple[float, float]:
        """(unigram, bigram), mean nats per scored token. The bigram's weight is the best for these very
        tokens, which favours the baseline.
        """
        unigram = ((self.second + 1) / (self.second.sum() + self.V))[second]
        keys = first.astype(np.int64) * self.V + second
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        count = np.where(self.keys[place] == keys, self.pairs[place], 0)
        bigram = count / np.maximum(self.first, 1)[first]
        mixed = [-np.log(weight * bigram + (1 - weight) * unigram).mean() for weight in LAMBDAS]
        return float(-np.log(unigram).mean()), float(min(mixed))


def records_read(rows, number: int) -> dict:
    """{source: (its training documents, how many of its records the run was given, each counted once)}.

    rows: the training rows (data/rows.PackedRows), of which it was given the first so many.
    """
    return {source.name: (source, min(len(source), max(1, round(taken))))
            for source, taken in zip(rows.sources, rows.taken(number))}


def count_ngrams(cfg: RunConfig, source: Documents, number: int) -> Ngrams | None:
    """N-grams of `number` of a source's training records (at most MAX_RECORDS), evenly spread, captions
    first, as held-out ones are laid out; None where they hold no text. A run's order is a shuffle, so as many
    as it has read are as good as those: the bigram knows no more text than the model.
    """
    size = kind_of(cfg).row_format(cfg).vocabulary.first_code
    chosen, pairs = np.linspace(0, len(source) - 1, min(number, MAX_RECORDS)).astype(int), []
    for records in np.array_split(chosen, -(-len(chosen) // AT_ONCE)):
        cut = source.cut(records)
        examples = source.read(list(zip(records[cut.of].tolist(), cut.pieces.tolist())))
        pairs += [scored_pairs(example.tokens_L, example.loss_mask_L, size) for example in examples]
    first, second = (np.concatenate(x) for x in zip(*pairs))
    has_text = any(shard.text_tokens for shard in source.source.shards)
    return Ngrams(size, first, second) if has_text else None


def measure(cfg: RunConfig, held, gaussian, source: str) -> tuple[Sums, list]:
    """(the linear predictor's losses, (token, next token) at every scored position) of one source's held-out
    documents."""
    sums, pairs, first_code = NOTHING, [], kind_of(cfg).row_format(cfg).vocabulary.first_code
    for batch in losses.batches(held, source):
        if gaussian and (batch.max_t_BI > 0).any():
            linear = linear_losses(cfg, gaussian, batch)
            sums += Sums({name: [float(x) for x in pair] for name, pair in linear.items()}, 0)
        pairs.append(scored_pairs(batch.tokens_BT, batch.loss_mask_BT, first_code))
    return sums, [np.concatenate(x) for x in zip(*pairs)]


def text_figures(source: str, row: dict, tokens: int) -> dict:
    """How much less a source's loss is than the n-grams'. row: nats per token of model, unigram, bigram."""
    title = f"LM loss on held-out {source}"
    return {
        f"{source}_vs_unigram": figure.number(
            f"{title} less a unigram's (nats per token)", row["model"] - row["unigram"], "lower", -0.5, tokens),
        f"{source}_vs_bigram": figure.number(
            f"{title} less an interpolated bigram's (nats per token)", row["model"] - row["bigram"], "lower",
            0.0, tokens)}


def diffusion_figures(ours: Sums, theirs: Sums) -> dict:
    """The model's diffusion loss as a share of the linear predictor's, and at which noise it is worst."""
    used = [name for name in BINS if ours.mean(name) is not None]  # of a few images, none may fall in a bin
    ratios = {name: ours.mean(name) / theirs.mean(name) for name in ("diffusion_loss", *used)}
    title = "Diffusion loss / that of the best linear predictor, "
    return {
        "diffusion_vs_linear": figure.number(
            title + "all noise levels", ratios.pop("diffusion_loss"), "lower", 0.75, ours.images),
        "diffusion_vs_linear_worst_bin": figure.number(
            title + "worst noise level", max(ratios.values()), "lower", 0.75, ours.images)}


def linear_bars(ours: Sums, theirs: Sums) -> dict:
    """The block of the report: by noise level, ours beside the linear predictor's."""
    groups = []
    for i, name in enumerate(BINS):
        if ours.mean(name) is not None:
            share = ours.mean(name) / theirs.mean(name)
            groups.append({"name": f"t {i / NUM_BINS:.1f}\u2013{(i + 1) / NUM_BINS:.1f}\n\u00d7 {share:.2f}",
                           "values": [theirs.mean(name), ours.mean(name)]})
    return {"kind": "bars", "title": "Against the best linear predictor", "tone": "image",
            "names": ["best linear predictor", "model"], "groups": groups,
            "reading": "Held-out diffusion loss by noise level t, and the model's share of the linear "
                       "predictor's. Where the coloured bar is below the grey one, the model knows more than "
                       "means and covariances."}


def ngram_bars(rows: dict[str, dict]) -> dict:
    names = ["unigram", "bigram", "model"]
    return {"kind": "bars", "title": "Against n-gram models", "tone": "text", "names": names, "across": True,
            "groups": [{"name": source, "values": [row[x] for x in names]} for source, row in rows.items()],
            "reading": "Held-out LM loss on each kind of text, in nats per token; shorter is better."}


def run(run: Trained, folder: Path, options: Options) -> dict:
    """N-grams for every source with text, the linear predictor where there are images."""
    cfg, gaussian, figures, rows, linear = run.cfg, None, {}, {}, NOTHING
    sums = losses.read_sums(folder.parent / "losses")
    total = sum(sums.values(), NOTHING)
    if total.mean("diffusion_loss") is not None:
        gaussian = fit_gaussian(cfg)
    number = run.step * cfg.train.batch_size if run.next_row is None else run.next_row
    training = records_read(kind_of(cfg).open_rows(cfg), number)
    for source, held in open_heldout(cfg).items():
        more, pairs = measure(cfg, held, gaussian, source)
        linear += more
        counts = count_ngrams(cfg, *training[source]) if len(pairs[0]) else None
        if counts:
            rows[source] = dict(zip(("unigram", "bigram"), counts.losses(*pairs)),
                                model=sums[source].mean("lm_loss"))
            figures |= text_figures(source, rows[source], len(pairs[0]))
    blocks = [ngram_bars(rows)] if rows else []
    if gaussian:
        figures |= diffusion_figures(total, linear)
        blocks.append(linear_bars(total, linear))
    if not blocks:
        raise LeftOut("the held-out data have neither text nor images")
    write_card(folder, section("baselines", "What simpler models reach", *blocks))
    if not scenes_source(cfg):  # how far below is known of these, and not of any data
        figures = {name: one | {"want": None} for name, one in figures.items()}
    return figures


register(Evaluator("baselines", ("losses", "rows"), run, order=60))
