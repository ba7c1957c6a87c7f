"""The report of a run, of any kind: one HTML file that holds all of its pictures, curves and figures.

Read `write_report` first. What evaluators left comes first (cards.py), then what training logged (charts.py); a
part whose files are absent is left out and named in a note at the foot of the page.
"""

from html import escape
from pathlib import Path

from tfusion.reporting import cards, charts, figures, page
from tfusion.reporting.records import CONFIG, FIGURES, LOG, SUMMARY, TIMING, Missing, ReportError, RunFiles

Section = tuple[str, str, str]  # its anchor, title, HTML


def write_report(root: Path, out: Path) -> None:
    """Writes the page for the run in `root` to `out`; raises ReportError if that cannot be done."""
    run = RunFiles(root)
    if not root.is_dir():
        raise Missing(f"there is no run at {root}; `python -m tfusion.train --config=experiments/FILE.py "
                      f"--workdir={root}` makes one")
    for required in (CONFIG, LOG):
        run.path(required)
    try:
        page.write(out, f"{run.name} – run report", body(run))
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise ReportError(f"a file in {root} lacks what the report needs: {error!r}; `python -m "
                          f"tfusion.evaluate --workdir={root}` writes those of the evaluation anew") from error


def body(run: RunFiles) -> str:
    left = run.attempt("What was measured", cards.read, [])
    made = [("figures", "What it can do", run.attempt("Figures", figures.table))]
    made += [section for card in left for section in cards.sections(run, card)]
    made += [(name, title, run.attempt(title, build)) for name, title, build in TRAINING]
    made = unique([section for section in made if section[2]])
    text = header(run, left) + page.navigation([name for name, *_ in made])
    return text + "".join(page.section(*section) for section in made) + left_out(run)


def unique(sections: list[Section]) -> list[Section]:
    """Anchors that two evaluators chose alike are told apart."""
    seen, made = {}, []
    for name, title, html in sections:
        seen[name] = seen.get(name, 0) + 1
        made.append((name if seen[name] == 1 else f"{name}-{seen[name]}", title, html))
    return made


def header(run: RunFiles, left: list[cards.Card]) -> str:
    """Title, verdict, facts, and a first handful of pictures."""
    found = (run.optional_json(FIGURES, "metrics") or {"metrics": {}})["metrics"]
    config = run.json(CONFIG)
    lead = ("All that this run left: what was measured of it and what it made, how it learnt, how fast, and "
            "with which configuration. Figures are of held-out data.")
    kicker = " · ".join(["tfusion run report", *filter(None, [config.get("objective")])])
    return (
        f'<header class="hero"><div><p class="kicker">{escape(kicker)}</p><h1>{escape(run.name)}</h1>'
        f'<p class="lead">{lead}</p><p class="path"><code>'
        f"{escape(str(run.root))}</code></p>{figures.verdict_html(found)}</div>"
        f"{run.attempt('Pictures in the header', lambda _: cards.mosaic(left))}</header>{facts(run)}")


def facts(run: RunFiles) -> str:
    """Size, length, time and machine, as far as they are known."""
    pairs: list[tuple[str, str]] = []
    if summary := run.optional_json(SUMMARY, "num_params", "steps"):
        pairs += [(title, page.count(summary[key]) + unit) for key, title, unit in (
            ("num_params", "parameters", ""), ("steps", "training steps", ""), ("tokens", "tokens seen", ""),
            ("images", "images seen", ""), ("flops", "training compute", "FLOP")) if summary.get(key)]
    else:
        pairs.append(("training steps", f"{max((row['step'] for row in run.log()), default=0):,}"))
    if seconds := sum(stage["seconds"] for stage in run.stages()):
        pairs.append(("wall time, all stages", page.duration(seconds)))
    timing = run.optional_json(TIMING, "machine")
    return page.facts(pairs, [("machine", escape(timing["machine"]))] if timing else [])


def codec(run: RunFiles) -> str:
    """How the codec of the run's pictures learnt, where its run is known and still there."""
    trained = run.codec_run()
    if trained is None:
        return ""
    made = charts.losses(trained)
    run.notes += [(f"{title} of {trained.name}", reason) for title, reason in trained.notes]
    return f'<p class="lead">Trained before this run, in <code>{escape(str(trained.root))}</code>.</p>{made}'


def config(run: RunFiles) -> str:
    """The resolved configs and the versions, folded away."""
    parts = [(run.name, page.pretty_json(run.json(CONFIG)))]
    if (trained := run.codec_run()) and (trained.root / CONFIG).is_file():
        parts.append((f"{trained.name}, its codec", page.pretty_json(trained.json(CONFIG))))
    if timing := run.optional_json(TIMING, "versions"):
        parts.append(("Versions", page.pretty_json(timing["versions"])))
    return "".join(f"<details><summary>{escape(name)}</summary>{body}</details>" for name, body in parts)


def left_out(run: RunFiles) -> str:
    """The note on what the page lacks, and which command would fill it in."""
    evaluation = run.optional_json(FIGURES) or {}
    notes = run.notes + [(f"Evaluation: {name}", why) for name, why in evaluation.get("left_out", {}).items()]
    if not notes:
        return ""
    titles: dict[str, list[str]] = {}
    for title, reason in notes:
        titles.setdefault(reason, []).append(title)
    items = "".join(f"<li>{escape('; '.join(dict.fromkeys(group)))}<small>{escape(reason)}</small></li>"
                    for reason, group in titles.items())
    return page.section("left-out", "Left out of this report", f'<ul class="note">{items}</ul>')


# Of what training left: anchor (also its name in the navigation), title, and what builds it.
TRAINING = (
    ("progress", "Figures over the steps", figures.over_steps),
    ("losses", "How it learnt", charts.losses),
    ("codec", "How its codec learnt", codec),
    ("speed", "Speed, memory and time", charts.speed),
    ("milestones", "What it had reached at which step", charts.milestones),
    ("config", "Resolved configuration", config))
