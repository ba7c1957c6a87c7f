"""What an evaluator is, and how one is added: a file in this folder that ends in `register(Evaluator(...))`.

    def run(run: Trained, folder: Path, options: Options) -> {name: figure}

Figures are made by evals/figure.py and go into metrics.json under their names; `name/part` is the same
of one part of the data, and stands in no table but one that asks for it. What the report shows, an
evaluator writes as a card (`write_card`); reporting/cards.py says which blocks there are. What it needs and
a run lacks is named in a line; one that finds out for itself raises `LeftOut`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tfusion import inference
from tfusion.data.config import shares
from tfusion.errors import UserError
from tfusion.inference.trained import Trained
from tfusion.objectives import kind_of
from tfusion.paths import replace_by, replace_text


class Options(NamedTuple):
    seed: int = 0  # of the sampling
    number: int = 256  # of pictures, captions, documents looked at


class Evaluator(NamedTuple):
    name: str  # also of its folder
    needs: tuple[str, ...]  # of NEEDS; or another evaluator's name, which then comes first and must have run
    run: Callable  # (Trained, folder, Options) -> {name: figure}
    order: int = 100  # among the others, in metrics.json and in the report


class LeftOut(Exception):
    """This cannot be measured of this run; the message says why."""


EVALUATORS: dict[str, Evaluator] = {}
CANNOT = {"draw": "draw pictures", "describe": "describe pictures", "go_on": "write documents",
          "reconstruct": "reconstruct pictures", "codes": "write pictures as codes"}


def register(evaluator: Evaluator) -> None:
    EVALUATORS[evaluator.name] = evaluator


def sources(cfg) -> dict[str, Any]:
    """{name: spec} of the raw sources that take part; none of a kind of training that names none."""
    found = getattr(getattr(cfg, "data", None), "sources", {})
    return {name: found[name] for name in shares(found)}


def scenes_source(cfg):
    """The spec of the composed scenes, whose labels are known; None where they take no part."""
    return next((spec for spec in sources(cfg).values() if spec.kind == "scenes"), None)


def prepared_folder(cfg) -> Path | None:
    """Where the run's prepared data are, or were; None of a kind of training that reads sources as they are."""
    format = kind_of(cfg).row_format(cfg)
    return Path(format.data.prepared) if format else None


def open_heldout(cfg) -> dict[str, Any]:
    """{source: held-out rows}. Raises LeftOut where raw sources cannot be read, UserError where prepared data
    are not as they should be."""
    try:
        return kind_of(cfg).open_heldout(cfg)
    except UserError as e:
        if prepared_folder(cfg):
            raise
        raise LeftOut(str(e)) from e


def _no_data(run: Trained) -> str | None:
    folder = prepared_folder(run.cfg)
    if folder and not folder.exists():
        return f"{folder} is gone: --config.data.prepared=DIR names the data"


def _no_scenes(run: Trained) -> str | None:
    return None if scenes_source(run.cfg) else "data.sources has no 'scenes', whose captions can be scored"


def _unable(need: str):
    def reason(run: Trained) -> str | None:
        if need in inference.can(run):
            return None
        why = ": it has no codec of pictures" if run.tokenizer and not run.codec else ""
        return f"the run cannot {CANNOT[need]}{why}"
    return reason


def _no_rows(run: Trained) -> str | None:
    return None if kind_of(run.cfg).row_format(run.cfg) else "the run trains on no packed rows"


NEEDS = {  # (run) -> why it is not given, None where it is
    "data": _no_data, "rows": _no_rows, "world": _no_scenes, **{need: _unable(need) for need in CANNOT}}


def lacking(evaluator: Evaluator, run: Trained, done) -> str | None:
    """The first reason why it cannot measure the run; done: names of the evaluators that did."""
    reasons = (NEEDS[need](run) if need in NEEDS else
               None if need in done else f"that goes on from '{need}', which is left out"
               for need in evaluator.needs)
    return next(filter(None, reasons), None)


def write_card(folder: Path, *sections: dict, **arrays) -> None:
    """card.json, the sections of the report that an evaluator fills, and card.npz, the arrays they name."""
    replace_by(folder / "card.npz", lambda file: np.savez_compressed(file, **arrays))
    replace_text(folder / "card.json", json.dumps({"sections": sections}, indent=1) + "\n")


def section(name: str, title: str, *blocks: dict) -> dict:
    """A section of the report; name: its word in the navigation."""
    return {"name": name, "title": title, "blocks": blocks}
