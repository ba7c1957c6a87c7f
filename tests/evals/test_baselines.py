"""The baselines: the linear denoiser against the analytic least error of a Gaussian, n-grams against counts."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest

from tests.golden import write_split
from tfusion.data import packing
from tfusion.data.documents import Documents
from tfusion.data.store import Split
from tfusion.diffusion.losses import NUM_BINS, draw_noise
from tfusion.diffusion.process import ddpm
from tfusion.diffusion.schedule import alpha_bar
from tfusion.evals import baselines
from tfusion.objectives import kind_of
from tfusion.training.step import eval_key
from tfusion.types import BOS, EOS, Batch

SHAPE, D = (2, 2, 2), 8
VALUES = np.array([0.01, 0.05, 0.2, 0.5, 1.0, 1.5, 2.0, 4.0])
N = 20_000


def known_gaussian():
    rng = np.random.default_rng(0)
    vectors = np.linalg.qr(rng.normal(size=(D, D)))[0]
    return rng.normal(size=D), VALUES, vectors


def draw(gaussian, n, seed):
    mean, values, vectors = gaussian
    z = np.random.default_rng(seed).normal(size=(n, D))
    return (mean + z * np.sqrt(values) @ vectors.T).reshape(n, *SHAPE).astype(np.float32)


def least_error(prediction, a):
    """Least mean squared error per element of any predictor of the target from x_t, a of any shape.

    Along an eigenvector, x0 given x_t has variance l (1 - a) / (a l + 1 - a); eps is off by sqrt(a / (1 - a))
    as much as x0, and v by 1 / sqrt(1 - a).
    """
    a = np.asarray(a, np.float64)[..., None]
    variance = VALUES * (1 - a) / (a * VALUES + 1 - a)
    return (variance * {"eps": a / (1 - a), "v": 1 / (1 - a), "x0": 1.0}[prediction]).mean(-1)


def with_prediction(cfg, prediction):
    adapter = dataclasses.replace(cfg.model.adapter, latent_size=2, latent_channels=2)
    return dataclasses.replace(
        cfg, process=dataclasses.replace(cfg.process, prediction=prediction),
        model=dataclasses.replace(cfg.model, adapter=adapter))


def noisy(gaussian, prediction, t, n=N):
    """(x_t, target, the linear predictor's) of n samples at one noise level."""
    x0, eps = draw(gaussian, n, 1), np.random.default_rng(2).normal(size=(n, *SHAPE)).astype(np.float32)
    process, t = ddpm(prediction, 1000), np.full(n, t, np.float32)
    x_t = np.asarray(process.corrupt(x0, eps, t))
    out = baselines.linear_prediction(process, gaussian, x_t, t)
    return x_t, np.asarray(process.target(x0, eps, t)), np.asarray(out)


def error(prediction, target):
    return float(np.mean((np.asarray(prediction, np.float64) - target) ** 2))


@pytest.mark.parametrize("t", [0.05, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_linear_predictor_reaches_the_least_error(prediction, t):
    _, target, out = noisy(known_gaussian(), prediction, t)
    assert error(out, target) == pytest.approx(least_error(prediction, alpha_bar(t)), rel=0.02)


@pytest.mark.parametrize("t", [0.2, 0.7])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_no_other_linear_map_beats_it(prediction, t):
    rng = np.random.default_rng(3)
    x_t, target, out = noisy(known_gaussian(), prediction, t)
    best, flat = error(out, target), (x_t - x_t.mean(0)).reshape(N, D)
    for _ in range(20):
        change = flat @ rng.normal(size=(D, D)) / D + rng.normal(size=D) / D
        for size in (-0.2, 0.2):
            assert error(out + size * change.reshape(out.shape), target) > best
    for size in (-0.2, 0.2):
        assert error(out + size, target) > best and error(out * (1 + size), target) > best


def test_at_the_noisiest_it_is_the_trivial_predictor():
    """Nothing of x0 is left: v = -x0 is the data's mean, and eps is x_t."""
    gaussian = known_gaussian()
    _, target, out = noisy(gaussian, "v", 1.0)
    assert error(out, target) == pytest.approx(error(-gaussian[0].reshape(SHAPE), target), rel=2e-3)
    x_t, _, out = noisy(gaussian, "eps", 1.0)
    assert error(out, x_t) < 1e-3


@pytest.fixture(scope="module")
def gaussian_root(tmp_path_factory):
    """A prepared data set whose latents are drawn from the known Gaussian; captions alone beside it."""
    root = tmp_path_factory.mktemp("gaussian")
    image = np.zeros((1, 1, 3), np.uint8)
    latents = iter(draw(known_gaussian(), N, 4))
    write_split(root, "scenes", "train", [["a", image]] * N, lambda texts: [[5]],
                lambda images: next(latents)[None], shards=3)
    write_split(root, "glosses", "train", [["a"]] * 3, lambda texts: [[5]], None)
    return root


def gaussian_config(cfg, prediction, root):
    return with_sources(with_prediction(cfg, prediction), root, scenes=0.5, glosses=0.5)


def with_sources(cfg, root, **shares_):
    """Glosses' specs under any name: the prepared data are what is read."""
    spec = cfg.data.sources["glosses"]
    specs = {name: dataclasses.replace(spec, share=share) for name, share in shares_.items()}
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, prepared=str(root), sources=specs))


def test_fit_finds_the_gaussian(cfg, gaussian_root):
    mean, values, vectors = baselines.fit_gaussian(gaussian_config(cfg, "v", gaussian_root))
    true_mean, true_values, true_vectors = known_gaussian()
    np.testing.assert_allclose(mean, true_mean, atol=0.06)
    np.testing.assert_allclose(np.sort(values), true_values, rtol=0.05)
    covariance = true_vectors * true_values @ true_vectors.T
    np.testing.assert_allclose(vectors * values @ vectors.T, covariance, atol=0.1)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_losses_on_held_out_rows(cfg, gaussian_root, prediction):
    """Everything together: fitted, on the evaluation's own noise, by noise level, unused slots left out."""
    cfg, rows = gaussian_config(cfg, prediction, gaussian_root), 6000
    latents = draw(known_gaussian(), rows * 2, 5).reshape(rows, 2, *SHAPE)
    max_t = np.ones((rows, 2), np.float32)
    max_t[::3, 1], latents[::3, 1] = 0, 1e3  # unused slots: whatever lies there must not count
    zeros = np.zeros((rows, 1), np.int32)
    batch = Batch(np.arange(rows, dtype=np.int32), zeros, zeros, zeros, zeros, zeros == 1, latents,
                  np.zeros((rows, 2), np.int32), max_t, packing.noise_ids(np.arange(rows), 2))
    losses = baselines.linear_losses(cfg, baselines.fit_gaussian(cfg), batch)
    t, _ = draw_noise(ddpm(prediction, cfg.process.num_timesteps), eval_key(), batch.noise_ids_BI2, max_t,
                      SHAPE)
    used = np.asarray(t)[max_t > 0]
    want = least_error(prediction, alpha_bar(used))
    total, count = losses["diffusion_loss"]
    assert count == len(used) * D
    assert total / count == pytest.approx(want.mean(), rel=0.02)
    for i in range(NUM_BINS):
        here = (used > i / NUM_BINS) & (used <= (i + 1) / NUM_BINS)
        total, count = losses[f"diffusion_loss_bin{i}"]
        assert count == pytest.approx(here.sum() * D, abs=2 * D)  # t on a bin's edge, in float32
        assert total / count == pytest.approx(want[here].mean(), rel=0.05)


def test_fit_needs_no_source_without_a_share(cfg, gaussian_root):
    """`prepare` never wrote it; and of text alone there is nothing to fit."""
    cfg = gaussian_config(cfg, "v", gaussian_root)
    never = with_sources(cfg, gaussian_root, scenes=1.0, never=0.0)
    for got, want in zip(baselines.fit_gaussian(never), baselines.fit_gaussian(cfg)):
        np.testing.assert_array_equal(got, want)
    words = with_sources(cfg, gaussian_root, glosses=1.0, scenes=0.0)
    assert baselines.fit_gaussian(words) is None


def text(*rows):
    """(token, next token) at scored positions of rows (tokens, mask)."""
    pairs = [baselines.scored_pairs(np.array([t], np.int32), np.array([m], bool), 262) for t, m in rows]
    return tuple(np.concatenate(x) for x in zip(*pairs))


def trained():
    """Scored pairs of a vocabulary of 4: 0 -> 1 twice, 1 -> 2, 2 -> 1; the others are not scored."""
    return baselines.Ngrams(4, *text(([0, 1, 2, 1, 3, 3], [1, 1, 1, 0, 0, 0]), ([0, 1, 3, 0], [1, 0, 0, 0])))


UNIGRAM = (1 / 8, 4 / 8, 2 / 8, 1 / 8)  # add one to (0, 3, 1, 0)


def test_only_scored_pairs_are_counted():
    ngrams = trained()
    assert dict(zip(ngrams.keys.tolist(), ngrams.pairs.tolist())) == {1: 2, 6: 1, 9: 1}  # 4 first + second
    assert ngrams.first.tolist() == [2, 1, 1, 0] and ngrams.second.tolist() == [0, 3, 1, 0]


def test_codes_are_no_text():
    """Of a row with two codes, 5 and 6: what follows them counts, they do not."""
    pairs = baselines.scored_pairs(np.array([[1, 5, 6, 2, 3]]), np.array([[1, 1, 1, 1, 0]], bool), 5)
    assert [x.tolist() for x in pairs] == [[6, 2], [2, 3]]


def test_ngram_losses_by_hand():
    # Scored: 0 -> 1 and 1 -> 2, both certain to a bigram, whose best weight is then the largest.
    unigram, bigram = trained().losses(*text(([0, 1, 2, 3], [1, 1, 0, 0])))
    assert unigram == pytest.approx(-(math.log(UNIGRAM[1]) + math.log(UNIGRAM[2])) / 2)
    assert bigram == pytest.approx(-(math.log(0.95 + 0.05 / 2) + math.log(0.95 + 0.05 / 4)) / 2)
    # Scored: 0 -> 2 and, after a token never seen, 3 -> 1: a bigram is no help, its least weight is best.
    unigram, bigram = trained().losses(*text(([0, 2, 3, 1], [1, 0, 1, 0])))
    assert unigram == pytest.approx(-(math.log(1 / 4) + math.log(1 / 2)) / 2)
    assert bigram == pytest.approx(-(math.log(0.95 / 4) + math.log(0.95 / 2)) / 2)
    # p(1 | 0) = w + (1 - w) / 2 thrice, p(3 | 0) = (1 - w) / 8: least at w = 0.5. And a pair past all keys.
    rows = ([0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 1, 0]), ([0, 3, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0])
    unigram, bigram = trained().losses(*text(*rows))
    assert unigram == pytest.approx(-(3 * math.log(1 / 2) + math.log(1 / 8)) / 4)
    assert bigram == pytest.approx(-(3 * math.log(0.75) + math.log(0.5 / 8)) / 4)
    assert trained().losses(*text(([3, 3], [1, 0])))[0] == pytest.approx(-math.log(1 / 8))


def test_a_large_vocabulary_costs_what_was_seen():
    """Of 10^6 tokens a table of pairs would hold 8 TB."""
    V = 1_000_000
    ngrams = baselines.Ngrams(V, np.array([V - 1, 0], np.int32), np.array([V - 2, V - 1], np.int32))
    _, bigram = ngrams.losses(np.array([V - 1], np.int32), np.array([V - 2], np.int32))
    assert bigram == pytest.approx(-math.log(0.95), abs=1e-5) and len(ngrams.keys) == 2


def test_a_source_is_counted_document_by_document(cfg, monkeypatch):
    """Each once; BOI is predicted, what follows EOI too, and nothing by BOI or patches."""
    documents = Documents(cfg.rows, "stories", "train")
    source = Split(cfg.data.prepared, "stories", "train")
    want = Counter()
    for parts in source.read(0, list(range(len(source)))):
        ids = [BOS]
        for part in parts:
            ids += part.values.tolist() if part.kind == "text" else [cfg.vocabulary.boi, cfg.vocabulary.eoi]
        want.update((a, b) for a, b in zip(ids, [*ids[1:], EOS]) if a != cfg.vocabulary.boi)
    ngrams = baselines.count_ngrams(cfg, documents, len(source))
    V = cfg.vocabulary.vocab_size
    assert {divmod(key, V): n for key, n in zip(ngrams.keys.tolist(), ngrams.pairs.tolist())} == want
    half = baselines.count_ngrams(cfg, documents, len(source) // 2)
    assert 0.4 < half.pairs.sum() / want.total() < 0.6
    monkeypatch.setattr(baselines, "MAX_RECORDS", len(source) // 2)
    np.testing.assert_array_equal(baselines.count_ngrams(cfg, documents, len(source)).keys, half.keys)


def test_the_bigram_has_read_no_more_than_the_model(cfg):
    """As many documents as the run's rows hold, up to all there are."""
    rows = kind_of(cfg).open_rows(cfg)

    def read(steps):
        found = baselines.records_read(rows, steps * cfg.train.batch_size)
        return {name: number for name, (_, number) in found.items()}

    window = cfg.data.window_rows // cfg.train.batch_size
    assert list(read(window).values()) == [
        min(len(n), len(s)) for n, s in zip(rows.mixture.taken(0), rows.sources)]
    assert read(10**6) == {source.name: len(source) for source in rows.sources}
    assert all(1 <= read(1)[name] <= n / 2 for name, n in read(window).items())
