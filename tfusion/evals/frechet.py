"""Frechet distance of drawn pictures to real ones, on the pack's own extractor: `fd_pack`. It is no FID, and
not to be compared with one: the extractor is no Inception network but a small classifier of the scenes' sprites
and canvases, trained on scenes of the training split alone (tools/build_extractor.py), shipped with its hash.

The pictures are those that evals/scenes.py had drawn for held-out captions, the real ones those captions' own.
Floors, of the same number: the same captions rendered once more, their sprites moved by another jitter, which
is what a perfect model would get; and the real pictures through the run's codec, which is what its drawings
cannot be better than.

Shapes: B pictures, H, W; F features.
"""

import functools
import hashlib
import io
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from tfusion import inference
from tfusion.data import packs
from tfusion.data.scenes import CANVASES, NOUNS, moved, render
from tfusion.errors import UserError
from tfusion.evals import figure, scenes
from tfusion.evals.base import Evaluator, LeftOut, Options, register
from tfusion.inference.trained import Trained
from tfusion.models.codecs.base import CHUNK, in_chunks
from tfusion.models.codecs.network import to_unit

EXTRACTOR = "extractor.npz"
SHA256 = "1666015e29904e756e2eaaf68299534604d639bd89bfa1a795b27a0cda1b56b0"
FEATURES = 64
WIDTHS = (24, 48, FEATURES)
REDRAWN = 2  # seed of the jitter of the floor


class Extractor(nn.Module):
    """Pictures (B, H, W, 3) in -1..1 -> (features (B, F), logits of each noun (B, K), of each canvas (B, C)).

    Means and maxima over the picture, so that features say what there is, and roughly how it looks.
    """

    @nn.compact
    def __call__(self, x_BHWC):
        for i, width in enumerate(WIDTHS):
            x_BHWC = nn.relu(nn.Conv(width, (3, 3), (2, 2), name=f"conv_{i}")(x_BHWC))
        pooled = jnp.concatenate([x_BHWC.mean((1, 2)), x_BHWC.max((1, 2))], -1)
        features_BF = nn.Dense(FEATURES, name="features")(pooled)
        hidden = nn.relu(features_BF)
        nouns, canvases = nn.Dense(len(NOUNS), name="nouns"), nn.Dense(len(CANVASES), name="canvas")
        return features_BF, nouns(hidden), canvases(hidden)


@functools.lru_cache(maxsize=1)
def shipped() -> dict:
    """The extractor's parameters. Raises UserError where the file is another than figures are made with."""
    content = packs.pack_path(EXTRACTOR).read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise UserError(f"{EXTRACTOR} of the data pack has sha256 {found}, expected {SHA256}: reinstall "
                        "tfusion")
    with np.load(io.BytesIO(content)) as arrays:
        return unflatten_dict({name: np.float32(arrays[name]) for name in arrays.files}, sep="/")


def features(images: np.ndarray, params: dict | None = None) -> np.ndarray:
    """uint8 (n, H, W, 3) -> float64 (n, F)."""
    params = shipped() if params is None else params
    return np.float64(in_chunks(partial(_features, params), images, CHUNK))


@jax.jit
def _features(params: dict, images):
    return Extractor().apply({"params": params}, to_unit(images))[0]


def _root(matrix: np.ndarray) -> np.ndarray:
    """The square root of a symmetric positive semidefinite matrix, by its eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def distance(mean_a, cov_a, mean_b, cov_b) -> float:
    """Of two Gaussians, in float64: |m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2). Singular ones too."""
    root = _root(cov_a)
    cross = np.linalg.eigvalsh(root @ cov_b @ root)
    traces = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(np.maximum(cross, 0)).sum()
    return float(np.sum((mean_a - mean_b) ** 2) + traces)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Of the Gaussians of two sets of features, each (n, F), n >= 2; rounding may not make it negative."""
    return max(0.0, distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)))


def once_more(world, held: list) -> np.ndarray:
    """The scenes of the same captions, their sprites moved by another jitter: uint8 (n, H, W, 3)."""
    return np.stack([render(world, moved(world, scene, REDRAWN, i)) for i, scene in enumerate(held)])


def run(run: Trained, folder: Path, options: Options) -> dict:
    world, held, real = scenes.held_out(run.cfg, options.number)
    n, name = len(held), f"the pack's extractor {SHA256[:8]}"
    if n < 2:
        raise LeftOut("one picture has no spread: --number=2 or more")
    target = features(real)

    def to_real(title: str, images) -> dict:
        return figure.number(title, frechet(features(images), target), "lower", n=n)

    drawn = scenes.read_drawn(folder.parent / "scenes")
    again = inference.decoder(run).reconstruct(run, real)
    return {
        "fd_pack": to_real(f"Drawn: Frechet distance on {name}", drawn),
        "fd_pack_floor": to_real("Floor: the same of the real scenes, rendered anew", once_more(world, held)),
        "fd_pack_codec": to_real("Floor: the same of the codec's reconstructions", again)}


register(Evaluator("frechet", ("scenes", "reconstruct"), run, order=12))
