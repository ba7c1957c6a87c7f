"""Per-document choices: the keyed coins, and how parts are arranged."""

import dataclasses

import numpy as np
import pytest

from tfusion.data import layout, transforms
from tfusion.data.transforms import keyed_uniform

MASK = 2**64 - 1
N = 20_000


def splitmix64_chain_state(*keys: int) -> int:
    """The hash in plain Python integers (splitmix64's finaliser, each key xored into the state)."""
    state = 0
    for key in keys:
        z = ((state ^ (key & MASK)) + 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        state = z ^ (z >> 31)
    return state


def splitmix64_chain(*keys: int) -> float:
    return (splitmix64_chain_state(*keys) >> 11) / 2**53


@pytest.mark.parametrize("keys", [(0,), (0, 1, 2, 3, 1), (17, 0, 5, 123_456, 2), (2**31, 9)])
def test_keyed_uniform_is_its_hash(keys):
    """Pinned to the bit: a coin must fall the same in every later version, or a resumed run changes."""
    assert float(keyed_uniform(*keys)) == splitmix64_chain(*keys)


def test_keyed_uniform_is_pinned():
    assert float(keyed_uniform(0)) == 0.8833108082136426  # splitmix64's first output from seed 0, 0xe220a8...
    assert float(keyed_uniform(np.int64(0))) == float(keyed_uniform(0))


@pytest.mark.parametrize("place", range(5))
def test_keyed_uniform_is_uniform_along_every_key(place):
    """Kolmogorov-Smirnov distance below its 0.1 % critical value, for neighbouring integers as key."""
    keys = [3, 1, 0, 7, 2]
    keys[place] = np.arange(N)
    u = np.sort(keyed_uniform(*keys))
    distance = np.abs(u - (np.arange(N) + 0.5) / N).max()
    assert u[0] >= 0 and u[-1] < 1 and distance < 1.95 / np.sqrt(N)


@pytest.mark.parametrize("place", range(5))
def test_neighbouring_keys_are_independent(place):
    """Streams that differ by one in any key, and a stream against itself moved by one record."""
    keys, other = [3, 1, 0, np.arange(N), 2], [3, 1, 0, np.arange(N), 2]
    other[place] = other[place] + 1
    a, b = keyed_uniform(*keys), keyed_uniform(*other)
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(N)
    joint = np.histogram2d(a, b, bins=4, range=[[0, 1], [0, 1]])[0] / N
    np.testing.assert_allclose(joint, 1 / 16, atol=0.008)


def test_order_of_keys_matters():
    assert float(keyed_uniform(1, 2)) != float(keyed_uniform(2, 1))
    assert float(keyed_uniform(0, 1)) != float(keyed_uniform(1))


def test_arrays_are_their_elements():
    """Planning a window at once and reading one document alone must see the same coin."""
    epochs, records = np.arange(6).reshape(2, 3), np.array([5, 0, 9])
    together = keyed_uniform(4, 1, epochs, records, 2)
    for (i, j), epoch in np.ndenumerate(epochs):
        assert together[i, j] == float(keyed_uniform(4, 1, int(epoch), int(records[j]), 2))


def data(cfg, **changes):
    return dataclasses.replace(cfg.data, **changes)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
def test_coins_fall_in_their_fractions(cfg, fraction):
    choices = data(cfg, caption_dropout=fraction, image_first_fraction=fraction)
    for coin in (transforms.drops_caption, transforms.puts_image_first):
        share = coin(choices, 0, 1, 0, np.arange(N)).mean()
        assert share == fraction if fraction in (0, 1) else abs(share - fraction) < 0.02


def test_the_two_coins_are_independent_and_change_with_the_epoch(cfg):
    choices = data(cfg, caption_dropout=0.5, image_first_fraction=0.5)
    drop, again = (transforms.drops_caption(choices, 0, 1, epoch, np.arange(N)) for epoch in (0, 1))
    first = transforms.puts_image_first(choices, 0, 1, 0, np.arange(N))
    for other in (first, again):
        assert abs((drop & other).mean() - 0.25) < 0.02


def text(*ids):
    return layout.text(ids)


A, B = (layout.image(np.full((2, 2, 1), value, np.float32)) for value in (1.0, 2.0))
ONE, TWO, WORDS = [text(5), A], [text(5), A, text(6, 7), B], [text(5, 6)]
ARRANGED = {  # parts, drop caption, image first -> parts, max_t, score_text
    "as it is": (TWO, False, False, TWO, 1.0, True),
    "image first": (ONE, False, True, [A, text(5)], 0.25, True),
    "each image before its own caption": (TWO, False, True, [A, text(5), B, text(6, 7)], 0.25, True),
    "a caption goes before no second picture": ([text(5), A, B], False, True, [A, text(5), B], 0.25, True),
    "of two texts the nearer": ([text(5), text(6), A], False, True, [text(5), A, text(6)], 0.25, True),
    "caption dropped": (ONE, True, False, [A], 1.0, False),
    "all captions dropped": (TWO, True, False, [A, B], 1.0, False),
    "dropped wins over image first": (ONE, True, True, [A], 1.0, False),
    "text alone": (WORDS, False, False, WORDS, 1.0, True),
    "text alone is never dropped": (WORDS, True, True, WORDS, 1.0, True),
}


@pytest.mark.parametrize("parts, drop, first, expected, max_t, score", ARRANGED.values(), ids=ARRANGED.keys())
def test_arrange(parts, drop, first, expected, max_t, score):
    before = list(parts)
    document = transforms.arrange(parts, drop, first, 0.25)
    assert len(document.parts) == len(expected)
    assert all(got.kind == want.kind and np.array_equal(got.values, want.values)
               for got, want in zip(document.parts, expected))
    assert all(part.max_t == (max_t if part.kind == "image" else 1.0) for part in document.parts)
    assert document.score_text is score
    assert len(parts) == len(before) and all(x is y for x, y in zip(parts, before))  # not changed in place


# Documents of one picture that are `<bos> <boi> patches ...`, so that the picture is denoised from nothing:
# of all, and of those with t above and below 0.5. docs/recipe.md, 1, quotes them.
UNCONDITIONAL = {  # caption_dropout, image_first_max_t -> shares
    (0.1, 1.0): (0.28, 0.28, 0.28), (0.1, 0.5): (0.28, 0.122, 0.390),
    (0.0, 1.0): (0.20, 0.20, 0.20), (0.0, 0.5): (0.20, 0.0, 1 / 3)}


@pytest.mark.parametrize(("dropout", "limit"), UNCONDITIONAL)
def test_unconditional_share_of_documents_with_one_image(cfg, dropout, limit):
    choices, record = data(cfg, caption_dropout=dropout, image_first_fraction=0.2), np.arange(N)
    drops = transforms.drops_caption(choices, 0, 1, 0, record)
    first = transforms.puts_image_first(choices, 0, 1, 0, record)
    documents = [transforms.arrange(ONE, *coins, limit) for coins in zip(drops.tolist(), first.tolist())]
    alone = np.array([document.parts[0].kind == "image" for document in documents])
    limits = np.array([part.max_t for document in documents for part in document.parts if part.kind == "image"])
    above = 1 - np.minimum(0.5 / limits, 1)  # P(t > 0.5)
    shares = alone.mean(), (alone * above).sum() / above.sum(), (alone * (1 - above)).sum() / (1 - above).sum()
    np.testing.assert_allclose(shares, UNCONDITIONAL[dropout, limit], atol=0.015)
