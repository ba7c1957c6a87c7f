"""The mask: DESIGN's words = the dense definition = the key intervals that attention is given.

B rows, T positions.
"""

import numpy as np
import pytest

from tfusion.models.masks import dense_mask, key_intervals

MODES = ("bidirectional", "causal")
T = 40


def random_document(rng) -> list[int]:
    """Piece lengths of one document: +n is n text positions, -n an image of n patches.

    Any order, so images stand at either end and side by side with nothing between.
    """
    sizes = rng.integers(1, 6, rng.integers(1, 6))
    return [int(n) * int(rng.choice([-1, 1])) for n in sizes]


def lay_out(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(segment ids, image ids) of one row of T positions: documents in order, cut at T, then padding."""
    segments, images, image = [], [], 0
    for number, document in enumerate(documents, start=1):
        for piece in document:
            image += piece < 0
            segments += [number] * abs(piece)
            images += [image if piece < 0 else 0] * abs(piece)
    padding = [0] * T
    return np.array((segments + padding)[:T], np.int32), np.array((images + padding)[:T], np.int32)


def random_packing(seed: int, rows: int = 8):
    rng = np.random.default_rng(seed)
    return tuple(np.stack(ids) for ids in zip(*(
        lay_out([random_document(rng) for _ in range(rng.integers(0, 7))]) for _ in range(rows))))


NAMED = {
    "all padding": [],
    "text only": [[T]],
    "image at row start": [[-5, 3]],
    "image at row end": [[T - 4, -4]],
    "one image fills the row": [[-T]],
    "adjacent images": [[2, -3, -4, -3, 1]],
    "adjacent one-patch images": [[1, -1, -1, -1, 1]],
    "images meet at a document's border": [[2, -3], [-3, 2]],
    "one-position documents": [[1]] * T,
    "one-patch documents": [[-1]] * (T - 5),
    "padding after an image": [[1, -6]],
}


def naive_mask(segments, images, image_attention: str):
    """DESIGN's sentence, position by position: causal, plus full attention inside each image, never
    across documents; padding sees only itself."""
    mask = np.zeros((len(segments), T, T), bool)
    for row, q, k in np.ndindex(*mask.shape):
        if segments[row, q] == 0:
            mask[row, q, k] = q == k
        elif segments[row, q] == segments[row, k]:
            in_one_image = images[row, q] != 0 and images[row, q] == images[row, k]
            mask[row, q, k] = k <= q or (image_attention == "bidirectional" and in_one_image)
    return mask


def interval_mask(segments, images, image_attention: str):
    k_start, k_end = (np.asarray(x) for x in key_intervals(segments, images, image_attention))
    keys = np.arange(T)
    return (k_start[..., None] <= keys) & (keys < k_end[..., None])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(8))
def test_dense_mask_is_the_designs_sentence(seed, mode):
    segments, images = random_packing(seed)
    np.testing.assert_array_equal(dense_mask(segments, images, mode), naive_mask(segments, images, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(100, 140))
def test_intervals_are_the_dense_mask(seed, mode):
    segments, images = random_packing(seed)
    np.testing.assert_array_equal(interval_mask(segments, images, mode), dense_mask(segments, images, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("documents", NAMED.values(), ids=NAMED.keys())
def test_named_packings(documents, mode):
    segments, images = (ids[None] for ids in lay_out(documents))
    expected = naive_mask(segments, images, mode)
    np.testing.assert_array_equal(dense_mask(segments, images, mode), expected)
    np.testing.assert_array_equal(interval_mask(segments, images, mode), expected)


@pytest.mark.parametrize("mode", MODES)
def test_every_query_sees_itself(mode):
    """Attention relies on it: no row of the softmax is empty."""
    k_start, k_end = (np.asarray(x) for x in key_intervals(*random_packing(0, rows=64), mode))
    own = np.arange(T)
    assert ((k_start >= 0) & (k_start <= own) & (own < k_end) & (k_end <= T)).all()


def test_bidirectional_is_the_default():
    packing = random_packing(1)
    for default, named in zip(key_intervals(*packing), key_intervals(*packing, "bidirectional")):
        np.testing.assert_array_equal(default, named)
    np.testing.assert_array_equal(dense_mask(*packing), dense_mask(*packing, "bidirectional"))


def test_random_packings_reach_the_hard_cases():
    """The generator makes what the property tests are about, so they cannot pass by an easy draw."""
    segments, images = (np.concatenate(ids) for ids in zip(*map(random_packing, range(100, 140))))
    adjacent = (images[:, 1:] != images[:, :-1]) & (images[:, 1:] > 0) & (images[:, :-1] > 0)
    one_patch = [np.sum(row == k) == 1 for row in images for k in range(1, row.max() + 1)]
    assert (adjacent & (segments[:, 1:] == segments[:, :-1])).sum() > 50
    assert (adjacent & (segments[:, 1:] != segments[:, :-1])).sum() > 50
    assert sum(one_patch) > 50
    assert (images[:, 0] > 0).sum() > 20 and (images[:, -1] > 0).sum() > 20
    assert (segments == 0).all(axis=1).sum() > 5 and segments.max() >= 5
