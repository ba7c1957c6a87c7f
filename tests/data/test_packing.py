"""Packing: the plan's invariants on random windows, rows by hand, and what check_batch refuses.

T positions, I image slots, N patches per image.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import ablations
from tfusion import config
from tfusion.data import config as data_config
from tfusion.data import layout, mixture, packing
from tfusion.errors import UserError
from tfusion.types import BOS, EOS, PAD, Example

T, I, ROWS = 64, 3, 20


def candidates(*sources):
    """Of (lengths, images) for each source: records 0, 1, ... in epoch 0."""
    made = [(np.full(len(lengths), s), np.zeros(len(lengths), int), np.arange(len(lengths)),
             np.zeros(len(lengths), int), np.asarray(lengths), np.broadcast_to(images, len(lengths)))
            for s, (lengths, images) in enumerate(sources)]
    return packing.Candidates(*map(np.concatenate, zip(*made)))


def random_candidates(seed: int, documents: int = 120):
    """Two sources: pictures of 9..38 positions with 1..3 images, and text of 2..64 positions."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(1, 4, documents)
    lengths = 8 + pictures * rng.integers(1, 11, documents)
    return candidates((lengths, pictures), (rng.integers(2, T + 1, documents), 0))


def pack(seed: int = 0, window: int = 0, offered=None, num_slots: int = I):
    return packing.pack(seed, window, offered or random_candidates(0), ROWS, T, num_slots)


def plan(seed: int = 0, window: int = 0, offered=None, before=None, num_slots: int = I):
    return packing.plan(seed, window, pack(seed, window, offered, num_slots), before)


def used(offered, rows) -> np.ndarray:
    """(positions, images) that planned rows take, (R, 2)."""
    sizes = {name: size for name, *size in zip(offered.named(slice(None)), offered.lengths, offered.images)}
    return np.array([np.sum([[0, 0], *(sizes[document] for document in row)], axis=0) for row in rows])


@pytest.mark.parametrize("seed", range(20))
def test_rows_keep_to_positions_and_slots(seed):
    offered = random_candidates(seed)
    made = plan(seed, 1, offered)
    taken = used(offered, made.rows)
    assert len(made.rows) == ROWS and (taken <= (T, I)).all() and taken[:, 0].sum() == made.num_positions


@pytest.mark.parametrize("seed", range(20))
def test_only_what_fits_nowhere_is_left(seed):
    """First-fit: at the end no row has room for any document that is left, in positions and slots; what is free
    is what is told."""
    own = pack(seed, 0, random_candidates(seed))
    placed, left = own.offered.take(own.rows >= 0), own.left
    assert len(left.lengths) > 0 and sorted(placed.named(slice(None)) + left.named(slice(None))) == sorted(
        own.offered.named(slice(None)))
    for free, whole, sizes in ((own.room, T, placed.lengths), (own.slots, I, placed.images)):
        np.testing.assert_array_equal(
            free, whole - np.bincount(own.rows[own.rows >= 0], sizes, minlength=ROWS).astype(int))
    for length, images in zip(left.lengths, left.images):
        assert not ((own.room >= length) & (own.slots >= images)).any()


@pytest.mark.parametrize("seed", range(4))
def test_every_document_in_its_window_or_the_next_or_dropped(seed):
    """A brute-force account of 40 windows, some with too much on offer and some with too little: what is
    placed, when, and what is told to be dropped."""
    rng = np.random.default_rng(seed)
    owns, plans, when = [], [], {}
    for window in range(40):
        offered = random_candidates(1000 * seed + window, int(rng.integers(20, 60)))
        offered = offered._replace(epochs=np.full(len(offered.epochs), window))
        owns.append(pack(seed, window, offered))
        plans.append(packing.plan(seed, window, owns[-1], owns[-2] if window else None))
        for row in plans[-1].rows:
            for document in row:
                assert document not in when
                when[document] = window
    again = 0
    for window in range(39):
        named = owns[window].offered.named(slice(None))
        late = [when.get(document) for document in named]
        assert set(late) <= {window, window + 1, None}
        again += late.count(window + 1)
        gone = np.bincount([document[0] for document, at in zip(named, late) if at is None], minlength=2)
        np.testing.assert_array_equal(np.bincount(plans[window + 1].dropped, minlength=2), gone)
        two = owns[window].offered, owns[window + 1].offered
        both = packing.Candidates(*map(np.concatenate, zip(*two)))
        taken = used(both, plans[window + 1].rows)
        assert (taken <= (T, I)).all() and taken[:, 0].sum() == plans[window + 1].num_positions
        left = [(length, images) for length, images, at in zip(
            owns[window].offered.lengths, owns[window].offered.images, late) if at is None]
        assert not any((([T, I] - taken) >= size).all(axis=1).any() for size in left)
    assert again > 10 and not len(plans[0].dropped)


