"""What is kept and shown of the plans of a sweep's points."""

import json

import pytest

from tfusion.accelerators import GIB
from tfusion.errors import UserError
from tfusion.scaling import points, verdicts
from tfusion.scaling.verdicts import Verdict

POINT = points.Point("a", "x.py", {}, ["train"], {}, {}, "sweeps/x/a", "0" * 16, 1.0, None, None, None, {})


def plan(fits: bool = True, compiled: bool = True, dollars: float | None = 100.0, days: float = 0.5) -> dict:
    """What planning/plan.py gives, as far as a verdict reads it."""
    compiler = {"fits": fits, "hbm_bytes": 17 * GIB if fits else 0, "needed_bytes": 0 if fits else 120 * GIB,
                "available_bytes": 0 if fits else 95 * GIB}
    return {"fits": fits, "compiler": compiler if compiled else None, "memory": {"total": 20 * GIB},
            "accelerator": {"chips": 8, "hbm_bytes": 95.74 * GIB, "name": "v5p-16"}, "step": {"seconds": 0.9},
            "run": {"days": days, "chip_hours": 8 * 24 * days, "dollars": dollars},
            "host": {"jax": "0.10.2", "libtpu": "0.0.42.1", "python": "3"},
            "verdict": "fits: yes" if fits else "does not fit: 120.00 of 95.00 GiB (in all)",
            "suggestion": "" if fits else "would fit (untested): --config.train.num_microbatches=2"}


def test_a_verdict_says_how_it_was_reached_and_of_how_much():
    want = Verdict(8, True, True, 17 * GIB, 95.74 * GIB, 0.9, 12.0, 96.0, 100.0,
                   {"jax": "0.10.2", "libtpu": "0.0.42.1"})
    assert verdicts.verdict(plan()) == want
    assert verdicts.verdict(plan(compiled=False)) == want._replace(compiled=False, hbm_bytes=20 * GIB)
    assert verdicts.verdict(plan(fits=False)) == want._replace(
        fits=False, hbm_bytes=120 * GIB, hbm_available=95 * GIB)
    assert json.loads(json.dumps(want._asdict())) == want._asdict()


def test_points_that_train_on_a_slice_are_planned_and_keep_their_verdict():
    made = [POINT._replace(topology="v5p-16"), POINT._replace(name="here"),
            POINT._replace(name="data", topology="v5p-16", verbs=["prepare"])]
    assert [point.name for point in verdicts.to_plan(made)] == ["a"]
    made = verdicts.with_plans(made, {"a": plan()})
    assert made[0].plan == verdicts.verdict(plan())._asdict() and made[1].plan is made[2].plan is None


def test_the_table_has_a_line_a_point_and_a_sum():
    slices = {"a": "v5p-16", "long-name": "tpu7x-128", "c": "h100-8"}
    plans = {"a": plan(), "long-name": plan(dollars=None, days=2), "c": plan(fits=False, compiled=False)}
    made = [POINT._replace(name=name, topology=topology) for name, topology in slices.items()]
    made = verdicts.with_plans(made, plans)
    first, a, b, c, last = verdicts.table(made).splitlines()
    assert first.split() == ["point", "slice", "chips", "GiB", "a", "device", "how", "step", "s", "hours",
                             "dollars"]
    assert a.split() == ["a", "v5p-16", "8", "17.00", "of", "95.74", "compiled", "0.900", "12.0", "$100"]
    assert b.split()[-2:] == ["48.0", "unknown"]
    assert c.split()[3:] == ["20.00", "of", "95.74", "formula", "0.900", "12.0", "$100", "DOES", "NOT", "FIT"]
    assert len({line.index("  v5p-16" if "v5p" in line else "  slice") for line in (first, a)}) == 1
    assert last.startswith("3 points: 72 hours one after another, 48 all at once, 576 chip-hours, $200, "
                           "1 of unknown price. ESTIMATES, of training alone")


def test_what_does_not_fit_is_refused_by_name_with_what_would():
    verdicts.check_fit([POINT], {"a": plan()}, "x.py")
    plans = {"a": plan()} | {name: plan(fits=False) for name in "bcdef"}
    with pytest.raises(UserError) as e:
        verdicts.check_fit([POINT] * 6, plans, "x.py")
    assert str(e.value).startswith(
        "x.py: 5 of 6 points do not fit: 'b' on v5p-16 does not fit: 120.00 of 95.00 GiB (in all); would fit "
        "(untested): --config.train.num_microbatches=2; 'c' on ")
    assert str(e.value).endswith("; and 2 more") and "'e'" not in str(e.value) and "\n" not in str(e.value)
