"""How a document is laid out, by hand; and its sizes, by which rows are planned, are those of what is laid.

N patches per image, L positions of a document.
"""

import numpy as np
import pytest

from tfusion.data import layout
from tfusion.types import BOS, EOS, PAD, Document

VOCABULARY = layout.Vocabulary(text_vocab_size=20, num_patches=4)
LAYOUT, BOI, EOI = layout.latent_patches(VOCABULARY), 20, 21
PATCHES = [PAD] * 4


def image(value: float = 0.5):
    return layout.image(np.full((4, 4, 2), value, np.float32), 0.7)


def text(*ids: int):
    return layout.text(ids)


LAYOUTS = {  # parts, score_text -> tokens, image ids, scored positions
    "caption first": (
        [text(5, 6), image()], True,
        [BOS, 5, 6, BOI, *PATCHES, EOI, EOS],
        [0, 0, 0, 0, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 1, 0]),  # 6 predicts BOI; EOI predicts EOS
    "image first": (
        [image(), text(5, 6)], True,
        [BOS, BOI, *PATCHES, EOI, 5, 6, EOS],
        [0, 0, 1, 1, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 1, 1, 1, 0]),  # BOS predicts BOI; EOI predicts 5
    "two captioned images": (
        [text(5), image(1), text(7, 8), image(2)], True,
        [BOS, 5, BOI, *PATCHES, EOI, 7, 8, BOI, *PATCHES, EOI, EOS],
        [0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 2, 2, 2, 2, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0]),
    "two images side by side": (
        [image(1), image(2)], True,
        [BOS, BOI, *PATCHES, EOI, BOI, *PATCHES, EOI, EOS],
        [0, 0, 1, 1, 1, 1, 0, 0, 2, 2, 2, 2, 0, 0],
        [1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0]),  # the first EOI predicts the second BOI
    "dropped caption": (
        [image()], False,
        [BOS, BOI, *PATCHES, EOI, EOS],
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0]),
    "text only": (
        [text(5, 6, 7)], True,
        [BOS, 5, 6, 7, EOS],
        [0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0]),
    "empty": ([], True, [BOS, EOS], [0, 0], [1, 0]),
}


