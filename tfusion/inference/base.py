"""What a trained run can do, as a value: one function per kind of training makes it, and nobody else asks
which kind a run is of.
"""

from collections.abc import Callable
from typing import NamedTuple

from tfusion.inference.trained import Trained


class Decoder(NamedTuple):
    """Functions of the run that it was made for; None is what this run cannot.

    Pictures are uint8 (n, H, W, 3). A document is a list of parts, each a str or a picture (H, W, 3).
    """

    draw: Callable | None = None  # (run, texts: list[str], seed) -> pictures
    describe: Callable | None = None  # (run, pictures) -> list[str]
    go_on: Callable | None = None  # (run, documents, *, seed, temperature, max_images, draw_first) -> new parts
    reconstruct: Callable | None = None  # (run, pictures) -> pictures
    codes: Callable | None = None  # (run, pictures) -> their codes, int32 (n, ...)
    num_codes: int = 0  # they are below it
    make_codec: Callable | None = None  # (run, read) -> codec, normalised over the pictures read(image_size)
    image_size: int | None = None  # of the pictures that it takes: their side, in pixels


DECODERS: dict[str, Callable[[Trained], Decoder]] = {}


def register(objective: str, make: Callable[[Trained], Decoder]) -> None:
    """Names what runs of a kind of training can do."""
    DECODERS[objective] = make


def decoder(run: Trained) -> Decoder:
    """Of a kind that registered nothing: it can nothing."""
    make = DECODERS.get(run.cfg.objective)
    return make(run) if make else Decoder()


def can(run: Trained) -> set[str]:
    """The names of what a run can do."""
    return {name for name, function in decoder(run)._asdict().items() if callable(function)}
