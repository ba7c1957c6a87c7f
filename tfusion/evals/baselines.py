"""What a model must beat: the best linear denoiser, and n-grams of the training tokens.

Both are scored on exactly the positions, t and noise that the model is scored on. Of a large data set they
see a sample, which is plenty for what they can learn.
"""

import jax
import numpy as np

from tfusion.data.config import shares
from tfusion.data.documents import Documents
from tfusion.data.prepared import PreparedSource
from tfusion.diffusion.process import Process
from tfusion.objectives.transfusion import TransfusionConfig, diffusion_losses, draw_noise
from tfusion.training.step import eval_key

LAMBDAS = np.linspace(0.05, 0.95, 19)
MAX_LATENTS = 20_000  # of each source
MAX_DOCUMENTS = 200_000  # of each source


def fit_gaussian(cfg: TransfusionConfig):
    """(mean (D,), eigenvalues (D,), eigenvectors (D, D)) of the training latents, D = h w c; None of none."""
    latents = []
    for name in shares(cfg.data.sources):
        source = PreparedSource(cfg.data.prepared, name, "train")
        if source.meta["images"]:
            latents.append(np.load(source.folder / "latents.npy", mmap_mode="r")[:MAX_LATENTS])
    if not latents:
        return None
    x = np.concatenate(latents).reshape(-1, np.prod(cfg.model.latent_shape)).astype(np.float64)
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


def linear_losses(cfg: TransfusionConfig, gaussian, batch) -> dict:
    """{name: (sum, count)} of the linear predictor, as the model's diffusion losses on held-out rows."""
    process = cfg.process.make()
    t, eps = draw_noise(process, eval_key(), batch.noise_ids_BI2, batch.max_t_BI, cfg.model.latent_shape)
    x_t = process.corrupt(batch.latents_BIhwc, eps, t)
    used = np.where(batch.max_t_BI > 0, t, np.float32(0.5))  # unused slots: t = 0 divides by 0
    prediction = linear_prediction(process, gaussian, x_t, used)
    target = process.target(batch.latents_BIhwc, eps, t)
    return jax.device_get(diffusion_losses(prediction, target, t, batch.max_t_BI))


def scored_pairs(tokens, mask):
    """(token, next token) at every scored position, each (n,). tokens, mask: (..., T)."""
    return tokens[mask], np.roll(tokens, -1, axis=-1)[mask]


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


def documents_read(cfg: TransfusionConfig, rows, step: int) -> dict:
    """{source: (its training documents, how many of them the run was given up to a step, each
    counted once)}.

    rows: the training rows (data/pipeline.PackedRows).
    """
    windows = step * cfg.train.batch_size / cfg.data.window_rows
    return {source.name: (source, min(len(source), max(1, round(windows * count))))
            for source, count in zip(rows.sources, rows.per_window)}


def count_ngrams(cfg: TransfusionConfig, source: Documents, number: int) -> Ngrams | None:
    """N-grams of `number` of a source's training documents (at most MAX_DOCUMENTS), evenly spread, captions
    first, as held-out ones are laid out; None where they hold no text. A run's order is a shuffle, so as many
    as it has read are as good as those: the bigram knows no more text than the model.
    """
    chosen = np.linspace(0, len(source) - 1, min(number, MAX_DOCUMENTS)).astype(int)
    pairs = []
    for document in zip(*(x.tolist() for x in source.locate(chosen))):
        example = source.read(*document)
        pairs.append(scored_pairs(example.tokens_L, example.loss_mask_L))
    first, second = (np.concatenate(x) for x in zip(*pairs))
    return Ngrams(cfg.vocabulary.vocab_size, first, second) if source.source.meta["tokens"] else None
