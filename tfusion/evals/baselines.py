"""What a model must beat: the best linear denoiser, and n-grams of the training tokens.

Both are scored on exactly the positions, t and noise that the model is scored on.
"""

import jax
import numpy as np

from tfusion.config import Config
from tfusion.data.prepared import PreparedSource
from tfusion.diffusion import process, schedule
from tfusion.objectives.transfusion import diffusion_losses, draw_noise
from tfusion.training.step import EVAL_STREAM, noise_key

LAMBDAS = np.linspace(0.05, 0.95, 19)
MAX_LATENTS = 20_000


def fit_gaussian(cfg: Config):
    """(mean (D,), eigenvalues (D,), eigenvectors (D, D)) of the training latents, D = h w c."""
    latents = []
    for name, share in cfg.data.mixture.items():
        source = PreparedSource(cfg.data.prepared, name, "train")
        if share > 0 and source.meta["images"]:
            latents.append(np.load(source.folder / "latents.npy", mmap_mode="r")[:MAX_LATENTS])
    x = np.concatenate(latents).reshape(-1, np.prod(cfg.model.latent_shape)).astype(np.float64)
    mean = x.mean(0)
    values, vectors = np.linalg.eigh(np.cov(x - mean, rowvar=False))
    return mean, np.maximum(values, 0), vectors


def linear_prediction(cfg: Config, gaussian, x_t, a):
    """The linear predictor of the diffusion target with least squared error, for data of that mean and
    covariance: E[x0 | x_t] = m + sqrt(a) S (a S + (1 - a) I)^-1 (x_t - sqrt(a) m), and from it the target.
    """
    mean, values, vectors = gaussian
    flat, root = np.asarray(x_t, np.float64).reshape(*a.shape, -1), np.sqrt(a)[..., None]
    gain = root * values / (a[..., None] * values + (1 - a[..., None]))
    x0 = mean + ((flat - root * mean) @ vectors * gain) @ vectors.T
    eps = (flat - root * x0) / np.sqrt(1 - a)[..., None]
    x0, eps = (v.reshape(x_t.shape).astype(np.float32) for v in (x0, eps))
    return process.target(cfg.diffusion.prediction, x0, eps, a.astype(np.float32))


def linear_losses(cfg: Config, gaussian, batch) -> dict:
    """{name: (sum, count)} of the linear predictor, as the model's diffusion losses on held-out rows."""
    key = noise_key(cfg.seed, EVAL_STREAM)
    t, eps = draw_noise(key, batch.noise_ids_BI2, batch.max_t_BI, cfg.model.latent_shape,
                        cfg.diffusion.num_timesteps)
    a = schedule.alpha_bar(t)
    x_t = process.add_noise(batch.latents_BIhwc, eps, a)
    used = np.where(batch.max_t_BI > 0, np.asarray(a, np.float64), 0.5)  # unused slots: t = 0 divides by 0
    prediction = linear_prediction(cfg, gaussian, x_t, used)
    target = process.target(cfg.diffusion.prediction, batch.latents_BIhwc, eps, a)
    return jax.device_get(diffusion_losses(prediction, target, t, batch.max_t_BI))


def scored_pairs(batch, with_images: bool):
    """(token, next token) at every scored position of documents with or without images, each (n,)."""
    B, T = batch.tokens_BT.shape
    has_image = np.zeros((B, T + 1), bool)  # by document
    row, position = np.nonzero(batch.image_ids_BT)
    has_image[row, batch.segment_ids_BT[row, position]] = True
    chosen = np.take_along_axis(has_image, batch.segment_ids_BT, axis=1) == with_images
    chosen &= batch.loss_mask_BT
    return batch.tokens_BT[chosen], np.roll(batch.tokens_BT, -1, axis=1)[chosen]


class Ngrams:
    """Unigram with add-one smoothing, and a bigram interpolated with it, of one kind of document."""

    def __init__(self, vocab_size: int, with_images: bool):
        self.pairs, self.with_images = np.zeros((vocab_size, vocab_size)), with_images

    def add(self, batch) -> None:
        np.add.at(self.pairs, scored_pairs(batch, self.with_images), 1)

    def losses(self, batches: list) -> tuple[float, float]:
        """(unigram, bigram), mean nats per scored token. The bigram's weight is the best for these very
        tokens, which favours the baseline.
        """
        a, b = (np.concatenate(x) for x in zip(*(scored_pairs(batch, self.with_images) for batch in batches)))
        counts = self.pairs.sum(0)
        unigram = ((counts + 1) / (counts.sum() + len(counts)))[b]
        bigram = self.pairs[a, b] / np.maximum(self.pairs.sum(1), 1)[a]
        mixed = [-np.log(weight * bigram + (1 - weight) * unigram).mean() for weight in LAMBDAS]
        return float(-np.log(unigram).mean()), float(min(mixed))
