"""Shares, constant or by schedule: what windows take is what the knots say, added up."""

import dataclasses
import itertools

import numpy as np
import pytest

from experiments import quickstart
from tests.conftest import replace, with_shares
from tests.data.test_documents import spec, write
from tests.data.test_rows import assert_same, open_rows
from tfusion import config
from tfusion.data import mixture
from tfusion.data.mixture import Mixture
from tfusion.data.rows import PackedRows
from tfusion.errors import UserError


def test_records_per_window_gives_the_shares():
    counts = mixture.records_per_window([3, 1], [30.0, 10.0], 100, 400)
    assert counts == [1000, 1000]  # 30,000 and 10,000 positions of 40,000
    assert mixture.records_per_window([0.6, 0.2], [30.0, 10.0], 100, 400) == counts  # shares are relative


@pytest.mark.parametrize("windows, records", [
    ([0], [[7, 3]]), ([0, 5], [[10, 0], [0, 10]]), ([0, 4, 5, 11], [[3, 1], [8, 1], [8, 7], [0, 2]]),
    ([0, 6, 6, 9], [[5, 5], [5, 5], [1, 9], [0, 0]])])
def test_what_windows_take_is_added_up(windows, records):
    """Every place once; in each window the straight line's number, whole; on the whole not one too many."""
    made, line = Mixture(windows, records), []
    for window in range(20):
        last = max(k for k, start in enumerate(windows) if start <= window)
        following = min(last + 1, len(windows) - 1)
        part = (window - windows[last]) / max(windows[following] - windows[last], 1)
        line.append((1 - part) * np.array(records[last]) + part * np.array(records[following]))
        for source, places in enumerate(made.taken(window)):
            assert abs(len(places) - line[window][source]) < 1
            assert places.start == made.before(window)[source]
        assert made.before(window + 1) == [places.stop for places in made.taken(window)]
        assert (np.abs(np.array(made.before(window + 1)) - np.sum(line, 0)) < len(windows)).all()


def test_fractions_of_a_record_are_carried_on():
    """Of .1 of 1024 positions by records of 64, 1.6 a window: 2, 1, 2, 1, 2; over a thousand windows 1600."""
    made = Mixture([0], [mixture.records_per_window([1, 9], [64, 64], 4, 256)])
    assert [len(made.taken(window)[0]) for window in range(5)] == [2, 1, 2, 1, 2]
    assert made.before(1000) == [1600, 14_400]


def test_places_filled_are_the_shares(cfg, tmp_path):
    """A share of 2.4 records a window, three to a row: exact over many windows, by what stands in rows."""
    cfg = write(tmp_path, cfg, few=[["x" * 62]] * 30, many=[["y" * 62]] * 100)
    rows = PackedRows(replace(cfg, "data", window_rows=8, sources={
        "few": spec(0.1), "many": spec(0.9)}).rows, 0)
    placed = np.array([source for window in range(100) for row in rows.plan(window).rows for source, *_ in row])
    assert len(placed) > 0.99 * 100 * 8 * 3 and abs((placed == 0).mean() - 0.1) < 0.002


def test_a_window_may_be_offered_nothing(cfg, tmp_path):
    """Texts of one and a half windows: some have none of their own, and what was left before."""
    cfg = write(tmp_path, cfg, long=[["x" * 600]] * 9)
    rows = PackedRows(replace(cfg, "data", window_rows=2).rows, 0)
    offered = [len(rows.offered(window).records) for window in range(8)]
    assert 0 in offered and max(offered) > 0
    assert all(rows.plan(window).num_positions <= 2 * 192 for window in range(8))
    assert all(np.isfinite(x) for row in range(16) for x in rows.stats(row).values())


def test_the_millionth_window_costs_nothing():
    made = Mixture([0, 10**8], [[10**6, 0], [0, 10**6]])
    assert made.before(10**8)[0] + made.before(10**8)[1] == 10**14
    assert made.taken(10**8 + 5)[0] == range(made.before(10**8)[0], made.before(10**8)[0])


def offered_shares(rows, windows) -> np.ndarray:
    """Of all positions on offer in some windows, each source's."""
    total = np.zeros(len(rows.sources))
    for window in windows:
        offered = rows.offered(window)
        total += np.bincount(offered.sources, offered.lengths, len(total))
    return total / total.sum()


def wide(cfg, **shares):
    return replace(with_shares(cfg, **shares), "data", image_share=0.8, window_rows=512)


def test_shares_follow_the_schedule(cfg):
    """Over any four windows within 0.5 % of the straight line, by what records are long on average."""
    R = 512
    down = ((0, 0.8), (4 * R, 0.8), (12 * R, 0.2))
    rows = open_rows(wide(cfg, glosses=down, scenes=tuple((row, 1 - x) for row, x in down)))
    means = np.array([source.means(cfg.data.caption_dropout)[0] for source in rows.sources])
    for first in range(0, 20, 4):
        taken = np.sum([[len(x) for x in rows.mixture.taken(w)] for w in range(first, first + 4)], 0) * means
        want = np.mean([np.interp(w * R, *zip(*down)) for w in range(first, first + 4)])
        assert abs(taken[0] / taken.sum() - want) < 0.005
        assert abs(offered_shares(rows, range(first, first + 4))[0] - want) < 0.03  # records differ
    assert rows.stats(20 * R - 1)["data/epochs/glosses"] == pytest.approx(
        rows.mixture.before(20)[0] / len(rows.sources[0]))


