"""The parts of a report that show what the model makes: pictures, captions, documents, its mask.

Each function takes the run's files and returns HTML; it raises `Missing` where a file is absent.
"""

from html import escape

from tfusion.reporting import pictures
from tfusion.reporting.records import EVALUATION, Missing, ReportError, RunFiles

SHOWN_IMAGES, SHOWN_RECONSTRUCTIONS, SHOWN_DOCUMENTS, MOSAIC = 32, 16, 4, 16


def mosaic(run: RunFiles) -> str:
    """The first generated pictures, close together."""
    judged = run.judged_images(f"{EVALUATION}/generations")[:MOSAIC]
    images = "".join(pictures.pixel_image(image, record["prompt"]) for image, record in judged)
    return (
        f'<figure class="mosaic">{images}<figcaption>Painted by the model, the first '
        f"{len(judged)} of its answers to held-out prompts.</figcaption></figure>"
    )


def tile(image: str, caption: str, wrong: bool, remark: str = "") -> str:
    """One picture with its words; a wrong one has a thin outline."""
    return (
        f'<figure class="tile{" wrong" if wrong else ""}">{image}<figcaption>{caption}{remark}'
        "</figcaption></figure>"
    )


def sampled(shown: int, total: int, right: int) -> str:
    """Which of the judged answers are on the page, and how many of these are right."""
    which = f"The first {shown} of {total:,}" if shown < total else f"All {total:,}"
    return f"{which}, in the order they came; {right} of these {shown} are right in every respect."


def generations(run: RunFiles) -> str:
    """Held-out prompts and what the model painted for them."""
    judged = run.judged_images(f"{EVALUATION}/generations")
    tiles, right = [], 0
    for image, record in judged[:SHOWN_IMAGES]:
        faults = [
            name
            for key, name in (
                ("canvas", "background"),
                ("sprites", "objects"),
                ("relation", "places"),
            )
            if record[key] is False
        ]
        right += not faults
        remark = f'<small class="bad">wrong {" and ".join(faults)}</small>' if faults else ""
        tiles.append(
            tile(
                pictures.pixel_image(image, record["prompt"]),
                escape(record["prompt"]),
                bool(faults),
                remark,
            )
        )
    lead = sampled(len(tiles), len(judged), right)
    return f'<p class="lead">{lead}</p><div class="grid">{"".join(tiles)}</div>'


def captions(run: RunFiles) -> str:
    """Held-out images and what the model wrote about them."""
    judged = run.judged_images(f"{EVALUATION}/captions")
    tiles, right = [], 0
    for image, record in judged[:SHOWN_IMAGES]:
        wrong = not record["all"]
        right += not wrong
        remark = ""
        if record["caption"].strip() != record["reference"].strip():
            css = "bad" if wrong else ""
            remark = f'<small class="{css}">reference: {escape(record["reference"])}</small>'
        caption = escape(record["caption"]) or "<i>(nothing)</i>"
        tiles.append(tile(pictures.pixel_image(image, record["reference"]), caption, wrong, remark))
    lead = (
        sampled(len(tiles), len(judged), right)
        + " A reference in grey says the same in other words."
    )
    return f'<p class="lead">{lead}</p><div class="grid">{"".join(tiles)}</div>'


def interleaved(run: RunFiles) -> str:
    """Documents that the model wrote from nothing, text and images in order."""
    documents = run.json(f"{EVALUATION}/interleaved.json")
    images = run.arrays(f"{EVALUATION}/interleaved.npz")["images"]
    if not documents:
        raise Missing(f"{run.root / EVALUATION}/interleaved.json holds no document")
    cards = []
    for parts in documents[:SHOWN_DOCUMENTS]:
        inner = "".join(
            f"<p>{escape(part['text'].strip())}</p>"
            if "text" in part
            else pictures.pixel_image(images[part["image"]], "image written by the model")
            for part in parts
        )
        cards.append(f'<article class="document">{inner}</article>')
    lead = (
        "Free running: the model chose each word, when to open an image, painted it by "
        "diffusion, and wrote on after it."
    )
    return f'<p class="lead">{lead}</p><div class="documents">{"".join(cards)}</div>'


def reconstructions(run: RunFiles) -> str:
    """Held-out originals, each above what is left after coding it to latents and back."""
    arrays = run.arrays(f"{EVALUATION}/reconstructions.npz")
    pairs = list(zip(arrays["images"], arrays["reconstructions"], strict=True))
    tiles = [
        f'<div class="pair">{pictures.pixel_image(image, "original")}'
        f"{pictures.pixel_image(copy, 'reconstruction')}</div>"
        for image, copy in pairs[:SHOWN_RECONSTRUCTIONS]
    ]
    return (
        '<p class="lead">Above, held-out originals; below, the same after coding to latents and '
        "back. No generated picture can be sharper than these.</p>"
        f'<div class="grid">{"".join(tiles)}</div>'
    )


def attention_mask(run: RunFiles) -> str:
    """Who sees whom in one packed row."""
    row = run.arrays(f"{EVALUATION}/mask.npz")
    pieces = run.json(f"{EVALUATION}/mask.json")["pieces"]
    visible, segments, image_ids = row["mask"].astype(bool), row["segment_ids"], row["image_ids"]
    if not visible.shape == (len(segments),) * 2 == (len(image_ids), len(pieces)):
        raise ReportError(f"{run.root / EVALUATION}: mask.npz and mask.json differ in length")
    leaks = pictures.count_leaks(visible, segments, image_ids)
    check = (
        f'<b class="bad">{leaks:,} visible pairs (red) break this rule.</b>'
        if leaks
        else "Not one visible pair breaks this rule."
    )
    past, future = pictures.IMAGE_COLOURS[0]
    swatches = "".join(
        f'<span class="swatch" style="background:{colour}"></span>{meaning}'
        for colour, meaning in (
            (pictures.DOCUMENT_COLOURS[0], "earlier tokens"),
            (past, "same image, earlier"),
            (future, "same image, later"),
        )
    )
    return (
        '<p class="lead">One packed row of the run. Each line is a query, each column a key. '
        "Text sees what came before it in its own document; the patches of an image also see "
        f'each other, forward as well as back. {check}</p><p class="key">{swatches}</p>'
        f'<div class="scroll">{pictures.mask(visible, segments, image_ids, pieces)}</div>'
    )
