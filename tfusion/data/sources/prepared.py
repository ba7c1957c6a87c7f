"""Data that something else than `prepare` wrote: tokens, and latents of another encoder."""

import dataclasses

from tfusion import config
from tfusion.data.sources.base import Source
from tfusion.errors import UserError


@config.register("source", "prepared")
@dataclasses.dataclass(frozen=True)
class PreparedSource(Source):
    """Stands in data.prepared already (tfusion.data.store.Writer); training takes it as it is."""

    def open(self, split: str, image_size: int | None = None) -> list:
        raise UserError("a source of kind 'prepared' in data.sources has no raw records: it was written into "
                        "data.prepared by other means, and training can begin")
