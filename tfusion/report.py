"""Writes the report of a run, of any kind, or compares several: one HTML file with all pictures in it; or that
of a sweep: each metric's line over compute, and how much of it one recipe needs to match the other.

  python -m tfusion.report --workdir=runs/quickstart/transfusion
  python -m tfusion.report --workdir=runs/quickstart/transfusion --out=/tmp/quickstart.html
  python -m tfusion.report --compare runs/a runs/b runs/c     side by side: curves, figures, differing config;
      of a sweep's folder its finished points
  python -m tfusion.report --scaling sweeps/x --results=docs/results/x     HTML, CSV and PNG in sweeps/x/report;
      finished runs are copied to --results without their weights, and those that lie there alone are read too

Needs config.json and metrics.jsonl of a run; other parts that are absent, the evaluation too, are left out of
the page and named at its foot. Of a sweep, unfinished runs are named and the others fitted.
"""

import shlex
import subprocess
import sys
from pathlib import Path

from absl import flags

from tfusion import paths
from tfusion.errors import UserError, run
from tfusion.reporting import scaling_page
from tfusion.reporting.compare import write_comparison
from tfusion.reporting.records import ReportError
from tfusion.reporting.run_page import write_report
from tfusion.scaling import results, study

WORKDIR = paths.define("workdir", None, "The run to report on; gs:// too.", buckets=True)
COMPARE = flags.DEFINE_list("compare", [], "Runs to put side by side: --compare A B C, or --compare=A,B,C; a "
                            "sweep's folder stands for its finished points.")
SCALING = paths.define("scaling", None, "The sweep to fit: the folder with its points.jsonl; gs:// too.",
                       buckets=True)
RESULTS = paths.define("results", None, "Of --scaling: where finished runs are kept, without their weights.")
OUTLIERS = flags.DEFINE_enum("outliers", "none", ["none", "paper"], "Of --scaling: paper leaves out FID > 100, "
                             "CLIP < 17, CIDEr < 4.")
OUT = paths.define("out", None, "The HTML file to write; default: WORKDIR/report.html, or ./compare.html. Of "
                   "--scaling a folder; default: SWEEP/report.", buckets=True)


def commit() -> str:
    """The commit of the code, and whether it was changed since; 'unknown' outside of a checkout."""
    found = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
                           capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def write_scaling(sweep: Path, kept: Path | None, out: Path) -> None:
    """Keeps what finished since, then fits all that is finished."""
    for flag, folder in {"--out": out, "--results": kept or out}.items():
        paths.check_writable(folder, flag)
    for folder in study.keep(sweep, kept) if kept else ():
        print(f"kept {folder}")
    found = study.read(sweep, kept, OUTLIERS.value)
    for name, why in found.missing.items():
        print(f"missing: {name} ({why})")
    words = shlex.join(["python", "-m", "tfusion.report", *sys.argv[1:]])
    for path in scaling_page.write(found, out, {"command": words, "commit": commit()}):
        print(f"wrote {path}")


def runs_of(root: Path) -> list[Path]:
    """A run's folder itself; of a sweep those of its finished points, and the others are named."""
    if not (root / results.POINTS).is_file():
        return [root]
    points = study.read_points(root)
    found = [study.finished(root, point, None) for point in points]
    for point in (point for point, folder in zip(points, found) if not folder):
        print(f"left out: {point['name']} ({results.why_not(study.workdir_of(root, point), point)})")
    return [folder for folder in found if folder]


def main(words: list[str]) -> None:
    """Writes the page, or says in one line why it cannot. words: the runs that follow `--compare A`."""
    if words and not COMPARE.value:
        raise UserError(f"unexpected argument '{words[0]}'; flags look like --workdir=DIR (--help lists them)")
    if sum(map(bool, (WORKDIR.value, COMPARE.value, SCALING.value))) != 1:
        raise UserError("one of --workdir=RUN, --compare RUN RUN ... and --scaling SWEEP is needed; see --help")
    if SCALING.value:
        kept = RESULTS.value and Path(RESULTS.value)
        sweep = paths.path(SCALING.value)
        return write_scaling(sweep, kept, paths.path(OUT.value or sweep / "report"))
    out = paths.path(OUT.value or ("compare.html" if COMPARE.value else f"{WORKDIR.value}/report.html"))
    paths.check_writable(out.parent, "--out")
    try:
        if COMPARE.value:
            roots = [paths.path(paths.anywhere(word)) for word in (*COMPARE.value, *words)]
            write_comparison([run for root in roots for run in runs_of(root)], out)
        else:
            write_report(paths.path(WORKDIR.value), out)
    except ReportError as error:
        raise UserError(str(error)) from error
    print(f"wrote {out} ({out.stat().length / 1e6:.1f} MB)")


if __name__ == "__main__":
    run(main, words=True)
