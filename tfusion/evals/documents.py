"""The data's own held-out documents, whatever they are: captions drawn beside their own picture, pictures
described beside their own caption, and whole documents from nothing. To look at; nothing is scored.
"""

import contextlib
import itertools
from pathlib import Path

import numpy as np

from tfusion import inference
from tfusion.errors import UserError
from tfusion.evals.base import Evaluator, LeftOut, Options, register, section, sources, write_card
from tfusion.inference.trained import Trained
from tfusion.objectives import kind_of

SHOWN = 24  # pairs
WRITTEN, CHOSEN = 16, 4  # documents from nothing; those with the most pictures are shown


def pairs(run: Trained, number: int) -> tuple[list[str], np.ndarray]:
    """(captions, pictures uint8 (n, H, W, 3)) of held-out documents of one text and one picture, equally many
    of each source, that a row holds. Scenes are left to their own evaluator. Raises LeftOut without any.
    """
    size, format = inference.decoder(run).image_size, kind_of(run.cfg).row_format(run.cfg)

    def fits(text: str) -> bool:
        return format.layout.sizes(len(run.tokenizer.encode(text)), 1).positions <= format.data.seq_len

    def read(records):
        for i in range(len(records)):
            with contextlib.suppress(UserError):  # `prepare` named those that are damaged
                yield sorted(records[i], key=lambda part: not isinstance(part, str))

    def found(spec) -> list:
        wanted = (pair for pair in read(spec.open("heldout", size))
                  if [isinstance(part, str) for part in pair] == [True, False] and fits(pair[0]))
        return list(itertools.islice(wanted, number))

    by_source, why = [], "no held-out document is one text and one picture, but for scenes"
    for spec in (spec for spec in sources(run.cfg).values() if spec.kind != "scenes"):
        try:
            by_source += [some] if (some := found(spec)) else []
        except UserError as e:
            why = str(e)
    chosen = [pair for some in by_source for pair in some[: max(1, number // len(by_source))]]
    if not chosen:
        raise LeftOut(why)
    texts, pictures = zip(*chosen)
    return list(texts), np.stack(pictures)


def drawn(run: Trained, folder: Path, options: Options) -> dict:
    texts, real = pairs(run, min(options.number, SHOWN))
    made = inference.decoder(run).draw(run, texts, options.seed)
    block = {"kind": "pairs", "above": "real", "below": "drawn", "items": [{"caption": text} for text in texts],
             "made": "Painted by the model for held-out captions.",
             "reading": "Above, held-out pictures; below, what the model painted for their captions alone."}
    write_card(folder, section("drawn", "Held-out captions, painted", block), real=real, drawn=made)
    return {}


def described(run: Trained, folder: Path, options: Options) -> dict:
    texts, real = pairs(run, min(options.number, SHOWN))
    told = inference.decoder(run).describe(run, real)
    items = [{"caption": said, "remark": f"its own: {text}"} for text, said in zip(texts, told)]
    block = {"kind": "gallery", "images": "real", "items": items, "of": len(items),
             "reading": "Below each picture, what the model wrote, and in grey its own caption."}
    write_card(folder, section("described", "Held-out pictures, described", block), real=real)
    return {}


def from_nothing(run: Trained, folder: Path, options: Options) -> dict:
    """At temperature 1: text, pictures, text."""
    made = inference.decoder(run).go_on(run, [[]] * WRITTEN, seed=options.seed, temperature=1.0)
    made.sort(key=lambda parts: -sum(not isinstance(part, str) for part in parts))
    pictures = [part for parts in made[:CHOSEN] for part in parts if not isinstance(part, str)]
    number = iter(range(len(pictures)))
    documents = [[{"text": part} if isinstance(part, str) else {"image": next(number)} for part in parts]
                 for parts in made[:CHOSEN]]
    drew = ", when to open an image, painted it by diffusion, and wrote on after it" if pictures else ""
    block = {"kind": "documents", "images": "images", "documents": documents,
             "made": "Painted by the model in documents of its own.",
             "reading": f"Free running, from nothing: the model chose each word{drew}."}
    write_card(folder, section("interleaved", "Documents written by the model", block),
               images=np.array(pictures))
    return {}


register(Evaluator("drawn", ("data", "draw"), drawn, order=20))
register(Evaluator("described", ("data", "describe"), described, order=21))
register(Evaluator("documents", ("go_on",), from_nothing, order=22))
