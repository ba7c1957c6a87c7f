"""A figure as it goes into metrics.json: with its n, 95 % interval, chance level and wanted value."""

import math

Z95 = 1.959964


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927)."""
    p, z2 = successes / n, Z95**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def share(title: str, hits: list, chance: float | None = None, want: float | None = None) -> dict:
    """A proportion of hits (bools); wanted at least `want`. A chance level of NaN is none."""
    n = len(hits)
    chance = None if chance is None or math.isnan(chance) else chance
    low, high = wilson(sum(hits), n) if n else (None, None)
    return {"title": title, "value": sum(hits) / n if n else None, "n": n, "low": low, "high": high,
            "chance": chance, "want": want, "better": "higher"}


def number(title: str, value: float, better: str, want: float | None = None, n: int | None = None) -> dict:
    """Any other figure, without an interval."""
    return {"title": title, "value": value, "n": n, "low": None, "high": None, "chance": None, "want": want,
            "better": better}
