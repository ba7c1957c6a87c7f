"""A look at prepared data before money is spent on them: what the store holds, what rows are made of, and the
first rows themselves. One HTML file; read `write_data_page` first.

T positions, I image slots of a row, S sources.
"""

import base64
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tfusion.config import RunConfig
from tfusion.data import packing, store
from tfusion.data.config import RowFormat, shares
from tfusion.data.mixture import knots
from tfusion.data.tokenizers import Tokenizer, load_saved
from tfusion.models import codecs
from tfusion.objectives import kind_of
from tfusion.preparing import card
from tfusion.reporting import inspect_rows, packed_row, page, pictures, plots
from tfusion.workdir import CODEC

SHOWN = 4  # rows
COUNTED = 256  # rows that figures are taken of, of one window at most
AT_ONCE = 16  # rows that are read together
WINDOWS = 4  # whose plans are looked at
MOSAIC = 16  # pictures of the header
SPREAD = 2.5  # standard deviations of a latent from grey to black or white


class Data(NamedTuple):
    """Prepared data, opened to be looked at."""

    cfg: RunConfig
    format: RowFormat
    rows: object
    about: dict  # the data card
    tokenizer: Tokenizer
    codec: codecs.Codec | None  # None where what made the latents is not here
    image_attention: str | None  # of the kind's transformer, where it has one

    @property
    def names(self) -> list[str]:
        """Of the sources, in the order of the rows' plans."""
        return list(shares(self.format.data.sources))


class Counts(NamedTuple):
    """Of so many rows."""

    rows: int
    documents: int
    scored: int  # positions
    patches: int
    slots: int  # that hold an image
    positions_S: np.ndarray  # of each source


def write_data_page(cfg: RunConfig, out: Path) -> None:
    """Writes the page of what data.prepared holds. Raises UserError where it is absent, or not the config's."""
    data = open_data(cfg)
    numbers = chosen(data)
    rows = data.rows.read(numbers)
    drawn = draw_images(data, rows)
    sections = [("store", "What is prepared", prepared(data)), ("rows", "What rows are made of", made_of(data))]
    sections += [(f"row-{k}", f"Row {k}", legend(data) * (k == 0) + row_html(data, k, row, images))
                 for k, row, images in zip(numbers, rows, drawn)]
    body = header(data, drawn) + page.navigation([name for name, *_ in sections])
    title = f"{Path(data.format.data.prepared).name} – prepared data"
    page.write(out, title, body + "".join(page.section(*each) for each in sections))


def open_data(cfg: RunConfig) -> Data:
    kind = kind_of(cfg)
    format, trunk = kind.row_format(cfg), kind.trunk(cfg)
    root = Path(format.data.prepared)
    meta = store.read_meta(root)
    return Data(cfg, format, kind.open_rows(cfg), card.read(root), load_saved(root), open_codec(root, meta),
                trunk and trunk.image_attention)


def chosen(data: Data) -> list[int]:
    """The first rows, and of each source that none of them holds the first of the window that does."""
    planned = data.rows.documents(range(data.format.data.window_rows))
    numbers = set(range(min(SHOWN, len(planned))))
    for source in range(len(data.names)):
        having = [k for k, documents in enumerate(planned) if any(of == source for of, *_ in documents)]
        if having and numbers.isdisjoint(having):
            numbers.add(having[0])
    return sorted(numbers)


# ---------------------------------------------------------------- pictures

def open_codec(root: Path, meta: dict) -> codecs.Codec | None:
    """The codec that made the images, if it stands in the folder."""
    codec = codecs.load(root / CODEC) if (root / CODEC).exists() else None
    return codec if codec and codec.fingerprint == meta["codec"] else None


def false_colours(latents: np.ndarray) -> np.ndarray:
    """(n, h, w, c), or codes (n, h, w) -> uint8 (n, h, w, 3): the first three channels, each about its mean."""
    x = np.asarray(latents, np.float32)
    x = (x if x.ndim == 4 else x[..., None])[..., :3]
    x = np.concatenate([x, *[x[..., -1:]] * (3 - x.shape[-1])], axis=-1)
    spread = x.std((0, 1, 2)) + 1e-6
    return np.clip(127.5 * (1 + (x - x.mean((0, 1, 2))) / (SPREAD * spread)), 0, 255).astype(np.uint8)


