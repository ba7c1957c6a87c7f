"""The cards that evaluators leave: evaluation/<evaluator>/card.json, and the arrays that it names in card.npz.

    {"sections": [{"name": anchor, "title": ..., "blocks": [{"kind": ..., ...}]}]}

A block has a `kind` of BLOCKS, whose function's docstring says what else it holds; `title` and `reading` (how
to read it) are words. Pictures are uint8 (n, H, W, 3); `made`, where the run made them: a sentence for the
page's header.
"""

from html import escape
from typing import Any

import numpy as np

from tfusion.reporting import figures, page, pictures, plots
from tfusion.reporting.records import EVALUATION, FIGURES, Missing, ReportError, RunFiles

SHOWN, MOSAIC = 32, 16  # pictures of a gallery, and of them in the header


class Card:
    """What an evaluator left."""

    def __init__(self, run: RunFiles, evaluator: str):
        self.run, self.place = run, f"{EVALUATION}/{evaluator}"
        self.sections: list[dict[str, Any]] = run.json(f"{self.place}/card.json")["sections"]
        self._arrays: dict[str, np.ndarray] | None = None

    def array(self, name: str) -> np.ndarray:
        """One of its arrays; raises ReportError where there is none of that name."""
        if self._arrays is None:
            self._arrays = self.run.arrays(f"{self.place}/card.npz")
        if name not in self._arrays:
            raise ReportError(f"{self.run.root / self.place}: card.npz has no '{name}'; evaluate the run anew")
        return self._arrays[name]

    def images(self, name: str, items: list) -> np.ndarray:
        """The pictures of a block's items, one each."""
        images = self.array(name)
        if len(images) != len(items):
            raise ReportError(f"{self.run.root / self.place}: {len(images)} images in card.npz, but "
                              f"{len(items)} in card.json; evaluate the run anew")
        return images


def read(run: RunFiles) -> list[Card]:
    """The cards of the evaluators that measured the run, in their order; those without one show nothing."""
    names = run.json(FIGURES).get("evaluators", [])
    made = [run.attempt(name, lambda run, name=name: Card(run, name), None) for name in names
            if (run.root / EVALUATION / name).is_dir()]
    return [card for card in made if card]


def sections(run: RunFiles, card: Card) -> list[tuple[str, str, str]]:
    """(anchor, title, HTML) of each of a card's sections."""
    made = []
    for section in card.sections:
        body = run.attempt(section["title"], lambda _, section=section: "".join(
            block_html(card, block) for block in section["blocks"]))
        made.append((section["name"], section["title"], framed(body)))
    return made


def framed(body: str) -> str:
    """Cards side by side, whatever else there is below."""
    return f'<div class="cards">{body}</div>' if body.startswith('<figure class="card">') else body


def block_html(card: Card, block: dict[str, Any]) -> str:
    if block["kind"] not in BLOCKS:
        raise Missing(f"{card.run.root / card.place}/card.json has a block of kind '{block['kind']}', which is "
                      "not known here")
    return BLOCKS[block["kind"]](card, block)


def lead(*sentences: str) -> str:
    words = " ".join(sentence for sentence in sentences if sentence)
    return f'<p class="lead">{escape(words)}</p>' if words else ""


def tile(image: str, item: dict[str, Any]) -> str:
    """One picture with its words; a wrong one has a thin outline."""
    wrong, remark = item.get("wrong", False), item.get("remark")
    css = ' class="bad"' if wrong else ""
    below = f"<small{css}>{escape(remark)}</small>" if remark else ""
    caption = escape(item["caption"]) or "<i>(nothing)</i>"
    return (f'<figure class="tile{" wrong" if wrong else ""}">{image}<figcaption>{caption}{below}</figcaption>'
            "</figure>")


def gallery(card: Card, block: dict[str, Any]) -> str:
    """images: array; items: [{caption, remark, wrong}], one a picture; of: how many there were."""
    items = block["items"]
    shown = list(zip(card.images(block["images"], items), items, strict=True))[:SHOWN]
    which = f"The first {len(shown)} of {block['of']:,}" if len(shown) < block["of"] else f"All {block['of']:,}"
    which += ", in the order they came" + (";" if "wrong" in items[0] else ".") if items else ""
    if items and "wrong" in items[0]:
        right = sum(not item["wrong"] for _, item in shown)
        which += f" {right} of these {len(shown)} are right in every respect."
    tiles = "".join(tile(pictures.pixel_image(image, item["caption"]), item) for image, item in shown)
    return lead(which, block.get("reading", "")) + f'<div class="grid">{tiles}</div>'


