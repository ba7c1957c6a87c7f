"""What a run on packed rows says of its data."""

import dataclasses
import math
from typing import NamedTuple

from tfusion.config import components, fraction, path
from tfusion.data import sources as _sources  # noqa: F401 (registers)
from tfusion.data.layout import NO_LATENTS, Layout, Vocabulary
from tfusion.data.mixture import knots
from tfusion.errors import UserError

SLOTS_PER_IMAGE = 1.25  # rows differ in how many images they hold


@dataclasses.dataclass(frozen=True)
class DataConfig:
    prepared: str = path()  # folder written by `prepare`
    tokenizer: str = path("byte", "default")  # 'byte', 'default' or a path: data/tokenizers/
    seq_len: int  # T
    image_share: float = fraction()  # expected of a row's positions in images, BOI and EOI included; the most
    # where shares change
    window_rows: int  # R: rows planned at once
    caption_dropout: float = fraction()
    image_first_fraction: float = fraction(may_change=True)
    image_first_max_t: float = fraction(zero=False, may_change=True)  # noise limit where the image comes first
    sources: dict = components("source", fixed=("share",))  # by names of the user's

    def check(self, name: str) -> None:
        if self.seq_len < 2:
            raise UserError(f"{name}.seq_len = {self.seq_len} must be at least 2: <bos> and a token")
        check_sources(self.sources, name)

    def image_slots(self, num_patches: int) -> int:
        """I: image slots of a row, a quarter more than image_share asks for, at most as many as fit."""
        wanted = math.ceil(SLOTS_PER_IMAGE * self.image_share * self.seq_len / (num_patches + 2))
        return max(1, min(wanted, self.seq_len // (num_patches + 2))) if wanted else 0


def check_sources(sources: dict, name: str) -> None:
    for source in sources:
        if not source.isidentifier():  # it names a folder, and a key on the command line
            raise UserError(f"{name}.sources: '{source}' must be a name of letters, digits and underscores")
    by_name = shares(sources)
    if not by_name:
        raise UserError(f"{name}.sources must give at least one source a positive share")
    for row, there in knots(by_name):
        if not any(there):
            raise UserError(f"{name}.sources: at row {row} no source has a positive share")


def shares(sources: dict) -> dict[str, float | tuple]:
    """{name: share} of those that take part, in the order of their names, however they are written."""
    return {name: sources[name].share for name in sorted(sources) if sources[name].takes_part}


class RowFormat(NamedTuple):
    """What a kind of training asks of packed rows."""

    data: DataConfig
    vocabulary: Vocabulary
    image_shape: tuple[int, ...]  # of one image as its codec makes it
    layout: Layout

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one slot of a batch."""
        return NO_LATENTS if self.vocabulary.num_codes else self.image_shape

    def check_images(self, has: str, shape, num_codes: int, then: str) -> None:
        """Raises UserError where images are others than the model's. has: who has them; then: what to do."""
        theirs = images_said(shape, num_codes)
        ours = images_said(self.image_shape, self.vocabulary.num_codes)
        if theirs != ours:
            keys = "model.num_codes, codes_per_image" if self.vocabulary.num_codes else "model.adapter.latent_*"
            raise UserError(f"{has} {theirs}, the model expects {ours}: change {keys} or {then}")

    @property
    def image_slots(self) -> int:
        return self.data.image_slots(self.vocabulary.num_patches)


def images_said(shape, num_codes: int) -> str:
    """What a codec makes of a picture: latents (h, w, c), or codes (h, w), of so many."""
    shape = tuple(shape)
    return f"latents of shape {shape}" if len(shape) == 3 else f"codes of shape {shape} from {num_codes}"