def test_a_constant_schedule_is_the_plain_share(cfg):
    plain = open_rows(cfg)
    for share in (((0, 0.12),), ((0, 0.12), (40, 0.12), (2000, 0.12))):
        other = open_rows(replace(cfg, "data", sources=cfg.data.sources | {
            "glosses": dataclasses.replace(cfg.data.sources["glosses"], share=share)}))
        for row in (0, 31, 33, 500, 5000):
            assert_same(plain[row], other[row])


def test_a_source_may_come_and_go(cfg):
    """None of its records where it has no share, each of them once an epoch where it has; rows stay full."""
    shares = dict(glosses=((0, 1.0), (320, 0.0)), scenes=((0, 0.0), (320, 1.0)))
    rows = open_rows(replace(with_shares(cfg, **shares), "data", image_share=0.2))
    present = [np.bincount(rows.offered(window).sources, minlength=2) > 0 for window in range(13)]
    assert present[0].tolist() == [True, False] and present[5].all() and present[10].tolist() == [False, True]
    named = [x for window in range(13) for x in rows.offered(window).named(slice(None))]
    assert len({*named}) == len(named)
    for row in (0, 33, 320, 352):
        assert (rows[row].segment_ids_BT > 0).mean() > 0.5
        assert all(np.isfinite(x) for x in rows.stats(row).values())


def test_a_share_does_not_change_before_its_row(cfg):
    """A window goes by its first row; two rows side by side are a leap."""
    shares = dict(glosses=((0, 1.0), (40, 1.0), (41, 0.0)), scenes=((0, 0.0), (40, 0.0), (41, 1.0)))
    rows = open_rows(replace(with_shares(cfg, **shares), "data", image_share=0.2))
    assert [{*rows.offered(window).sources.tolist()} for window in range(4)] == [{0}, {0}, {1}, {1}]


def test_rows_do_not_depend_on_how_long_the_run_is(cfg):
    """A run that goes on longer has the rows it had, whoever asks for them first."""
    cfg = wide(cfg, glosses=((0, 0.8), (2048, 0.1)), scenes=0.5)
    one, longer = open_rows(cfg), open_rows(replace(cfg, "train", num_steps=10**6))
    longer[10**6]
    for row in (0, 600, 1500, 5000):
        assert_same(one[row], longer[row])
    assert one.identity == longer.identity


def test_slots_are_for_the_largest_share_of_images(cfg):
    with pytest.raises(UserError, match="raise it to"):
        open_rows(replace(with_shares(cfg, glosses=((0, 1.0), (9999, 0.0)), scenes=1.0), "data",
                          image_share=0.1))


def test_the_schedule_decides_the_order(cfg):
    """And stands in the identity that is compared at resume."""
    found = [open_rows(wide(cfg, glosses=share, scenes=0.5)).identity["order"] for share in (
        0.5, ((0, 0.5), (2048, 0.1)), ((0, 0.5), (2048, 0.2)), ((0, 0.5), (4096, 0.1)))]
    assert all(a != b for a, b in itertools.combinations(found, 2))


@pytest.mark.parametrize("share, told", [
    ([], "a number is wanted, or"), ([(0, 1), (9,)], "a number is wanted, or"), ([3, 4], "a number is wanted"),
    ([(5, 1.0)], "a number is wanted, or"), ([(0, 1), (9, 1), (9, 2)], "whole rows in ascending order from 0"),
    ([(0, 1.0), (2.5, 1.0)], "whole rows"), ([(0, 1), (2**31, 1)], "whole rows"), ([(0, 1), (1.0, 1)], "whole"),
    ([(0, -1.0)], " at row 0 = -1.0 must be 0 or more"), ([(0, "x")], "at row 0' must be float, got 'x'"),
    ([(0, 1), (3, [(0, 1)])], "at row 3' must be float")])
def test_schedules_that_cannot_be(share, told):
    tree = quickstart.get_config().to_dict()
    tree["data"]["sources"]["scenes"]["share"] = share
    with pytest.raises(UserError, match=rf"^(config key ')?data\.sources\.scenes\.share.*{told}") as e:
        config.from_dict(tree)
    assert "\n" not in str(e.value)


def test_some_source_has_a_share_at_any_row():
    tree = quickstart.get_config().to_dict()
    tree["data"]["sources"] = {"scenes": tree["data"]["sources"]["scenes"] | {
        "share": [[0, 1.0], [50, 0.0], [60, 1.0]]}}
    with pytest.raises(UserError, match=r"^data\.sources: at row 50 no source has a positive share$"):
        config.from_dict(tree)
