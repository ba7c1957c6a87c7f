"""Writes the report of a run: one HTML file, pictures, curves and figures included.

    python -m tfusion.report --workdir=runs/quickstart
    python -m tfusion.report --workdir=runs/quickstart --out=/tmp/quickstart.html

Needs metrics.jsonl, config.json and evaluation/metrics.json of the run; other parts that are absent are left
out of the page and named at its foot.
"""

from pathlib import Path

from tfusion import paths
from tfusion.errors import UserError, run
from tfusion.reporting.quickstart import write_report
from tfusion.reporting.records import ReportError

_WORKDIR = paths.define("workdir", None, "The run to report on, as `make quickstart` leaves it.", required=True)
_OUT = paths.define("out", None, "The HTML file to write; default: WORKDIR/report.html.")


def main() -> None:
    """Writes the page, or says in one line why it cannot."""
    root = Path(_WORKDIR.value)
    out = Path(_OUT.value) if _OUT.value else root / "report.html"
    try:
        write_report(root, out)
    except ReportError as error:
        raise UserError(str(error)) from error
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run(main)
