"""How much compute one recipe needs to be as good as another: the paper's parity FLOP ratio.

The line is the candidate's (Transfusion's), the value that of the baseline's (Chameleon's) largest run, as
measured: what part of its FLOPs the candidate's line needs to reach it. Below 1 the candidate is cheaper.

Intervals are a bootstrap's of the line (fits.py) and of that one value. On synthetic points those of 95 % hold
the truth 85 times in 100 with four sizes of one seed, 91 with two, 96 with three.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tfusion.scaling.fits import PERCENT, Fit, Point, TooFew, grouped, power_law


class Ratio(NamedTuple):
    """value: of FLOPs; infinite where the candidate's line does not improve with compute. low, high: 95 %,
    infinite where many draws' lines do not either, NaN where sizes are too few for an interval. beyond: the
    line is read outside of the points it goes through."""

    value: float
    low: float
    high: float
    beyond: bool
    x: float  # of the baseline's largest run
    fit: Fit


def spread(baseline: Sequence[Point]) -> np.ndarray:
    """How much one run may be off: deviations of all from their size's mean, or from the baseline's own line
    where each size has one seed; widened by what was fitted. 0 where neither says anything."""
    groups = grouped(baseline)
    found = [(y - np.mean(ys)) * np.sqrt(len(ys) / (len(ys) - 1))
             for _, ys in groups if len(ys) > 1 for y in ys]
    if not found and (n := len(groups)) > 2:
        line = power_law(baseline, draws=1).line
        found = [(ys[0] - line.log_y(x)) * np.sqrt(n / (n - 2)) for x, ys in groups]
    return np.array(found or [0.0])


def parity(candidate: Sequence[Point], baseline: Sequence[Point], better: str, seed: int = 0) -> Ratio:
    """better: 'lower' or 'higher'. Raises TooFew where the candidate has no line, or one that may as well be
    flat, or the baseline no run."""
    measured = grouped(baseline)
    if not measured:
        raise TooFew("the baseline has no run to match")
    x, target = measured[-1]  # its largest, over its seeds
    fit, sign = power_law(candidate, seed=seed), 1 if better == "higher" else -1

    low, high = fit.slope_interval
    if low <= 0 <= high:
        raise TooFew(f"its line may as well be flat: exponent {low:+.3f} to {high:+.3f}")

    def ratio(line, log_y):
        """inf where a line does not improve: no compute would be enough."""
        improves = np.asarray(line.slope) * sign > 0
        return np.where(improves, np.exp(np.clip(line.log_x(log_y) - np.log(x), -700, 700)), np.inf)

    value = float(ratio(fit.line, np.mean(target)))
    rng = np.random.default_rng([seed, 1])
    drawn = np.mean(target) + rng.choice(spread(baseline), (len(fit.draws.slope), len(target))).mean(1)
    low, high = math.nan, math.nan
    if fit.has_interval:
        low, high = np.percentile(ratio(fit.draws, drawn), PERCENT, method="nearest")
    first, last = fit.groups[0][0], fit.groups[-1][0]
    beyond = not first * 0.999 <= value * x <= last * 1.001
    return Ratio(value, float(low), float(high), beyond, x, fit)