@pytest.mark.parametrize("parts, score, tokens, ids, scored", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layout_by_hand(parts, score, tokens, ids, scored):
    """DESIGN's rules: the token before BOI and EOI are scored; BOI, patches and the last position not."""
    example = LAYOUT.lay(Document(tuple(parts), score))
    np.testing.assert_array_equal(example.tokens_L, tokens)
    np.testing.assert_array_equal(example.image_ids_L, ids)
    np.testing.assert_array_equal(example.loss_mask_L, np.array(scored, bool))
    assert (example.tokens_L.dtype, example.image_ids_L.dtype) == (np.int32, np.int32)
    images = [part.values for part in parts if part.kind == "image"]
    assert len(example.latents_Ihwc) == len(example.max_t_I) == len(images)
    for got, expected in zip(example.latents_Ihwc, images):
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(example.max_t_I, np.full(len(images), 0.7, np.float32))


def as_laid(example):
    """What an example takes: (positions, scored, slots)."""
    return len(example.tokens_L), int(example.loss_mask_L.sum()), len(example.max_t_I)


@pytest.mark.parametrize("parts, score", [x[:2] for x in LAYOUTS.values()], ids=LAYOUTS.keys())
def test_sizes_by_hand(parts, score):
    words = sum(len(part.values) for part in parts if part.kind == "text")
    sizes = LAYOUT.sizes(words, sum(part.kind == "image" for part in parts))
    positions, scored, slots = as_laid(LAYOUT.lay(Document(tuple(parts), score)))
    assert (sizes.positions, sizes.slots) == (positions, slots) and sizes.scored * score == scored


@pytest.mark.parametrize("num_patches", [1, 4, 9])
def test_sizes_are_those_of_what_is_laid(num_patches):
    """Random documents: texts and images in any order, empty texts too; alone, and as arrays of records."""
    rng, made = np.random.default_rng(num_patches), []
    how = layout.latent_patches(layout.Vocabulary(20, num_patches))
    for _ in range(300):
        parts = tuple(image() if rng.random() < 0.4 else text(*rng.integers(4, 20, rng.integers(0, 7)))
                      for _ in range(rng.integers(0, 8)))
        texts = sum(len(part.values) for part in parts if part.kind == "text")
        images = sum(part.kind == "image" for part in parts)
        made.append((texts, images, *as_laid(how.lay(Document(parts)))))
        assert tuple(how.sizes(texts, images)) == made[-1][2:]
    texts, images, *laid = np.array(made).T
    assert images.max() > 3 and (texts == 0).any()
    np.testing.assert_array_equal(how.sizes(texts, images), laid)


@pytest.mark.parametrize("parts", [x[0] for x in LAYOUTS.values()], ids=LAYOUTS.keys())
def test_what_goes_on_begins_as_the_whole(parts):
    """A prompt is the document without its end: the same tokens, the same images."""
    tokens, image_ids = layout.begin(VOCABULARY, parts)
    whole = LAYOUT.lay(Document(tuple(parts)))
    np.testing.assert_array_equal([*tokens, EOS], whole.tokens_L)
    np.testing.assert_array_equal([*image_ids, 0], whole.image_ids_L)
    assert tokens.dtype == image_ids.dtype == np.int32


def test_specials_are_not_text():
    """BOI and EOI stand above every text id, and EOS closes the document."""
    assert (VOCABULARY.boi, VOCABULARY.eoi, VOCABULARY.vocab_size) == (20, 21, 22)
    assert {BOS, EOS, PAD} < set(range(VOCABULARY.text_vocab_size))


def test_each_image_has_its_own_limit():
    document = Document((image(), image()._replace(max_t=0.25), layout.image(np.zeros((4, 4, 2)))))
    np.testing.assert_array_equal(LAYOUT.lay(document).max_t_I, np.float32([0.7, 0.25, 1.0]))


# ---------------------------------------------------------------- codes

CODES = layout.codes(VOCABULARY._replace(num_codes=10))
GRID = np.array([[3, 0], [9, 9]], np.int32)
IDS = [25, 22, 31, 31]  # 20 text ids, BOI, EOI, then code 0
CODE_LAYOUTS = {  # parts, score_text -> tokens, image ids, scored positions
    "caption first": (
        [text(5, 6), layout.image(GRID)], True,
        [BOS, 5, 6, BOI, *IDS, EOI, EOS],
        [0, 0, 0, 0, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0, 1, 0]),  # BOI predicts the first code, the last one nothing, EOI EOS
    "image first": (
        [layout.image(GRID), text(5, 6)], True,
        [BOS, BOI, *IDS, EOI, 5, 6, EOS],
        [0, 0, 1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 1, 1, 1, 0]),
    "two images side by side": (
        [layout.image(GRID), layout.image(GRID[::-1])], True,
        [BOS, BOI, *IDS, EOI, BOI, *IDS[2:], *IDS[:2], EOI, EOS],
        [0, 0, 1, 1, 1, 1, 0, 0, 2, 2, 2, 2, 0, 0],
        [1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 0]),
    "dropped caption": (
        [layout.image(GRID)], False,
        [BOS, BOI, *IDS, EOI, EOS],
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 0, 0, 0]),  # codes alone
    "text only": ([text(5)], True, [BOS, 5, EOS], [0, 0, 0], [1, 1, 0]),
}


@pytest.mark.parametrize("parts, score, tokens, ids, scored", CODE_LAYOUTS.values(), ids=CODE_LAYOUTS.keys())
def test_codes_by_hand(parts, score, tokens, ids, scored):
    example = CODES.lay(Document(tuple(parts), score))
    np.testing.assert_array_equal(example.tokens_L, tokens)
    np.testing.assert_array_equal(example.image_ids_L, ids)
    np.testing.assert_array_equal(example.loss_mask_L, np.array(scored, bool))
    images = sum(part.kind == "image" for part in parts)
    assert example.latents_Ihwc.shape == (images, 0, 0, 0) and example.max_t_I.tolist() == [0] * images
    begun, _ = layout.begin(VOCABULARY._replace(num_codes=10), parts)
    np.testing.assert_array_equal([*begun, EOS], tokens)


def test_sizes_of_codes_are_those_of_what_is_laid():
    """Captions dropped too: what is scored of them is their codes."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        parts = tuple(layout.image(rng.integers(0, 10, (2, 2))) if rng.random() < 0.4
                      else text(*rng.integers(4, 20, rng.integers(0, 7))) for _ in range(rng.integers(0, 8)))
        words = sum(len(part.values) for part in parts if part.kind == "text")
        images = sum(part.kind == "image" for part in parts)
        assert tuple(CODES.sizes(words, images)) == as_laid(CODES.lay(Document(parts)))
        alone = tuple(part for part in parts if part.kind == "image")
        dropped = as_laid(CODES.lay(Document(alone, score_text=False)))
        assert dropped == (2 + 6 * images, 4 * images, images)
        assert CODES.sizes(0, images).positions == dropped[0]
