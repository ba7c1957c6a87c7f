"""Many runs as one thing: an experiment's points, frozen, run and watched.

  python -m tfusion.sweep --config=experiments/scaling.py:pack --out=sweeps/x     freezes them in points.jsonl
  ... --topology=v5p-128 --dry_run     what each needs and costs on a slice; writes nothing
  launch/local.sh --sweep=sweeps/x            runs what is missing on this machine; killed, the same goes on
  launch/local.sh --sweep=sweeps/x --parallel=2 --retry       two at a time; those that failed too
  python -m tfusion.sweep --status --out=sweeps/x             how far each is, from its workdir alone
  python -m tfusion.sweep --jobs --out=sweeps/x [--retry]     what a launcher submits: INDEX, NAME, TOPOLOGY
  python -m tfusion.sweep --point=NAME --out=sweeps/x         what the job of a point runs, on each of its hosts

A point is a config with single values changed, and the verbs that are run on it (scaling/points.py says how an
experiment lists them). What is frozen stays: an experiment that says otherwise later is refused. Points that
have a slice are planned, as `plan` does it: what does not fit is refused.
"""

import sys
from pathlib import Path

from absl import flags
from tqdm import tqdm

from tfusion import experiment, paths
from tfusion.errors import UserError, run
from tfusion.planning import several
from tfusion.scaling import jobs, points, progress, runner, verdicts

CONFIG = flags.DEFINE_string("config", None, "experiments/FILE.py[:words], which has a get_sweep")
OUT = paths.define("out", None, "folder of the sweep: points.jsonl, and a workdir of each point; gs:// too",
                   buckets=True)
TOPOLOGY = flags.DEFINE_string("topology", None, "with --config: the slice of all points (v5p-128), instead of "
                               "those of the experiment")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "with --config: show the points and their plans, write nothing")
STATUS = flags.DEFINE_bool("status", False, "show how far the points are")
RUN = flags.DEFINE_bool("run", False, "run what is missing (launch/local.sh --sweep=OUT)")
PARALLEL = flags.DEFINE_integer("parallel", 1, "points at a time", lower_bound=1)
RESULTS = paths.define("results", None, "what `report --scaling --results=DIR` kept: it is not run again")
RETRY = flags.DEFINE_bool("retry", False, "--run, --jobs: those that failed too")
JOBS = flags.DEFINE_bool("jobs", False, "print the points that are to be submitted now, for launchers: a line "
                         "each, its line in points.jsonl from 0, name and topology between tabs")
POINT = flags.DEFINE_string("point", None, "run what is left of this point, by name or line from 0: what a job "
                            "does on each of its hosts")
ASKED = "--config=experiments/FILE.py, --status, --run, --jobs, --point=NAME"


def freeze(name: str, out: Path, topology: str | None = None, dry_run: bool = False) -> None:
    made = points.make(experiment.call(name, "get_sweep"), name, out, topology)
    points.check_frozen(out, made)
    planned = verdicts.to_plan(made)
    plans = several.make({point.name: wanted(point) for point in planned})
    made = verdicts.with_plans(made, plans)
    width = max(len(point.name) for point in made)
    print(f"{'point':{width}}  {'N':>9}  {'tokens':>9}  {'6ND':>9}  {'expected FLOPs':>14}  verbs")
    for point in made:
        numbers = point.params, point.tokens, point.six_n_d, point.flops
        shown = "  ".join(f"{x or '-':>{wide}{'.3g' if x else ''}}" for x, wide in zip(numbers, (9, 9, 9, 14)))
        print(f"{point.name:{width}}  {shown}  {', '.join(point.verbs)}")
    if planned:
        print(verdicts.table(verdicts.to_plan(made)))
        verdicts.check_fit(made, plans, name)
    if dry_run:
        return print(f"{len(made)} points; nothing is frozen")
    new = points.freeze(out, made)
    print(f"{len(made)} points {'frozen' if new else 'are frozen already'} in {out / points.POINTS}; "
          f"launch/local.sh --sweep={out} runs them")


def wanted(point: points.Point) -> several.Wanted:
    """Raises UserError, which names the point, on what is wrong without a compiler's saying so."""
    cfg = points.resolve(point.config, point.overrides)
    try:
        several.check(cfg, point.accelerator)
    except UserError as e:
        raise UserError(f"'{point.name}' on {point.topology}: {e}") from e
    return several.Wanted(cfg, point.accelerator, point.config,
                          [f"--config.{key}={value}" for key, value in point.overrides.items()])


def minutes(seconds: float | None) -> str:
    return "" if seconds is None else tqdm.format_interval(seconds)


def show(out: Path, results: Path | None) -> None:
    frozen = points.read(out)
    named = {point.name: point for point in frozen}
    states = {point.name: progress.state(point, named, results) for point in frozen}
    width = max(map(len, ["point", *named]))
    print(f"{'point':{width}}  {'is':9}  {'verb':8}  {'step':>11}  {'ETA':>8}  goodput  restarts")
    for name, s in states.items():
        where = f"{s.step}/{s.steps}" if s.steps else ""
        losses = "  ".join(f"{key} {value:.4f}" for key, value in s.losses.items())
        share = "" if s.goodput is None else f"{s.goodput:.0%}"
        print(f"{name:{width}}  {s.what:9}  {s.verb:8}  {where:>11}  {minutes(s.eta):>8}  {share:>7}  "
              f"{s.restarts or '':>8}  {s.why or losses}".rstrip())
    counts = {what: sum(s.what == what for s in states.values()) for what in progress.STATES}
    print(", ".join(f"{number} {what}" for what, number in counts.items() if number))


def show_jobs(out: Path, results: Path | None) -> None:
    """On stdout the jobs, for a script; on stderr how many points are what, for its user."""
    due = jobs.due(points.read(out), RETRY.value, results)
    for index, point in due.submit:
        print(index, point.name, point.topology or "", sep="\t")
    print(f"{out}: " + ", ".join(f"{number} {what}" for what, number in due.counts.items()), file=sys.stderr)


def main() -> None:
    asked = [CONFIG.value is not None, STATUS.value, RUN.value, JOBS.value, POINT.value is not None]
    if OUT.value is None or sum(asked) != 1:
        raise UserError(f"--out=DIR is needed, and one of {ASKED}")
    if CONFIG.value is None and (TOPOLOGY.value is not None or DRY_RUN.value):
        raise UserError("--topology and --dry_run go with --config: what is frozen keeps its slices")
    out, results = paths.path(OUT.value), RESULTS.value and Path(RESULTS.value)
    if CONFIG.value is not None:
        freeze(CONFIG.value, out, TOPOLOGY.value, DRY_RUN.value)
    elif STATUS.value:
        show(out, results)
    elif JOBS.value:
        show_jobs(out, results)
    elif POINT.value is not None:
        sys.exit(jobs.run(out, points.read(out), POINT.value, results))
    elif paths.in_bucket(out):
        raise UserError(f"--run works in a local folder, not in {out}: submit jobs (launch/README.md)")
    else:
        runner.Runner(out, points.read(out), PARALLEL.value, RETRY.value, results).run()


if __name__ == "__main__":
    run(main)