def test_what_is_left_displaces_nothing():
    """The window's own documents stand where they stand without it."""
    before = pack(0, 0, random_candidates(1))
    alone, both = plan(0, 1), plan(0, 1, before=before)
    assert all(row[: len(own)] == own for own, row in zip(alone.rows, both.rows))


def test_slots_alone_can_be_the_limit():
    """Twenty one-image documents of 10 positions: with one slot a row holds one, not six."""
    own = pack(0, 0, candidates((np.full(40, 10), 1)), num_slots=1)
    assert sorted(own.rows.tolist()) == [-1] * 20 + list(range(ROWS))


def test_plan_is_pure():
    """The same twice; another for another window or seed."""
    assert plan(3, 5).rows == plan(3, 5).rows
    assert plan(3, 5).rows != plan(3, 6).rows
    assert plan(3, 5).rows != plan(4, 5).rows


def test_plan_ignores_global_randomness():
    np.random.seed(0)
    first = plan(1, 1)
    np.random.seed(1)
    assert plan(1, 1).rows == first.rows


def test_rows_are_shuffled():
    """First-fit fills the early rows first; the run must not see a window go from full to sparse."""
    counts = [len(row) for row in plan(0, 0, candidates((np.full(60, 16), 0))).rows]
    assert sorted(counts, reverse=True) == [4] * 15 + [0] * 5 != counts


def test_documents_of_one_length_meet_by_chance():
    """Not in the order of the records."""
    rows = plan(0, 0, candidates((np.full(80, 16), 0))).rows
    assert sum(abs(a[2] - b[2]) == 1 for row in rows for a, b in itertools.pairwise(row)) < 10


@pytest.mark.parametrize("slots", [128, 4], ids=["positions", "slots"])
def test_what_is_dropped_is_left_to_chance(slots):
    """With 3 % too much on offer, in positions or in slots, small documents are dropped as often as large ones:
    captions dropped for guidance make small documents, and must stay as many as they should be."""
    rng, before, dropped, offered = np.random.default_rng(0), None, np.zeros(3), np.zeros(3)
    mean = 20 if slots == 4 else 33
    for window in range(20):
        lengths = rng.integers(mean - 15, mean + 16, round(1.03 * 256 * min(128 / mean, slots)))
        size = np.digitize(lengths, [mean - 11, mean + 12])  # a tenth, the middle, a tenth
        own = packing.pack(0, window, candidates(*((lengths[size == i], 1) for i in range(3))), 256, 128, slots)
        if before is not None:
            dropped += np.bincount(packing.plan(0, window, own, before).dropped, minlength=3)
            offered += np.bincount(before.offered.sources, minlength=3)
        before = own
    share = dropped.sum() / offered.sum()
    assert 0.015 < share < 0.06 and (abs(dropped / offered / share - 1) < 0.5).all()


def test_nothing_on_offer():
    made = plan(0, 0, candidates(([], 0)), pack(0, 0, candidates(([], 0))))
    assert made.rows == [[]] * ROWS and made.num_positions == 0 and not len(made.dropped)