def draw_images(data: Data, rows: list) -> list[np.ndarray]:
    """Of each row, uint8 (slots in use, H, W, 3)."""
    used = [int((row.image_start_BI < len(row.tokens_BT)).sum()) for row in rows]
    images = np.concatenate([data.format.layout.images(row)[:number] for row, number in zip(rows, used)])
    if not len(images):
        return [images] * len(rows)
    drawn = data.codec.decode(images) if data.codec else false_colours(images)
    return np.split(drawn, np.cumsum(used)[:-1])


def picture_words(data: Data) -> str:
    if not data.format.image_slots:
        return ""
    return ("Pictures are decoded by the codec that stands beside them." if data.codec else
            "The codec that encoded the pictures is not here: latents are shown by their first three channels, "
            "each normalised, as red, green and blue; of codes, each has a colour.")


# ---------------------------------------------------------------- header

def header(data: Data, drawn: list) -> str:
    """Title, a handful of pictures, facts."""
    root, format = Path(data.format.data.prepared), data.format
    first = [image for images in drawn for image in images][:MOSAIC]
    words = "decoded" if data.codec else "encoded, in false colours"
    mosaic = "".join(pictures.pixel_image(image, "a picture of the first rows") for image in first)
    mosaic = (f'<figure class="mosaic">{mosaic}<figcaption>Pictures of the first rows, {words}.</figcaption>'
              "</figure>" if first else "")
    train = [about for title, about in data.about.items() if title.endswith("/train")]
    total = {key: sum(about[key] for about in train) for key in ("records", "text_tokens", "images")}
    pairs = [("records", page.count(total["records"])), ("text tokens", page.count(total["text_tokens"])),
             ("images", page.count(total["images"])), ("positions of a row", f"{format.data.seq_len:,}"),
             ("image slots of a row", f"{format.image_slots:,}"),
             ("text ids", f"{format.vocabulary.text_vocab_size:,}")]
    if format.image_slots:
        what = "codes" if format.vocabulary.num_codes else "latents"
        pairs.append((f"{what} of an image", " × ".join(map(str, format.image_shape))))
    return (f'<header class="hero"><div><p class="kicker">tfusion prepared data</p><h1>{escape(root.name)}</h1>'
            '<p class="lead">What a run with this config will train on: what was prepared, how it fills rows, '
            "and the first rows as the model is given them, read back into words and pictures.</p>"
            f'<p class="path"><code>{escape(str(root))}</code></p></div>{mosaic}</header>'
            + page.facts(pairs))


# ---------------------------------------------------------------- what is prepared

HEAD = ("", "records", "text tokens", "images", "tokens a record", "images a record", "exact copies",
        "in train too", "latents' std")


def prepared(data: Data) -> str:
    """The data card."""
    lines, skipped = [], []
    titles = [title.rsplit("/", 1) for title in data.about]
    for name, split in sorted(titles, key=lambda both: (both[0], both[1] != "train")):
        title = f"{name}/{split}"
        about = data.about[title]
        lines.append(split_line(name, split, about, name in data.names))
        if about["skipped"]:
            skipped.append(f"<li>{escape(title)}<small>{escape(card.told(about['skipped']))}</small></li>")
    note = f'<h3>Skipped</h3><ul class="note">{"".join(skipped)}</ul>' if skipped else ""
    return ('<p class="lead">Counted over all records. Exact copies are alike to the last byte, text and '
            "latents, of an earlier record; of held-out ones, those that some training split holds too are bad "
            "news. Latents ought to have a standard deviation of about 1 in each channel."
            f"</p>{page.table(HEAD, lines, numeric=range(1, len(HEAD)))}{note}")


