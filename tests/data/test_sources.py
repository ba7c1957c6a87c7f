"""The mix of scenes: changed for training, the held-out ones stay as they were."""

import collections
import hashlib

import pytest

from experiments import quickstart
from tfusion import config
from tfusion.data.sources import TRAIN_MIX, make_source

DATA = config.from_dict(quickstart.get_config()).data


@pytest.mark.parametrize(("name", "digest"), [("scenes", "0358f8274ea276dc"), ("stories", "a75e33823e658947")])
def test_held_out_scenes_are_pinned(name, digest):
    """To the bit, captions and pixels: a figure on them can be compared with one of any earlier revision."""
    parts = [part for record in make_source(name, DATA, "heldout") for part in record]
    bits = b"".join(part.encode() if isinstance(part, str) else part.tobytes() for part in parts)
    assert hashlib.sha256(bits).hexdigest()[:16] == digest


@pytest.mark.parametrize("name", ["scenes", "stories"])
def test_training_shows_two_of_a_kind_more_often(name):
    source = make_source(name, DATA, "train")
    counts = collections.Counter(s.relation for record in range(2000) for s in source.scenes(record))
    single, two = TRAIN_MIX
    pairs = (100 - single - two) / 2
    for relation, percent in {"": single, "two": two, "left of": pairs, "above": pairs}.items():
        assert counts[relation] / counts.total() == pytest.approx(percent / 100, abs=0.04)
