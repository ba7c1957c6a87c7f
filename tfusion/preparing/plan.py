"""What is made of what: the fingerprints by which an unfinished folder is gone on with, and a finished one is
known to hold what the command would make."""

import contextlib
import dataclasses
import hashlib
import json

import numpy as np

from tfusion.data import store
from tfusion.data.sources.base import Opened, Source, Unreadable, attempts
from tfusion.errors import UserError
from tfusion.preparing import shards

PREPROCESSING = 1  # of data/pictures.py and shards.py: another number where the same source gives other records
SAMPLE = 16  # records of a split that are looked at


def make(specs: dict[str, Source], opened: dict, tokenizer, codec=None) -> dict:
    """JSON values. specs: {source: its spec}; opened: {(source, split): its records}. codec: has an image_size
    and a fingerprint, of what is known before it is fitted to the sources: to fit it again may give other bits.

    Raises UserError where a source has no records to train on, and where one has pictures and there is no
    codec.
    """
    sources = {}
    for (name, split), records in opened.items():
        if split == "train" and not len(records):
            raise UserError(f"data.sources.{name} has no records to train on; share=0 leaves it out")
        spec = dataclasses.asdict(specs[name])
        del spec["share"]  # of no matter here
        sources[f"{name}/{split}"] = {"spec": spec, "records": len(records),
                                      "fingerprint": getattr(records, "fingerprint", ""),
                                      "sample": _sample(records, pictures=codec is not None)}
    return {"format_version": store.FORMAT_VERSION, "records_per_shard": shards.RECORDS, "sources": sources,
            "tokenizer": tokenizer.fingerprint, "codec": codec.fingerprint if codec else "",
            "preprocessing": preprocessing(codec)}


def preprocessing(codec=None) -> str:
    """Fingerprint of what is done to pictures and texts before they are encoded."""
    about = {"version": PREPROCESSING, "image_size": codec.image_size if codec else None}
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def _sample(records: Opened, pictures: bool) -> str:
    """Of a few records, evenly spread: what they hold."""
    digest = hashlib.sha256()
    places = sorted({int(x) for x in np.linspace(0, len(records) - 1, SAMPLE)}) if len(records) else []
    with contextlib.closing(attempts(records, places)) as read:
        for record in read:
            parts = [f"{record.reason} {record.key}"] if isinstance(record, Unreadable) else record
            for part in parts:
                if isinstance(part, str):
                    digest.update(b"text" + part.encode("utf-8", "surrogatepass"))
                elif pictures:
                    digest.update(f"picture{np.shape(part)}".encode() + np.asarray(part).tobytes())
                else:
                    raise UserError(shards.NO_CODEC)
    return digest.hexdigest()[:16]