def split_line(name: str, split: str, about: dict, used: bool) -> list[str]:
    lengths, images = about["text_tokens_per_record"], about["images_per_record"]
    std = about["latents"] and about["latents"]["std"]
    under = split + ("" if used else ", not in this config")
    few = split == "heldout" and about["records"] < card.FEW
    per = [f"{number}: {count / about['records']:.0%}" for number, count in images.items()]
    more = f"<small>and up to {list(images)[-1]}</small>" if len(per) > 3 else ""
    alone = about["pictures_without_text"]
    return [
        f"<b>{escape(name)}</b><small>{under}</small>",
        f"{about['records']:,}" + '<small class="bad">few: figures say little</small>' * few,
        f"{about['text_tokens']:,}",
        f"{about['images']:,}" + (f"<small>{alone:,} without text</small>" if alone else ""),
        f"{lengths['p50']:,}<small>{lengths['p5']:,} to {lengths['p95']:,}, at most {lengths['max']:,}</small>"
        if lengths else "–",
        "<br>".join(per[:3]) + more if about["images"] else "–",
        f"{about['copies']:,}<small>{page.number(100 * about['copies'] / about['records'])} %</small>"
        if about["copies"] else "0",
        bad(about.get("also_in_train")),
        spread(std) if std else "–"]


def spread(std: list[float]) -> str:
    """The least and the greatest deviation of a channel; the noise schedule is made for about 1."""
    low, high = store.UNIT_STD
    css = "" if low <= min(std) and max(std) <= high else ' class="bad"'
    return f"<span{css}>{min(std):.2f} to {max(std):.2f}</span>"


def bad(number: int | None) -> str:
    """A number that ought to be 0, where there is one."""
    return "–" if number is None else f'<span class="bad">{number:,}</span>' if number else "0"


# ---------------------------------------------------------------- what rows are made of

def counted(data: Data) -> Counts:
    """Of the first rows, as training reads them; each is checked against the data contract."""
    rows, number = data.rows, min(COUNTED, data.format.data.window_rows)
    documents = scored = patches = slots = 0
    positions = np.zeros(len(data.names), np.int64)
    for first in range(0, number, AT_ONCE):
        some = range(first, min(first + AT_ONCE, number))
        batch, planned = packing.stack_rows(rows.read(some)), rows.documents(some)
        rows.check(batch)
        scored += int(batch.loss_mask_BT.sum())
        patches += int((batch.image_ids_BT > 0).sum())
        slots += int((batch.image_start_BI < batch.tokens_BT.shape[1]).sum())
        for segments, each in zip(batch.segment_ids_BT, planned):
            lengths = np.bincount(segments, minlength=len(each) + 1)[1:]
            np.add.at(positions, [source for source, *_ in each], lengths)
            documents += len(each)
    return Counts(number, documents, scored, patches, slots, positions)


def made_of(data: Data) -> str:
    """Fill, shares, drops and lengths."""
    n, T, I = counted(data), data.format.data.seq_len, data.format.image_slots
    R = data.format.data.window_rows
    stats = [data.rows.stats(window * R) for window in range(WINDOWS)]
    fill = np.mean([one["data/fill"] for one in stats])
    filled = n.positions_S.sum()
    pairs = [("positions filled", f"{fill:.1%}"), ("of them scored", f"{n.scored / filled:.1%}"),
             ("of them patches", f"{n.patches / filled:.1%}"),
             ("documents a row", page.number(n.documents / n.rows))]
    if I:
        pairs.append(("image slots in use", f"{n.slots / n.rows / I:.1%}"))
    lead = (f"Of the first {n.rows:,} rows, each checked against the data contract; fill, drops and lengths of "
            f"{WINDOWS} windows of {R:,} rows. A dropped document found no room in its window, nor in the "
            "next; a record is left out where its images fit into no row.")
    return (f'<p class="lead">{lead}</p>{page.facts(pairs)}{sources_table(data, n, stats[1:])}'
            f'<div class="cards small">{"".join(histograms(data, T))}</div>')


