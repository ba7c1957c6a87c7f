"""A sweep read and fitted: its finished runs, what each metric's line is per recipe, and the parity ratios.

All that a page needs stands in `Study`, as plain values; reporting/scaling_page.py draws it.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from tfusion.errors import UserError
from tfusion.scaling import paper, results
from tfusion.scaling.fits import Fit, Point, Surface, TooFew, loss_surface, power_law
from tfusion.scaling.parity import Ratio, parity

NEEDED = ("name", "workdir", "config_hash", "params", "tokens")
CANDIDATE, BASELINE = "transfusion", "chameleon"  # whose line, and whose largest run it has to match
AXES = {"six_nd": "6ND", "flops": "exact FLOPs"}
LADDER = "ladder"  # of a point's tags: `part`; others vary one thing at few sizes
NATS = "_lm_loss"  # held-out losses per token: their perplexity is what is fitted
MOST_NATS = 100.0  # a run that diverged has no perplexity to be drawn
METRICS = {  # beside those: name in metrics.json -> (short title, {floor or ceiling: name of its figure})
    "diffusion_loss": ("Diffusion loss", {}),
    "token_loss": ("Loss per text token or code", {}),
    "code_loss": ("Loss per code", {}),
    "cider": ("CIDEr", {}),
    "fd_pack": ("Fréchet distance (fd_pack)", {"real against real": "fd_pack_floor", "codec": "fd_pack_codec"}),
    "generation_all": ("Drawn: all right", {}),
    "caption_all": ("Told: all right", {}),
    "caption_exact": ("Told: word for word", {}),
    "fid": ("FID", {}), "clip": ("CLIP score", {})}


class Run(NamedTuple):
    """A finished run; process: of images, 'v', 'eps', 'flow', or '' where it has none."""

    name: str
    folder: Path
    recipe: str
    size: str
    part: str
    seed: int
    learning_rate: float
    process: str
    params: float
    tokens: float
    six_nd: float
    flops: float
    images: float
    figures: dict[str, dict]
    drops: dict[str, float]  # {source: share of its documents that no row held}
    same: dict[str, Any]  # what all runs of a fit must have in common
    rows: dict[str, str]  # {table of the paper: its row that this run is}


class Metric(NamedTuple):
    name: str
    title: str
    better: str
    nats: bool

    def shown(self, figure: dict) -> float | None:
        """The number on the axis: perplexity of a loss per token, else the figure as it is."""
        value = figure["value"]
        if value is None or not math.isfinite(value) or (self.nats and value > MOST_NATS):
            return None
        return math.exp(value) if self.nats else value


class Panel(NamedTuple):
    """One metric over compute. fits, ratios: {axis: ...}, of a reason (str) where there is none."""

    metric: Metric
    values: dict[str, list[tuple[Run, float]]]  # {recipe: its fitted runs, each with its value}
    dropped: list[tuple[str, str]]  # (run, why)
    floors: dict[str, float]
    fits: dict[str, dict[str, Fit | str]]  # {axis: {recipe: ...}}
    ratios: dict[str, Ratio | str]


class Table(NamedTuple):
    """A table of the paper that some run is a row of; in a row the paper's figures, and the runs of ours."""

    title: str
    columns: list[str]  # of the paper's figures
    metrics: list[Metric]  # of ours
    rows: list[tuple[str, list[float | None], list[Run]]]


class Study(NamedTuple):
    name: str
    planned: int
    runs: list[Run]
    missing: dict[str, str]  # {point: why}
    panels: list[Panel]
    surfaces: dict[str, Surface | str]  # {recipe: L(N, D)}
    outliers: str
    axes: dict[str, str]  # {attribute of a run: what it is called}
    recipes: tuple[str, str]  # the candidate, and the baseline
    compared: bool  # whether the ladder has points of both, finished or not
    paper: dict[str, tuple]  # its table 3: {metric: (title, candidate, baseline, ratio)}
    tables: list[Table]

    def ladder(self) -> list[Run]:
        return [run for run in self.runs if run.part == LADDER]

    def largest(self, recipe: str) -> list[Run]:
        """The runs of its largest size, one for each seed."""
        some = [run for run in self.ladder() if run.recipe == recipe]
        return [run for run in some if run.six_nd == max(other.six_nd for other in some)]

    def largest_size(self, recipe: str) -> str:
        """Its name, as the points' tags have it; '' where the recipe has no run."""
        return next((run.size for run in self.largest(recipe)), "no run")


