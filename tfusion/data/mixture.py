"""How many records of each source a window takes, so that the sources have their shares of the positions.

Shares may change with the row: at each row that one of them names, all are turned into numbers of records (a
knot), and from a knot to the next the numbers go in a straight line; after the last they stay. The numbers are
seldom whole: what a window leaves of a record is carried on, so that shares are exact over many windows. What
the windows before any window have taken is a closed form in integers, so that any row is found at once, and
does not depend on how long the run is.

K knots, S sources, R rows per window.
"""

import bisect
from collections.abc import Sequence

import numpy as np

PARTS = 2**16  # of a record, in which is counted


class Mixture:
    """windows: at which the knots stand, ascending from 0 (K,); of several in one window the last counts.
    records: of each source in a window there (K, S), kept in whole PARTS of one."""

    def __init__(self, windows: Sequence[int], records: Sequence[Sequence[float]]):
        self.windows, self.parts = list(windows), [[round(x * PARTS) for x in numbers] for numbers in records]

    @property
    def records(self) -> list[list[float]]:
        return [[x / PARTS for x in numbers] for numbers in self.parts]

    def before(self, window: int) -> list[int]:
        """Records of each source that the windows before it take (S,)."""
        last = bisect.bisect_right(self.windows, window) - 1
        total = [0] * len(self.parts[0])
        for knot in range(last + 1):
            stop = window if knot == last else self.windows[knot + 1]
            total = [a + b for a, b in zip(total, self._since(knot, stop - self.windows[knot]))]
        return [(x + PARTS // 2) // PARTS for x in total]

    def _since(self, knot: int, number: int) -> list[int]:
        """Parts of records of each source in so many windows from a knot on, at most up to the next."""
        following = min(knot + 1, len(self.windows) - 1)
        slopes = 2 * max(self.windows[following] - self.windows[knot], 1)
        return [n * number + (m - n) * number * (number - 1) // slopes
                for n, m in zip(self.parts[knot], self.parts[following])]

    def taken(self, window: int) -> list[range]:
        """Of each source: which places of its order a window takes (S,)."""
        return [range(start, stop) for start, stop in zip(self.before(window), self.before(window + 1))]


def knots(shares: dict[str, float | tuple]) -> list[tuple[int, list[float]]]:
    """(row, shares of all there) of each row that a share names, and of row 0."""
    tables = [share if isinstance(share, tuple) else ((0, share),) for share in shares.values()]
    rows = sorted({row for table in tables for row, _ in table})
    return [(row, [float(np.interp(row, *zip(*table))) for table in tables]) for row in rows]


def records_per_window(shares, mean_lengths, num_rows: int, seq_len: int) -> list[float]:
    """How many records of each source fill num_rows * seq_len positions in the given shares of them."""
    total = sum(shares)
    return [num_rows * seq_len * share / total / mean for share, mean in zip(shares, mean_lengths)]