def sampled(rng, kind: str, number: int):
    """(lengths, images) of documents as data sets have them, for rows of 128 or 4096."""
    if kind == "texts":  # of 900 tokens on average, lognormal, the long ones in pieces
        texts = np.exp(rng.normal(np.log(900) - 0.5, 1.0, number)).astype(int) + 2
        return np.concatenate([np.full(np.sum((texts - 1) // 4095), 4096), (texts - 1) % 4095 + 1]), 0
    captions = np.exp(rng.normal(np.log(30) - 0.2, 0.6, number)).astype(int) * (rng.random(number) > 0.1)
    return {"pairs": (captions + 256 + 4, 1),  # with 256 patches each
            "small pairs": (rng.gamma(5, 1.6, number).astype(int) + 20, 1),
            "small stories": (rng.gamma(8, 3, number).astype(int) + 38, 2),
            "small texts": (np.minimum(2 + rng.gamma(4, 6, number).astype(int), 128), 0)}[kind]


MIXTURES = {  # T, I, {kind: share}, the least share of a window's rows that is filled
    "texts and pairs": (4096, 10, {"texts": 0.5, "pairs": 0.5}, 0.985),
    "few pairs": (4096, 2, {"texts": 0.9, "pairs": 0.1}, 0.99),
    "many pairs": (4096, 15, {"texts": 0.1, "pairs": 0.9}, 0.975),
    "texts": (4096, 0, {"texts": 1.0}, 0.99),
    "small": (128, 5, {"small texts": 0.12, "small pairs": 0.66, "small stories": 0.22}, 0.965)}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_rows_are_full(mixture):
    """Windows of 512 rows with as many positions on offer as they have, 2 % more or 2 % less by turns: by their
    own packing, and where little is on offer by what the last one left."""
    seq_len, slots, shares, least = MIXTURES[mixture]
    rng, before, fills = np.random.default_rng(0), None, []
    for window, much in enumerate((1.0, 1.02, 0.98, 1.0)):
        sources = []
        for kind, share in shares.items():
            lengths, images = sampled(rng, kind, round(512 * seq_len / 20 if kind != "texts" else 5000))
            lengths = rng.permutation(lengths)
            number = np.searchsorted(np.cumsum(lengths), share * much * 512 * seq_len)
            sources.append((lengths[:number], images))
        own = packing.pack(0, window, candidates(*sources), 512, seq_len, slots)
        made = packing.plan(0, window, own, before)
        room = 512 * seq_len
        filled = room - own.room.sum()
        fills.append((filled / min(room, own.offered.lengths.sum()), made.num_positions / room))
        before = own
    assert (np.array(fills[1:]) >= least).all()


@pytest.mark.parametrize("variant", ["patch1", "patch2", "patch4", "patch8", "text_only"])
def test_rows_of_the_presets_are_full(variant):
    """Texts of 900 tokens on average (lognormal, sigma 1; the long ones in pieces) beside pairs with captions
    of 30: whatever the patch size, slots are no limit worth speaking of."""
    cfg = config.from_dict(ablations.get_config(variant))
    rng, T = np.random.default_rng(0), cfg.data.seq_len
    texts = np.exp(rng.normal(np.log(900) - 0.5, 1.0, 20_000)).astype(int) + 2
    texts = np.concatenate([np.full(np.sum((texts - 1) // (T - 1)), T), (texts - 1) % (T - 1) + 1])
    captions = np.exp(rng.normal(np.log(30) - 0.2, 0.6, 20_000)).astype(int) * (rng.random(20_000) > 0.1)
    sizes = {"text": (texts, 0), "images": (captions + cfg.model.num_patches + 4, 1)}
    shares = data_config.shares(cfg.data.sources)
    names = list(shares)
    counts = mixture.records_per_window(
        shares.values(), [sizes[name][0].mean() for name in names], cfg.data.window_rows, T)
    offered = candidates(*((rng.choice(sizes[name][0], round(count)), sizes[name][1])
                           for name, count in zip(names, counts)))
    own = packing.pack(0, 0, offered, cfg.data.window_rows, T, cfg.rows.image_slots)
    room = cfg.data.window_rows * T
    assert room - own.room.sum() > 0.97 * min(room, offered.lengths.sum())


VOCABULARY = layout.Vocabulary(20, 2)


def row_format(seq_len: int = 20, slots: int = 4) -> data_config.RowFormat:
    """So many positions and image slots; latents of (2, 2, 1)."""
    data = SimpleNamespace(seq_len=seq_len, image_slots=lambda num_patches: slots)
    return data_config.RowFormat(data, VOCABULARY, (2, 2, 1), layout.latent_patches(VOCABULARY))


def example(tokens, ids, max_t=1.0):
    """Latents are told apart by their value: 100 * first token + image number."""
    ids = np.array(ids, np.int32)
    images = [np.full((2, 2, 1), 100 * tokens[1] + k, np.float32) for k in range(1, ids.max() + 1)]
    mask = np.array([i == 0 for i in ids[:-1]] + [False])
    return Example(np.array(tokens, np.int32), ids, mask,
                   np.array(images, np.float32).reshape(-1, 2, 2, 1), np.full(len(images), max_t, np.float32))


FIRST = example([BOS, 7, 20, PAD, PAD, 21, EOS], [0, 0, 0, 1, 1, 0, 0], max_t=0.5)
TEXT = example([BOS, 9, EOS], [0, 0, 0])
SECOND = example([BOS, 8, PAD, PAD, PAD, PAD, EOS], [0, 0, 1, 1, 2, 2, 0])


def test_pack_row_by_hand():
    """Documents end to end; image ids run on through the row, positions start again, padding is empty."""
    row = packing.pack_row(77, [FIRST, TEXT, SECOND], row_format())
    assert int(row.row_ids_B) == 77
    np.testing.assert_array_equal(
        row.tokens_BT, [BOS, 7, 20, 0, 0, 21, EOS, BOS, 9, EOS, BOS, 8, 0, 0, 0, 0, EOS, 0, 0, 0])
    np.testing.assert_array_equal(row.segment_ids_BT, [1] * 7 + [2] * 3 + [3] * 7 + [0] * 3)
    np.testing.assert_array_equal(
        row.image_ids_BT, [0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 2, 2, 3, 3, 0, 0, 0, 0])
    np.testing.assert_array_equal(row.positions_BT, [*range(7), *range(3), *range(7), 0, 0, 0])
    np.testing.assert_array_equal(row.image_start_BI, [3, 12, 14, 20])  # 20 = T: unused
    np.testing.assert_array_equal(row.max_t_BI, np.float32([0.5, 1, 1, 0]))
    np.testing.assert_array_equal(row.latents_BIhwc[:, 0, 0, 0], [701, 801, 802, 0])
    np.testing.assert_array_equal(row.noise_ids_BI2, [[77, 0], [77, 1], [77, 2], [77, 3]])
    np.testing.assert_array_equal(
        row.loss_mask_BT[:17], np.concatenate([e.loss_mask_L for e in (FIRST, TEXT, SECOND)]))


def test_no_position_is_scored_on_another_document_or_padding():
    row = packing.pack_row(0, [FIRST, TEXT, SECOND], row_format())
    scored = np.flatnonzero(row.loss_mask_BT)
    assert (row.segment_ids_BT[scored] == row.segment_ids_BT[scored + 1]).all()
    assert (row.segment_ids_BT[scored] > 0).all()


def test_empty_row_is_padding():
    row = packing.pack_row(3, [], row_format(8, 2))
    assert not row.segment_ids_BT.any() and not row.loss_mask_BT.any() and not row.max_t_BI.any()
    assert (row.image_start_BI == 8).all()


def test_stacked_rows_have_the_contracts_shapes_and_dtypes():
    rows = [packing.pack_row(i, [FIRST, TEXT], row_format()) for i in range(3)]
    batch = packing.stack_rows(rows)
    expected = {
        "row_ids_B": ((3,), np.int32), "tokens_BT": ((3, 20), np.int32), "segment_ids_BT": ((3, 20), np.int32),
        "image_ids_BT": ((3, 20), np.int32), "positions_BT": ((3, 20), np.int32),
        "loss_mask_BT": ((3, 20), np.bool_), "latents_BIhwc": ((3, 4, 2, 2, 1), np.float32),
        "image_start_BI": ((3, 4), np.int32), "max_t_BI": ((3, 4), np.float32),
        "noise_ids_BI2": ((3, 4, 2), np.uint32)}
    assert {name: (x.shape, x.dtype) for name, x in batch._asdict().items()} == expected


def good_batch():
    return packing.stack_rows([packing.pack_row(i, [FIRST, TEXT], row_format()) for i in (40, 41)])


def test_check_batch_accepts_what_pack_row_makes():
    assert good_batch().loss_mask_BT.sum(axis=1).tolist() == [6, 6]
    packing.check_batch(good_batch(), VOCABULARY)


def edited(field: str, row: int, position: int, value):
    batch = good_batch()
    getattr(batch, field)[row, position] = value
    return batch


BAD = {  # batch, the message's parts
    "scored on the next document": (
        edited("loss_mask_BT", 1, 6, True), ("row 41, position 6", "document's end")),
    "scored in padding": (edited("loss_mask_BT", 1, 12, True), ("row 41, position 12", "document's end")),
    "scored at the row's end": (edited("loss_mask_BT", 0, 19, True), ("row 40, position 19", "document's end")),
    "token id out of range": (edited("tokens_BT", 1, 5, 22), ("row 41, position 5", "token id 22", "0..21")),
    "negative token id": (edited("tokens_BT", 0, 2, -1), ("row 40, position 2", "token id -1")),
    "patch in padding": (edited("image_ids_BT", 1, 15, 1), ("row 41, position 15", "padding")),
    "image id without its patches": (
        edited("image_ids_BT", 1, 8, 2), ("row 41, position 8", "image id 2", "without its patches")),
    "slot without its image ids": (edited("image_ids_BT", 0, 4, 0), ("row 40, position 4", "image id 0")),
    "slot moved by one": (edited("image_start_BI", 0, 0, 4), ("row 40, position 3", "image id 1")),
    "patches under another slot": (edited("image_start_BI", 1, 1, 3), ("row 41, position 3", "image id 1")),
}


@pytest.mark.parametrize("batch, parts", BAD.values(), ids=BAD.keys())
def test_check_batch_names_row_and_position(batch, parts):
    with pytest.raises(UserError) as error:
        packing.check_batch(batch, VOCABULARY)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)