def read_points(sweep: Path) -> list[dict]:
    """The frozen points of a sweep that are evaluated. Raises UserError where there are none."""
    # Others make a codec, or data, or have no transformer to be compared.
    points = [point for point in read_all(sweep) if "evaluate" in verbs_of(point) and point["params"]]
    if not points:
        raise UserError(f"{sweep / results.POINTS} holds no points that are evaluated")
    return points


def verbs_of(point: dict) -> list[str]:
    return point.get("verbs", ["train", "evaluate"])


def read_all(sweep: Path) -> list[dict]:
    """The lines of points.jsonl. Raises UserError where it is absent, or one lacks what is read here."""
    path = sweep / results.POINTS
    try:
        lines = path.read_text().splitlines()
    except OSError as e:
        raise UserError(f"there is no sweep at {sweep}: {path} cannot be read; `python -m tfusion.sweep` "
                        "writes it") from e
    points = []
    for number, line in enumerate(filter(str.strip, lines), start=1):
        try:
            point = json.loads(line)
            missing = [key for key in NEEDED if key not in point]
        except (ValueError, TypeError) as e:
            raise UserError(f"{path}, line {number} is not JSON: {getattr(e, 'msg', e)}") from e
        if missing:
            raise UserError(f"{path}, line {number} lacks {', '.join(missing)}")
        points.append(point)
    if twice := [name for name, n in Counter(point["name"] for point in points).items() if n > 1]:
        raise UserError(f"{path} has '{twice[0]}' twice: delete one of the lines")
    return points


def workdir_of(sweep: Path, point: dict) -> Path:
    """In the sweep's folder, wherever that lies now; it was frozen as seen from where that was done."""
    return sweep / Path(point["workdir"]).name


def finished(sweep: Path, point: dict, kept: Path | None) -> Path | None:
    """The folder with a point's finished run: its workdir, else where it is kept; None of neither."""
    workdir = workdir_of(sweep, point)
    if results.is_whole(workdir, steps_of(point)) and not results.other_config(workdir, point):
        return workdir
    return kept and results.kept(kept, point["name"], point["config_hash"])


def steps_of(point: dict) -> int | None:
    """Of its whole schedule, where the point says so."""
    return point.get("resolved", {}).get("train", {}).get("num_steps")


def keep(sweep: Path, kept: Path) -> list[Path]:
    """Copies what finished in its workdir and is not kept yet; returns the new folders."""
    found = []
    for point in read_all(sweep):
        there = results.kept_codec if "prepare" in verbs_of(point) else results.kept
        if is_done(sweep, point) and not there(kept, point["name"], point["config_hash"]):
            found.append(results.keep(point, workdir_of(sweep, point), kept))
    return found


def is_done(sweep: Path, point: dict) -> bool:
    """Whether a point has what is kept of it, be it evaluated, an image tokenizer, or data that have one."""
    workdir = workdir_of(sweep, point)
    if "prepare" in verbs_of(point):
        return results.prepared_codec(workdir) is not None
    if "evaluate" in verbs_of(point):
        return bool(finished(sweep, point, None))
    summary = results.read_json(workdir / results.SUMMARY)
    return bool(summary and summary["steps"] == steps_of(point) and not results.other_config(workdir, point))


def read_run(point: dict, folder: Path) -> Run:
    config, summary, evaluation = (results.read_json(folder / name) for name in results.DONE)
    tags, model, params, tokens = point.get("tags", {}), config["model"], point["params"], point["tokens"]
    process = config.get("process", {})
    process = process.get("prediction", process.get("kind", ""))
    size = tags.get("size", f"{model['num_layers']} x {model['d_model']}")
    return Run(
        point["name"], folder, config["objective"], size, tags.get("part", LADDER), config["seed"],
        config["optimizer"]["learning_rate"], process, float(params), float(tokens), 6.0 * params * tokens,
        float(summary["flops"]), float(summary.get("images", 0)), evaluation["metrics"], drops(folder),
        held_fixed(f"{config['objective']} {process}".strip(), evaluation, results.identity(folder)),
        tags.get("tables", {}))


