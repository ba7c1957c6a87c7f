"""Fits: the paper's own ratios from its own tables, known exponents inside their intervals, and refusals."""

import math

import numpy as np
import pytest

from tfusion.scaling import paper
from tfusion.scaling.fits import Point, Surface, TooFew, grouped, loss_surface, power_law
from tfusion.scaling.parity import parity

OURS = {"c4": 0.487, "wikipedia": 0.513, "accuracy": 0.598, "cider": 0.234, "fid": 0.023, "clip": 0.249}
SLOPES = {"c4": -0.172, "wikipedia": -0.189, "accuracy": 0.088, "cider": 0.384, "fid": -0.160, "clip": 0.066}


def flops(size: str) -> float:
    return 6 * paper.PARAMS[size] * paper.TOKENS


def paper_points(metric: str) -> list[Point]:
    return [Point(flops(size), math.log(getattr(scores, metric))) for size, scores in paper.SIZES.items()]


@pytest.mark.parametrize("metric", OURS)
def test_the_papers_ratios_follow_from_its_tables(metric):
    target = Point(flops("7B"), math.log(getattr(paper.CHAMELEON_7B, metric)))
    found = parity(paper_points(metric), [target], paper.BETTER[metric])
    assert found.value == pytest.approx(OURS[metric], abs=0.002)
    assert found.fit.line.slope == pytest.approx(SLOPES[metric], abs=0.0006)
    assert found.low <= found.value <= found.high
    assert found.beyond is (found.value * flops("7B") < flops("0.16B"))
    if metric not in ("fid", "clip"):  # guidance differs between the tables
        assert found.value == pytest.approx(getattr(paper.PARITY, metric), rel=0.08)


def synthetic(rng, sizes=5, seeds=3, slope=-0.2, noise=0.02):
    return [Point(x, math.log(30) + slope * math.log(x / 1e12) + rng.normal(0, noise))
            for x in np.geomspace(1e12, 3e13, sizes) for _ in range(seeds)]


def test_an_exact_law_is_found_exactly():
    fit = power_law(synthetic(np.random.default_rng(0), noise=0.0))
    assert fit.line.slope == pytest.approx(-0.2) and fit.slope_interval == pytest.approx((-0.2, -0.2))
    assert np.exp(fit.line.log_y(1e12)) == pytest.approx(30)
    assert np.exp(fit.line.log_x(math.log(30 * 10**-0.2))) == pytest.approx(1e13)
    low, high = fit.band([1e12, 1e13])
    np.testing.assert_allclose(low, high)
    np.testing.assert_allclose(low, [math.log(30), math.log(30) - 0.2 * math.log(10)])


def test_intervals_hold_the_true_exponent_about_as_often_as_they_say():
    """With 4 sizes of one seed, the least that a ladder has; of 200 it was 181."""
    inside = 0
    for seed in range(60):
        low, high = power_law(synthetic(np.random.default_rng(seed), 4, 1), draws=200).slope_interval
        inside += low <= -0.2 <= high
    assert 0.8 * 60 <= inside < 60


def test_a_ratio_of_known_laws_is_inside_its_interval():
    """The candidate needs a quarter: its law is the baseline's, four times as early."""
    rng, slope = np.random.default_rng(3), -0.2
    candidate = synthetic(rng)
    baseline = [Point(p.x, p.log_y + slope * math.log(0.25)) for p in synthetic(rng)]
    found = parity(candidate, baseline, "lower")
    assert found.low < 0.25 < found.high and 0.15 < found.value < 0.4 and not found.beyond
    assert found.high / found.low < 4


def test_the_ratio_is_of_the_largest_runs_mean_over_its_seeds():
    law = synthetic(np.random.default_rng(0), noise=0.0)
    value = {point.x: point.log_y for point in law}
    xs = sorted(value)
    baseline = [Point(xs[0], -9.0), Point(xs[-1], value[xs[2]] + 0.1), Point(xs[-1], value[xs[2]] - 0.1)]
    found = parity(law, baseline, "lower")
    assert found.value == pytest.approx(xs[2] / xs[-1]) and found.low < found.value < found.high


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_a_line_that_gets_worse_reaches_nothing(better):
    slope = 0.2 if better == "lower" else -0.2
    points = synthetic(np.random.default_rng(0), slope=slope, noise=0.0)
    found = parity(points, points, better)
    assert found.value == math.inf and found.beyond


def test_a_seed_is_no_size():
    assert [(x, len(ys)) for x, ys in grouped(synthetic(np.random.default_rng(0), 2, 3))] == [
        (pytest.approx(1e12), 3), (pytest.approx(3e13), 3)]
    with pytest.raises(TooFew, match="two sizes, here is one"):
        power_law([Point(1e12, 1.0), Point(1e12, 1.1)])
    with pytest.raises(TooFew, match="here are none"):
        power_law([])
    with pytest.raises(TooFew, match="no run to match"):
        parity(synthetic(np.random.default_rng(0)), [], "lower")


def test_few_sizes_have_no_interval():
    rng = np.random.default_rng(0)
    three, four = (synthetic(rng, sizes=n) for n in (3, 4))
    assert np.isfinite(power_law(four).slope_interval).all()
    assert np.isnan(power_law(three).slope_interval).all()
    found = parity(three, three, "lower")
    assert found.value == pytest.approx(1, rel=0.3) and np.isnan([found.low, found.high]).all()


def test_a_line_that_may_as_well_be_flat_is_no_ratio():
    flat = [Point(x, math.log(y)) for x, y in zip(np.geomspace(1e12, 1e14, 5), (3.0, 3.1, 2.9, 3.1, 2.95))]
    with pytest.raises(TooFew, match=r"may as well be flat: exponent -0\.\d+ to \+0\.\d+"):
        parity(flat, flat, "lower")


TRUE = Surface(1.69, 406.4, 0.34, 410.7, 0.28)  # Hoffmann et al.


def test_a_known_surface_is_found_again():
    sizes, budgets = np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 4))
    n, d = sizes.ravel(), budgets.ravel()
    noisy = TRUE.loss(n, d) * np.exp(np.random.default_rng(0).normal(0, 5e-4, n.size))
    found = loss_surface(n, d, noisy)
    assert (found.alpha, found.beta) == pytest.approx((TRUE.alpha, TRUE.beta), abs=0.02)
    assert found.floor == pytest.approx(TRUE.floor, abs=0.1)
    np.testing.assert_allclose(found.loss(n, d), TRUE.loss(n, d), rtol=2e-3)


@pytest.mark.parametrize(("n", "d", "why"), [
    ([1, 2, 4, 8], [1, 2, 4, 8], "here are 4, of 4 and 4"), ([1, 2, 4, 8, 16, 32], [5] * 6, "of 6 and 1"),
    ([1, 2, 4, 8, 16, 32], [3, 6, 13, 24, 50, 96], "rise together")])
def test_what_cannot_tell_size_from_budget_is_refused(n, d, why):
    with pytest.raises(TooFew, match=why):
        loss_surface(n, d, np.linspace(3, 2, len(n)))


def test_the_papers_outliers():
    assert [paper.OUTLIERS["fid"](x) for x in (99, 101)] == [False, True]
    assert [paper.OUTLIERS["clip"](x) for x in (16.9, 17)] == [True, False]
    assert [paper.OUTLIERS["cider"](x) for x in (3.9, 4)] == [True, False]
    scores = [paper.TRANSFUSION_7B, *paper.SIZES.values(), *paper.PATCHES.values(), *paper.ATTENTION.values()]
    assert not any(rule(getattr(s, name)) for s in scores for name, rule in paper.OUTLIERS.items())
