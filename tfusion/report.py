"""Writes the report of a run, of any kind, or compares several: one HTML file with all pictures in it.

  python -m tfusion.report --workdir=runs/quickstart/transfusion
  python -m tfusion.report --workdir=runs/quickstart/transfusion --out=/tmp/quickstart.html
  python -m tfusion.report --compare runs/a runs/b runs/c     side by side: curves, figures, differing config

Needs config.json and metrics.jsonl of a run; other parts that are absent, the evaluation too, are left out of
the page and named at its foot.
"""


from absl import flags

from tfusion import paths
from tfusion.errors import UserError, run
from tfusion.reporting.compare import write_comparison
from tfusion.reporting.records import ReportError
from tfusion.reporting.run_page import write_report

WORKDIR = paths.define("workdir", None, "The run to report on; gs:// too.", buckets=True)
COMPARE = flags.DEFINE_list("compare", [], "Runs to put side by side: --compare A B C, or --compare=A,B,C.")
OUT = paths.define("out", None, "The HTML file to write; default: WORKDIR/report.html, or ./compare.html.",
                   buckets=True)


def main(words: list[str]) -> None:
    """Writes the page, or says in one line why it cannot. words: the runs that follow `--compare A`."""
    if words and not COMPARE.value:
        raise UserError(f"unexpected argument '{words[0]}'; flags look like --workdir=DIR (--help lists them)")
    if bool(WORKDIR.value) == bool(COMPARE.value):
        raise UserError("one of --workdir=RUN and --compare RUN RUN ... is needed; see --help")
    out = paths.path(OUT.value or ("compare.html" if COMPARE.value else f"{WORKDIR.value}/report.html"))
    try:
        if COMPARE.value:
            write_comparison([paths.path(paths.anywhere(word)) for word in (*COMPARE.value, *words)], out)
        else:
            write_report(paths.path(WORKDIR.value), out)
    except ReportError as error:
        raise UserError(str(error)) from error
    print(f"wrote {out} ({out.stat().length / 1e6:.1f} MB)")


if __name__ == "__main__":
    run(main, words=True)
