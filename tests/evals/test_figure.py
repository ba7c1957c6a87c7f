"""Wilson's interval against known values, and what goes into metrics.json."""

import pytest

from tfusion.evals import figure


@pytest.mark.parametrize(("successes", "n", "low", "high"), [
    (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3, as the three below
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0000, 0.1611),
    (1, 29, 0.0061, 0.1718),
    (20, 20, 0.8389, 1.0000),
    (5, 10, 0.2366, 0.7634),
])
def test_wilson_against_known_values(successes, n, low, high):
    assert figure.wilson(successes, n) == pytest.approx((low, high), abs=6e-5)


def test_interval_stays_inside_zero_and_one_and_shrinks():
    for n in (1, 3, 10, 1000):
        low, high = figure.wilson(0, n)
        assert low == pytest.approx(0, abs=1e-12) and low >= 0 and 0 < high < 1
        low, high = figure.wilson(n, n)
        assert high == pytest.approx(1) and high <= 1 and 0 < low < 1
    widths = [high - low for low, high in (figure.wilson(n // 2, n) for n in (10, 100, 1000))]
    assert widths == sorted(widths, reverse=True)


def test_share_counts_its_hits():
    m = figure.share("t", [True, False, True, True], chance=0.25, want=0.9)
    low, high = figure.wilson(3, 4)
    assert m == {"title": "t", "value": 0.75, "n": 4, "low": low, "high": high, "chance": 0.25, "want": 0.9,
                 "better": "higher"}


def test_share_of_nothing_has_no_value():
    m = figure.share("t", [], 0.25, 0.9)
    assert m == {"title": "t", "value": None, "n": 0, "low": None, "high": None, "chance": 0.25, "want": 0.9,
                 "better": "higher"}


def test_number_has_no_interval():
    m = figure.number("t", 1.5, "lower", 2.0, n=7)
    assert m == {"title": "t", "value": 1.5, "n": 7, "low": None, "high": None, "chance": None, "want": 2.0,
                 "better": "lower"}
