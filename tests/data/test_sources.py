"""Held-out scenes stay as they are."""

import hashlib

import pytest

from experiments import quickstart
from tfusion import config
from tfusion.data.sources import make_source

DATA = config.from_dict(quickstart.get_config()).data


@pytest.mark.parametrize(("name", "digest"), [("scenes", "0358f8274ea276dc"), ("stories", "a75e33823e658947")])
def test_held_out_scenes_are_pinned(name, digest):
    """To the bit, captions and pixels: a figure on them can be compared with one of any earlier revision."""
    parts = [part for record in make_source(name, DATA, "heldout") for part in record]
    bits = b"".join(part.encode() if isinstance(part, str) else part.tobytes() for part in parts)
    assert hashlib.sha256(bits).hexdigest()[:16] == digest