def held_fixed(recipe: str, evaluation: dict, identity: dict) -> dict:
    """{what: value} that a comparison holds fixed; None of what a reference of one modality lacks."""
    found = evaluation["metrics"]
    looked = found.get("generation_all") or found.get("cider") or {}
    same = {name: identity[name] for name in identity if name == "tokenizer" or name.startswith("sizes.")}
    return same | {
        f"the codec of {recipe.split()[0]}": identity.get("codec"),
        f"the sampling of {recipe}": json.dumps(evaluation.get("sampling"), sort_keys=True),
        "how many pictures were looked at": looked.get("n")}


def drops(folder: Path) -> dict[str, float]:
    """{source: the mean share of its documents that windows dropped}, over the run."""
    rows = results.log_lines(folder)
    prefix, found = "data/dropped_documents/", {}
    for row in rows:
        for key, value in row.items():
            if key.startswith(prefix) and value is not None:
                found.setdefault(key.removeprefix(prefix), []).append(value)
    return {source: sum(values) / len(values) for source, values in found.items()}


def check_alike(runs: list[Run]) -> None:
    """Raises UserError where runs differ in what a comparison must hold fixed: their data (of each recipe its
    codec), how they sample and how many pictures were looked at."""
    seen: dict[str, dict] = {}
    for run in runs:
        for key, value in run.same.items():
            if value is not None:
                seen.setdefault(key, {}).setdefault(value, []).append(run.name)
    for key, values in seen.items():
        if len(values) > 1:
            names = " | ".join(f"{', '.join(some[:3])}{' ...' * (len(some) > 3)}" for some in values.values())
            raise UserError(f"these runs cannot be compared: they differ in {key} ({names}); train or evaluate "
                            "those of one side anew, or take them out of the sweep")


def metrics_of(runs: list[Run]) -> list[Metric]:
    """Of those that any run has: losses by source first, then METRICS in their order."""
    having = {name: figure for run in runs for name, figure in run.figures.items()
              if figure["value"] is not None}
    losses = [Metric(name, f"Perplexity, {name.removesuffix(NATS)}", "lower", True)
              for name in sorted(having) if name.endswith(NATS) and "/" not in name]
    return losses + [Metric(name, title, having[name]["better"], False)
                     for name, (title, _) in METRICS.items() if name in having]


def largest_planned(points: list[dict], recipe: str) -> set[str]:
    """Names of the ladder's points of its largest size, one for each seed, finished or not."""
    some = {point["name"]: point["params"] * point["tokens"] for point in points
            if point.get("tags", {}).get("part", LADDER) == LADDER
            and point.get("resolved", {}).get("objective") == recipe}
    return {name for name, cost in some.items() if cost == max(some.values())}


def panel(metric: Metric, ladder: list[Run], outliers: str, wanted: set[str] = frozenset()) -> Panel:
    """outliers: 'paper' leaves out what the paper's rule does, 'none' nothing but what has no logarithm.
    wanted: the baseline's largest runs; without any of them nothing is there to be matched."""
    values, dropped = {}, []
    for run in ladder:
        if (figure := run.figures.get(metric.name)) is None:
            continue
        value = metric.shown(figure)
        rule = paper.OUTLIERS.get(metric.name) if outliers == "paper" else None
        if value is None or value <= 0:
            dropped.append((run.name, "no value" if value is None else "0 has no logarithm"))
        elif rule and rule(value):
            dropped.append((run.name, f"{value:.3g} is an outlier by the paper's rule"))
        else:
            values.setdefault(run.recipe, []).append((run, value))
    fits, ratios = {}, {}
    for axis in AXES:
        points = {recipe: [Point(getattr(run, axis), math.log(value)) for run, value in some]
                  for recipe, some in values.items()}
        fits[axis] = {recipe: attempt(power_law, some) for recipe, some in points.items()}
        ratios[axis] = attempt(parity, points.get(CANDIDATE, []), points.get(BASELINE, []), metric.better)
        if points.get(BASELINE) and (gone := sorted(wanted - {run.name for run, _ in values[BASELINE]})):
            ratios[axis] = f"{gone[0]}, which it has to match, has no value here"
    return Panel(metric, values, dropped, floors(metric, ladder), fits, ratios)


