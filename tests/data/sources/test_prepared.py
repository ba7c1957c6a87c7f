"""Data from elsewhere is trained on, and never prepared over."""

import pytest

from tfusion.data.sources.prepared import PreparedSource
from tfusion.errors import UserError


def test_it_has_no_raw_records():
    source = PreparedSource("prepared", 0.5)
    for split in ("train", "heldout"):
        with pytest.raises(UserError, match=r"kind 'prepared' in data.sources has no raw records"):
            source.open(split, 32)
