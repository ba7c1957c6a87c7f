"""Frechet distance: of Gaussians it is the formula; of pictures, the more the worse they are."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests.evals.test_measure import run_of, with_data
from tfusion import inference
from tfusion.data.scenes import CANVASES, NOUNS
from tfusion.errors import UserError
from tfusion.evals import frechet, scenes
from tfusion.evals.base import EVALUATORS, Options
from tfusion.evals.scenes import judge_pictures
from tfusion.models.codecs.network import to_unit


def random_covariance(rng, size=6, rank=6):
    root = rng.normal(size=(rank, size))
    return root.T @ root / rank


def by_roots_of_the_product(mean_a, cov_a, mean_b, cov_b):
    """As FID is printed: tr (A + B - 2 (A B)^1/2), by the eigenvalues of A B, not symmetric."""
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex))
    return np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum().real


@pytest.mark.parametrize("rank", [6, 3], ids=["full", "fewer samples than features"])
def test_the_distance_of_gaussians(rank):
    rng = np.random.default_rng(rank)
    a, b = random_covariance(rng, rank=rank), random_covariance(rng, rank=rank)
    u, v = rng.normal(size=(2, 6))
    found = frechet.distance(u, a, v, b)
    assert found == pytest.approx(by_roots_of_the_product(u, a, v, b), rel=1e-6)
    assert found == pytest.approx(frechet.distance(v, b, u, a))
    assert frechet.distance(u, a, v, a) == pytest.approx(((u - v) ** 2).sum())  # of one covariance
    spread_a, spread_b = rng.uniform(1, 2, (2, 6))
    assert frechet.distance(u, np.diag(spread_a**2), v, np.diag(spread_b**2)) == pytest.approx(
        ((u - v) ** 2).sum() + ((spread_a - spread_b) ** 2).sum())


def test_samples_of_two_gaussians():
    """Of N(0, 1) and N(1, 4) in two dimensions: 1 + 1 each."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(20_000, 2)), 1 + 2 * rng.normal(size=(20_000, 2))
    assert frechet.frechet(a, b) == pytest.approx(4, rel=0.05) and frechet.frechet(a, a) < 1e-9
    assert frechet.frechet(a[:3], a[:3]) >= 0


@pytest.fixture(scope="module")
def pictures():
    """(world, scenes, pictures) of the tests' held-out scenes."""
    return scenes.held_out(with_data("/nowhere"), 192)


def test_worse_pictures_are_further(pictures):
    _, _, real = pictures
    rng, target = np.random.default_rng(0), frechet.features(real)
    assert target.shape == (192, frechet.FEATURES) and target.dtype == np.float64

    def away(images):
        return frechet.frechet(frechet.features(images), target)

    def noisy(sd):
        return np.clip(real + rng.normal(0, sd, real.shape), 0, 255).astype(np.uint8)

    halves = np.concatenate([real[:96], real[:96]])  # half of what there is, twice
    order = [away(real), away(noisy(10)), away(noisy(40)), away(noisy(120))]
    assert order[0] < 1e-6 and order == sorted(order) and order[2] > 5 * order[1]
    assert away(halves) > 0.01 and away(np.zeros_like(real)) > 10 * away(halves)


def test_the_extractor_sees_what_there_is(pictures):
    """Shipped weights, held-out scenes: nine times in ten exactly the sprites, and the canvas."""
    _, held, real = pictures
    apply = jax.jit(lambda x: frechet.Extractor().apply({"params": frechet.shipped()}, to_unit(x)))
    _, nouns, canvases = apply(real)
    nouns_of, colours_of = list(NOUNS), list(CANVASES)
    exact = [{nouns_of[k] for k in np.flatnonzero(row > 0)} == set(scene.nouns)
             for row, scene in zip(np.asarray(nouns), held, strict=True)]
    colours = [colours_of[k] == scene.canvas for k, scene in zip(np.argmax(canvases, -1), held)]
    assert np.mean(exact) > 0.85 and np.mean(colours) > 0.99


def test_figures_of_a_run(pictures, monkeypatch, tmp_path, prepared_root):
    """The pictures are those that the scenes' evaluator left; floors are of scenes drawn once more, and of the
    codec."""
    _, _, real = pictures
    (tmp_path / "scenes").mkdir()
    dark = (0.7 * real).astype(np.uint8)
    np.savez(tmp_path / "scenes" / scenes.PICTURES, drawn=dark)
    decoder = SimpleNamespace(reconstruct=lambda run, images: images)
    monkeypatch.setattr(inference, "decoder", lambda run: decoder)
    found = frechet.run(run_of(with_data(prepared_root)), tmp_path / "frechet", Options(number=192))
    value, floor, codec = (found[f"fd_pack{end}"] for end in ("", "_floor", "_codec"))
    assert value["value"] > 5 * floor["value"] > 0 and codec["value"] < 1e-6
    assert {x["n"] for x in found.values()} == {192} and {x["better"] for x in found.values()} == {"lower"}
    assert frechet.SHA256[:8] in value["title"]
    assert "scenes" in EVALUATORS["frechet"].needs


def test_scenes_drawn_once_more_say_the_same(pictures):
    world, held, real = (some if i == 0 else some[:48] for i, some in enumerate(pictures))
    again = frechet.once_more(world, held)
    assert all(verdict["all"] for verdict in judge_pictures(world, held, again))
    assert 0.3 < np.mean([(a != b).any() for a, b in zip(again, real)]) < 1


def test_another_extractor_is_refused(monkeypatch):
    monkeypatch.setattr(frechet, "SHA256", "0" * 64)
    frechet.shipped.cache_clear()
    with pytest.raises(UserError, match=r"extractor\.npz of the data pack has sha256 [0-9a-f]{64}, "):
        frechet.shipped()
    frechet.shipped.cache_clear()