def attempt(fit, *args):
    """What a fit makes of the points, or why it makes nothing."""
    try:
        return fit(*args)
    except TooFew as e:
        return str(e)


def floors(metric: Metric, ladder: list[Run]) -> dict[str, float]:
    """{label: level}: of chance, and those that METRICS names, mean over the runs; of a codec by recipe."""
    levels: dict[str, list[float]] = {}
    for run in ladder:
        figure = run.figures.get(metric.name) or {}
        if figure.get("chance"):
            levels.setdefault("chance", []).append(figure["chance"])
        for label, name in METRICS.get(metric.name, ("", {}))[1].items():
            if (found := run.figures.get(name)) and found["value"]:
                label = f"{label}, {run.recipe}" if label == "codec" else label
                levels.setdefault(label, []).append(found["value"])
    return {label: sum(some) / len(some) for label, some in levels.items()}


def surface(runs: list[Run]) -> Surface | str:
    """L(N, D) of the mean held-out loss over sources, of one recipe."""
    names = [metric.name for metric in metrics_of(runs) if metric.nats]
    losses = [[run.figures[name]["value"] for name in names if name in run.figures] for run in runs]
    if not names or any(len(some) < len(names) or not all(x is not None and math.isfinite(x) for x in some)
                        for some in losses):
        return "not all runs have the held-out losses of all sources"
    return attempt(loss_surface, [run.params for run in runs], [run.tokens for run in runs],
                   [sum(some) / len(some) for some in losses])


def tables(runs: list[Run]) -> list[Table]:
    """Of the paper's tables 4 to 7 those that the runs' tags name."""
    found = []
    for number, (title, theirs) in paper.TABLES.items():
        ours = {row: [run for run in runs if run.rows.get(number) == row] for row in theirs}
        names = [name for name in paper.TITLES if any(getattr(x, name) is not None for x in theirs.values())]
        rows = [(row, [getattr(scores, name) for name in names], ours[row]) for row, scores in theirs.items()]
        if some := [run for found_ in ours.values() for run in found_]:
            found.append(Table(f"Table {number}: {title}", [paper.TITLES[name] for name in names],
                               metrics_of(some), rows))
    return found


def read(sweep: Path, kept: Path | None = None, outliers: str = "none") -> Study:
    """Reads a sweep's finished runs, from their workdirs or from what is kept of them, and fits the ladder.

    Raises UserError where there is no sweep, no run is finished, or finished ones cannot be compared.
    """
    points = read_points(sweep)
    folders = {point["name"]: finished(sweep, point, kept) for point in points}
    runs, missing = [], {}
    for point in points:
        if not (folder := folders[point["name"]]):
            missing[point["name"]] = results.why_not(workdir_of(sweep, point), point)
            continue
        try:
            runs.append(read_run(point, folder))
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            missing[point["name"]] = f"a file of {folder} is broken or lacks a key: {e!r}"
    if not runs:
        first = next(iter(missing.items()))
        raise UserError(f"no run of {sweep} is finished and evaluated ({first[0]}: {first[1]})")
    check_alike(runs)
    ladder = [run for run in runs if run.part == LADDER]
    wanted = largest_planned(points, BASELINE)
    panels = [panel(metric, ladder, outliers, wanted) for metric in metrics_of(ladder or runs)]
    compared = all(largest_planned(points, recipe) or any(run.recipe == recipe for run in ladder)
                   for recipe in (CANDIDATE, BASELINE))
    recipes = dict.fromkeys(run.recipe for run in ladder)
    surfaces = {recipe: surface([run for run in ladder if run.recipe == recipe]) for recipe in recipes}
    table = {name: (title, *(getattr(scores, name) for scores in (
        paper.TRANSFUSION_7B, paper.CHAMELEON_7B, paper.PARITY))) for name, title in paper.TITLES.items()}
    return Study(sweep.resolve().name, len(points), runs, missing, panels, surfaces, outliers, AXES,
                 (CANDIDATE, BASELINE), compared, table, tables(runs))
