"""Power laws through measured points, with intervals, and the Chinchilla surface L(N, D).

A power law y = a x^b is a straight line of log y over log x, by least squares. Of a loss in nats y is the
perplexity, so that its logarithm is the loss itself: `Metric.logs`.

Intervals are a bootstrap's over points and seeds: sizes are drawn with replacement, and of each its seeds. They
err on the wide side: those of 95 % hold the true slope 90 in 100 times with four sizes of one seed, and 99 with
several seeds each (synthetic points, 200 trials).
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

DRAWS = 2000
PERCENT = (2.5, 97.5)
LEAST_SIZES = 4  # with fewer, intervals of 95 % hold the truth 64 (two sizes) or 70 times in 100 (three): none


class Point(NamedTuple):
    """One run: x, what was spent; y, what was reached, already as its natural logarithm."""

    x: float
    log_y: float


class Line(NamedTuple):
    """log y = intercept + slope * (log x - centre); any of the three may be an array, over draws."""

    slope: float
    intercept: float
    centre: float = 0.0

    def log_y(self, x):
        return self.intercept + self.slope * (np.log(x) - self.centre)

    def log_x(self, log_y):
        """Where the line reaches a value: log x; infinite or NaN where it is flat."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.centre + (log_y - self.intercept) / self.slope


class Fit(NamedTuple):
    """A line, and those through the points drawn anew (a Line of arrays)."""

    line: Line
    draws: Line
    groups: list  # [(x, [log y of each seed])], by x

    @property
    def has_interval(self) -> bool:
        return len(self.groups) >= LEAST_SIZES

    @property
    def slope_interval(self) -> tuple[float, float]:
        """NaN where sizes are too few."""
        if not self.has_interval:
            return math.nan, math.nan
        low, high = np.percentile(self.draws.slope, PERCENT)
        return float(low), float(high)

    def band(self, xs) -> tuple[np.ndarray, np.ndarray]:
        """Of log y at each x."""
        every = np.stack([self.draws.log_y(x) for x in xs])
        return tuple(np.percentile(every, PERCENT, axis=1))


class TooFew(Exception):
    """A fit that the points do not allow; the message says why."""


def grouped(points: Iterable[Point]) -> list[tuple[float, list[float]]]:
    """Points of one size and budget, which differ in their seed: those of x within a thousandth."""
    found = []
    for x, log_y in sorted(points):
        if found and x <= found[-1][0] * 1.001:
            found[-1][1].append(log_y)
        else:
            found.append((x, [log_y]))
    return found


def _lines(log_x, log_y, weights) -> Line:
    """Least squares of each row: (draws, points); rows of one x alone come out NaN."""
    total = weights.sum(1, keepdims=True)
    centre = (weights * log_x).sum(1, keepdims=True) / total
    mean = (weights * log_y).sum(1, keepdims=True) / total
    dx = log_x - centre
    spread = (weights * dx**2).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.where(spread > 1e-9, (weights * dx * (log_y - mean)).sum(1) / spread, np.nan)
    return Line(slope, mean[:, 0], centre[:, 0])


def power_law(points: Sequence[Point], draws: int = DRAWS, seed: int = 0) -> Fit:
    """The line through the points, each run counting alike.

    Raises TooFew where they do not lie at two different x at least.
    """
    groups = grouped(points)
    if len(groups) < 2:
        raise TooFew(f"a line needs two sizes, here {'is one' if groups else 'are none'}")
    log_x = np.log([x for x, ys in groups for _ in ys])
    log_y = np.array([y for _, ys in groups for y in ys])
    whole = _lines(log_x[None], log_y[None], np.ones((1, len(log_x))))
    line = Line(*(float(part[0]) for part in whole))
    drawn = _lines(log_x, log_y, _weights([len(ys) for _, ys in groups], draws, seed))
    kept = np.isfinite(drawn.slope)
    return Fit(line, Line(*(part[kept] for part in drawn)), groups)


def _weights(sizes: list[int], draws: int, seed: int) -> np.ndarray:
    """How often each run is drawn, (draws, runs): groups with replacement, and of each its runs, once for every
    time that it is drawn."""
    rng = np.random.default_rng(seed)
    groups = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=draws)
    return np.concatenate([rng.multinomial(times * size, np.full(size, 1 / size))
                           for times, size in zip(groups.T, sizes)], axis=1).astype(float)


class Surface(NamedTuple):
    """L(N, D) = floor + a / N^alpha + b / D^beta (Hoffmann et al. 2022, their third approach)."""

    floor: float
    a: float
    alpha: float
    b: float
    beta: float

    def loss(self, params, tokens):
        return self.floor + self.a / np.asarray(params) ** self.alpha + self.b / np.asarray(tokens) ** self.beta


HUBER, STARTS = 1e-3, 12  # on the logarithm of the loss, as theirs
LEAST_POINTS, LEAST_EACH, MOST_TIED = 6, 3, 0.95


def loss_surface(params: Sequence[float], tokens: Sequence[float], losses: Sequence[float]) -> Surface:
    """Fits L(N, D) to losses in nats.

    Raises TooFew where sizes and budgets do not vary, or only together: its terms cannot be told apart.
    """
    n, d, loss = (np.asarray(values, float) for values in (params, tokens, losses))
    pairs = len({(round(np.log(a), 3), round(np.log(b), 3)) for a, b in zip(n, d)})
    kinds = [len({round(float(np.log(value)), 3) for value in values}) for values in (n, d)]
    if pairs < LEAST_POINTS or min(kinds) < LEAST_EACH:
        raise TooFew(f"L(N, D) needs {LEAST_POINTS} pairs of at least {LEAST_EACH} sizes and {LEAST_EACH} "
                     f"budgets; here are {pairs}, of {kinds[0]} and {kinds[1]}")
    tied = abs(np.corrcoef(np.log(n), np.log(d))[0, 1])
    if tied > MOST_TIED:
        raise TooFew("L(N, D) needs sizes and budgets that vary apart; "
                     f"here they rise together (r = {tied:.2f})")
    n0, d0 = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())  # both terms are fitted at the middle

    def terms(theta):
        floor, a, b, alpha, beta = np.exp(theta)
        return floor + a * (n / n0) ** -alpha + b * (d / d0) ** -beta

    def residual(theta):
        return np.log(terms(theta)) - np.log(loss)

    rng, low = np.random.default_rng(0), loss.min()
    starts = [np.log([low * u, low * v, low * w, s, t]) for u, v, w, s, t in zip(
        rng.uniform(0.2, 0.95, STARTS), *rng.uniform(0.02, 0.5, (2, STARTS)),
        *rng.uniform(0.1, 0.8, (2, STARTS)))]
    best = min((least_squares(residual, start, loss="huber", f_scale=HUBER, x_scale="jac", max_nfev=2000)
                for start in starts), key=lambda found: found.cost)
    floor, a, b, alpha, beta = np.exp(best.x).tolist()
    return Surface(floor, a * n0**alpha, alpha, b * d0**beta, beta)
