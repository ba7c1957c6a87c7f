"""The embedded sources stay as they are."""

import hashlib

import pytest

from tfusion.data.sources.embedded import GlossesSource, ScenesSource, StoriesSource
from tfusion.errors import UserError

SCENES = ScenesSource("scenes", 0.66, 32_000, 24, 1)
STORIES = StoriesSource("stories", 0.22, 8000, 24, 1)


def digest_of(records) -> str:
    parts = [part for record in records for part in record]
    bits = b"".join(part.encode() if isinstance(part, str) else part.tobytes() for part in parts)
    return hashlib.sha256(bits).hexdigest()[:16]


@pytest.mark.parametrize(("spec", "digest"), [(SCENES, "0358f8274ea276dc"), (STORIES, "a75e33823e658947")],
                         ids=["scenes", "stories"])
def test_held_out_scenes_are_pinned(spec, digest):
    """To the bit, captions and pixels: a figure on them can be compared with one of any earlier revision."""
    assert digest_of(spec.open("heldout", 32)) == digest


@pytest.mark.parametrize(("spec", "digest"), [
    (SCENES, "32000 df3750ac395b95ac"), (STORIES, "8000 386aff3645844ab8"),
    (GlossesSource("glosses", 0.1), "115225 e4bf55094979b50a")], ids=["scenes", "stories", "glosses"])
def test_training_records_are_pinned(spec, digest):
    """Their number, and the first and last thousand of them."""
    source = spec.open("train", None)
    ends = [*range(1000), *range(len(source) - 1000, len(source))]
    assert f"{len(source)} {digest_of(source[i] for i in ends)}" == digest


def test_a_world_that_cannot_be_is_one_line():
    with pytest.raises(UserError, match=r"x.num_sprites = 3, x.jitter = 1: .*choose 8 to"):
        ScenesSource("scenes", 1.0, 10, 3, 1).check("x")


def labels_of(source) -> set:
    return {(s.relation, s.nouns, s.canvas) for record in range(len(source)) for s in source.scenes(record)}


@pytest.fixture(scope="module")
def labels() -> dict:
    sources = {"scenes": ScenesSource("scenes", 1.0, 400, 24, 1),
               "stories": StoriesSource("stories", 1.0, 100, 24, 1)}
    return {(name, split): labels_of(source.open(split)) for name, source in sources.items()
            for split in ("train", "heldout")}


@pytest.mark.parametrize("name", ["scenes", "stories"])
def test_held_out_scenes_are_never_in_train(labels, name):
    """By their labels (relation, nouns, canvas), not by their pixels."""
    train, heldout = labels[name, "train"], labels[name, "heldout"]
    assert len(train) > 100 and len(heldout) > 100 and not train & heldout


def test_held_out_scenes_are_the_same_combinations_for_both_sources(labels):
    """A story must not show what the scenes keep back."""
    assert not labels["scenes", "heldout"] & labels["stories", "train"]
    assert not labels["stories", "heldout"] & labels["scenes", "train"]


def test_held_out_glosses_are_never_in_train():
    train, heldout = ({text for (text,) in GlossesSource("glosses", 1.0).open(s)} for s in ("train", "heldout"))
    assert heldout and not train & heldout
    assert 0.01 < len(heldout) / len(train | heldout) < 0.03
