"""What a plan says of a sweep's points on their slices: whether each fits, how long it takes, what it costs.

Of each point that trains and has a slice; of the training alone. The plans are planning's, as dicts.
"""

from typing import NamedTuple

from tfusion.accelerators import GIB, PRICES_AS_OF
from tfusion.errors import UserError
from tfusion.scaling.points import SHOWN, Point


class Verdict(NamedTuple):
    """What is frozen of a plan, in points.jsonl."""

    chips: int
    fits: bool
    compiled: bool  # False: by formula
    hbm_bytes: float  # that a device needs, and has
    hbm_available: float
    step_seconds: float  # estimated, as all below
    hours: float
    chip_hours: float
    dollars: float | None  # None: no price known
    versions: dict  # of jax and libtpu


def to_plan(points: list[Point]) -> list[Point]:
    """Those that a slice is planned for."""
    return [point for point in points if point.topology and "train" in point.verbs]


def verdict(plan: dict) -> Verdict:
    compiler, available = plan["compiler"], plan["accelerator"]["hbm_bytes"]
    needed = plan["memory"]["total"]
    if compiler and compiler["fits"]:
        needed = compiler["hbm_bytes"]
    elif compiler:
        needed, available = compiler["needed_bytes"], compiler["available_bytes"]
    run = plan["run"]
    return Verdict(plan["accelerator"]["chips"], plan["fits"], compiler is not None, needed, available,
                   plan["step"]["seconds"], 24 * run["days"], run["chip_hours"], run["dollars"],
                   {name: plan["host"][name] for name in ("jax", "libtpu")})


def with_plans(points: list[Point], plans: dict[str, dict]) -> list[Point]:
    """plans: {a point's name: its plan}."""
    return [point._replace(plan=verdict(plans[point.name])._asdict()) if point.name in plans else point
            for point in points]


def table(points: list[Point]) -> str:
    """A line a point that is planned, and their sum. Raises KeyError on none."""
    width = max(len(point.name) for point in points)
    slices = max(len(point.topology) for point in points)
    lines = [f"{'point':{width}}  {'slice':{slices}}  chips  {'GiB a device':>16}  {'how':8}  {'step s':>7}  "
             f"{'hours':>8}  {'dollars':>10}"]
    found = [Verdict(**point.plan) for point in points]
    for point, v in zip(points, found, strict=True):
        memory = f"{v.hbm_bytes / GIB:.2f} of {v.hbm_available / GIB:.2f}"
        lines.append(f"{point.name:{width}}  {point.topology:{slices}}  {v.chips:5d}  {memory:>16}  "
                     f"{'compiled' if v.compiled else 'formula':8}  {v.step_seconds:7.3f}  {v.hours:8,.1f}  "
                     f"{dollars(v.dollars):>10}" + ("" if v.fits else "  DOES NOT FIT"))
    known = [v.dollars for v in found if v.dollars is not None]
    unknown = len(found) - len(known)
    spent = ", ".join([f"${sum(known):,.0f}"] * bool(known) + [f"{unknown} of unknown price"] * bool(unknown))
    return "\n".join([*lines, (
        f"{len(found)} points: {sum(v.hours for v in found):,.0f} hours one after another, "
        f"{max(v.hours for v in found):,.0f} all at once, {sum(v.chip_hours for v in found):,.0f} chip-hours, "
        f"{spent}. ESTIMATES, of training alone, at list prices as of {PRICES_AS_OF}")])


def dollars(price: float | None) -> str:
    return "unknown" if price is None else f"${price:,.0f}"


def check_fit(points: list[Point], plans: dict[str, dict], where: str) -> None:
    """Raises UserError, which names the points that do not fit and what would."""
    told = [f"'{name}' on {plan['accelerator']['name']} {plan['verdict']}; {plan['suggestion']}"
            for name, plan in plans.items() if not plan["fits"]]
    if told:
        more = f"; and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
        raise UserError(f"{where}: {len(told)} of {len(points)} points do not fit: "
                        f"{'; '.join(told[:SHOWN])}{more}")