def pairs(card: Card, block: dict[str, Any]) -> str:
    """above, below: arrays of as many pictures; items: [{caption, remark}] or none."""
    above = card.array(block["above"])
    below, items = card.images(block["below"], above), block.get("items") or [None] * len(above)
    tiles = []
    for first, second, item in zip(above, below, items, strict=True):
        images = (f'<div class="pair">{pictures.pixel_image(first, block["above"])}'
                  f'{pictures.pixel_image(second, block["below"])}</div>')
        tiles.append(tile(images, item) if item else images)
    return lead(block.get("reading", "")) + f'<div class="grid">{"".join(tiles[:SHOWN])}</div>'


def documents(card: Card, block: dict[str, Any]) -> str:
    """images: array; documents: lists of {"text": ...} and {"image": its number}."""
    made = []
    for parts in block["documents"]:
        inner = "".join(
            f"<p>{escape(part['text'].strip())}</p>" if "text" in part else
            pictures.pixel_image(card.array(block["images"])[part["image"]], "image written by the model")
            for part in parts)
        made.append(f'<article class="document">{inner or "<p><i>(nothing)</i></p>"}</article>')
    return lead(block.get("reading", "")) + f'<div class="documents">{"".join(made)}</div>'


def bars(card: Card, block: dict[str, Any]) -> str:
    """names: of the bars of each group, the last one set off in `tone` (text, image); groups: [{name, values}];
    across: bars lie."""
    tone = {"text": plots.TEXT, "image": plots.IMAGE}[block.get("tone", "text")]
    draw = plots.lying_bars if block.get("across") else plots.standing_bars
    groups = [(group["name"], group["values"]) for group in block["groups"]]
    drawn = draw(block["title"], block["names"], groups, tone)
    return page.card(block["title"], block.get("reading", ""), drawn)


def table(card: Card, block: dict[str, Any]) -> str:
    """head: words; rows: lists of words, numbers, nulls."""
    rows = [[escape(x) if isinstance(x, str) else page.number(x) for x in row] for row in block["rows"]]
    numeric = [i for i in range(len(block["head"]))
               if not any(isinstance(row[i], str) for row in block["rows"])]
    return page.card(block["title"], block.get("reading", ""), page.table(block["head"], rows, numeric))


def parts(card: Card, block: dict[str, Any]) -> str:
    """A table of figures `name/part`, each with its interval, chance and mark: head: what the parts are; parts:
    their names; columns: {name: title}."""
    found, rows = card.run.figures(), []
    for part in block["parts"]:
        row = [found[f"{name}/{part}"] for name in block["columns"]]
        count = max((figure["n"] or 0 for figure in row), default=0)
        rows.append([escape(part), f"{count:,}", *(figures.cell(figure) for figure in row)])
    head = [block["head"], "n", *block["columns"].values()]
    return page.table(head, rows, numeric=range(1, len(head)))


def mask(card: Card, block: dict[str, Any]) -> str:
    """mask (T, T), segments (T,), images (T,): arrays of one packed row; pieces: its tokens' words."""
    visible, segments, image_ids = (card.array(block[key]) for key in ("mask", "segments", "images"))
    visible, pieces = visible.astype(bool), block["pieces"]
    if not visible.shape == (len(segments),) * 2 == (len(image_ids), len(pieces)):
        raise ReportError(f"{card.run.root / card.place}: card.npz and card.json differ in length")
    leaks = pictures.count_leaks(visible, segments, image_ids)
    check = (f'<b class="bad">{leaks:,} visible pairs (red) break this rule.</b>' if leaks else
             "Not one visible pair breaks this rule.")
    past, future = pictures.IMAGE_COLOURS[0]
    key = ((pictures.DOCUMENT_COLOURS[0], "earlier tokens"), (past, "same image, earlier"),
           (future, "same image, later"))
    swatches = "".join(f'<span class="swatch" style="background:{colour}"></span>{meaning}'
                       for colour, meaning in key)
    return ('<p class="lead">One packed row of the run. Each line is a query, each column a key. '
            "Text sees what came before it in its own document; the patches of an image also see "
            f'each other, forward as well as back. {check}</p><p class="key">{swatches}</p>'
            f'<div class="scroll">{pictures.mask(visible, segments, image_ids, pieces)}</div>')


BLOCKS = {"gallery": gallery, "pairs": pairs, "documents": documents, "bars": bars, "table": table,
          "parts": parts, "mask": mask}


def mosaic(cards: list[Card]) -> str:
    """The first pictures that the run made, close together: those of the first block with `made`."""
    keys = {"gallery": "images", "pairs": "below", "documents": "images"}
    for card in cards:
        for block in (block for section in card.sections for block in section["blocks"]):
            if block.get("made") and len(made := card.array(block[keys[block["kind"]]])[:MOSAIC]):
                images = "".join(pictures.pixel_image(image, "made by the model") for image in made)
                words = f"<figcaption>{escape(block['made'])}</figcaption>"
                return f'<figure class="mosaic">{images}{words}</figure>'
    return ""