def sources_table(data: Data, n: Counts, stats: list[dict]) -> str:
    """A line a source: shares asked (where they change, at row 0) and got, records of a window there, drops,
    epochs of the whole run."""
    asked, train = np.array(knots(shares(data.format.data.sources))[0][1]), data.cfg.train
    asked, got = asked / asked.sum(), n.positions_S / max(n.positions_S.sum(), 1)
    at_end = data.rows.stats(train.num_steps * train.batch_size - 1)
    lines = []
    for source, name in enumerate(data.names):
        dropped, left_out = (np.mean([one[f"data/{what}/{name}"] for one in stats])
                             for what in ("dropped_documents", "left_out_records"))
        bars = "".join(f'<div class="bar" style="width: {100 * share:.1f}%; background: {colour}"></div>'
                       for share, colour in ((asked[source], plots.LIGHT_GREY),
                                             (got[source], packed_row.colour(source))))
        lines.append([f"<b>{escape(name)}</b>", bars, f"{asked[source]:.1%}", f"{got[source]:.1%}",
                      f"{data.rows.mixture.records[0][source]:,.1f}", share_of(dropped), share_of(left_out),
                      page.number(at_end[f"data/epochs/{name}"])])
    head = ("", "positions, asked above got", "asked", "got", "records a window", "dropped", "left out",
            "epochs of the run")
    return page.table(head, lines, numeric=range(2, len(head))).replace(
        '<td class="" data-label="positions', '<td class="track" data-label="positions')


def share_of(x: float) -> str:
    return f"{x:.1%}" if x else "0"


def histograms(data: Data, T: int) -> Iterator[str]:
    """The lengths of each source's documents."""
    offered = [data.rows.offered(window) for window in range(WINDOWS)]
    of, lengths = (np.concatenate([getattr(one, what) for one in offered]) for what in ("sources", "lengths"))
    for source, name in enumerate(data.names):
        own = lengths[of == source]
        if len(own):
            reading = (f"{len(own):,} documents: {int(np.median(own)):,} positions in the middle, "
                       f"{own.min():,} to {own.max():,}; a row has {T:,}.")
            drawn = plots.histogram(f"Lengths of {name}", own, packed_row.colour(source))
            yield page.card(f"Lengths of {name}", reading, drawn)


# ---------------------------------------------------------------- rows

def legend(data: Data) -> str:
    """How to read a row; once, above the first."""
    swatches = [(packed_row.colour(source), name) for source, name in enumerate(data.names)]
    key = "".join(f'<span class="swatch" style="background: {colour}"></span>{escape(name)}'
                  for colour, name in [*swatches, (pictures.PADDING, "padding")])
    patches = "full where it is a picture's patches, " if data.format.image_slots else ""
    return (f'<p class="lead">A strip is a row from left to right: each document pale in its source\'s colour, '
            f"{patches}and underlined where a token is scored. Below it its documents in order, read back from "
            f'ids: <span class="flow"><span class="text">scored</span>, <span class="text unscored">not scored'
            f"</span></span>, special ids in frames. {picture_words(data)}</p>"
            f'<p class="key">{key}</p>')


def row_html(data: Data, k: int, row, images: np.ndarray) -> str:
    documents = packed_row.read_documents(row, data.rows.documents([k])[0], data.names, data.format.vocabulary,
                                          data.tokenizer)
    used, T = int((row.segment_ids_BT > 0).sum()), len(row.tokens_BT)
    words = (f"{len(documents):,} documents, {len(images):,} pictures; {T - used:,} of {T:,} positions are "
             f"padding, {int(row.loss_mask_BT.sum()):,} are scored.")
    body = (f'<p class="key">{words}</p>{packed_row.strip(row, documents)}'
            f"{packed_row.cards(documents, images, row.max_t_BI)}")
    if data.image_attention is None:
        return body
    made = inspect_rows.draw_row(row, data.image_attention, inspect_rows.block_size(T))
    png = base64.b64encode(made.png).decode()
    return (f"{body}<details{' open' * (k == 0)}><summary>Who sees whom</summary>"
            f'<p class="key">{escape(made.line)}.</p><img class="drawn" alt="attention mask and kernel blocks" '
            f'src="data:image/png;base64,{png}"></details>')
