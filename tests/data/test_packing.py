"""Packing: the plan's invariants on random windows, rows by hand, and what check_batch refuses.

T positions, I image slots, N patches per image.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from experiments import ablations
from tfusion import config
from tfusion.data import config as data_config
from tfusion.data import layout, packing
from tfusion.errors import UserError
from tfusion.types import BOS, EOS, PAD, Example

T, I, ROWS = 64, 3, 20


def random_candidates(seed: int, documents: int = 120):
    """Two sources: pictures of 9..38 positions with 1..3 images, and text of 2..64 positions."""
    rng = np.random.default_rng(seed)

    def source(lengths, images):
        n = len(lengths)
        return packing.Candidate(rng.integers(0, 3, n), np.arange(n), np.zeros(n, int), lengths, images)

    pictures = rng.integers(1, 4, documents)
    lengths, texts = 8 + pictures * rng.integers(1, 11, documents), rng.integers(2, T + 1, documents)
    return [source(lengths, pictures), source(texts, np.zeros(documents, int))]


def candidate(lengths, images):
    """Of records 0, 1, ... in epoch 0."""
    n = len(lengths)
    return packing.Candidate(np.zeros(n, int), np.arange(n), np.zeros(n, int), lengths, images)


def sizes(candidates, document):
    """(positions in a row, images) of a planned (source, epoch, record)."""
    source, epoch, record, _ = document
    c = candidates[source]
    assert c.epochs[record] == epoch and c.records[record] == record
    return c.lengths[record], c.images[record]


def plan(seed: int = 0, window: int = 0, candidates=None, num_slots: int = I):
    candidates = candidates or random_candidates(0)
    return packing.plan_window(seed, window, candidates, ROWS, T, num_slots)


@pytest.mark.parametrize("seed", range(20))
def test_rows_keep_to_positions_and_slots(seed):
    candidates = random_candidates(seed)
    rows = plan(seed, 1, candidates).rows
    assert len(rows) == ROWS
    for row in rows:
        lengths, images = zip(*(sizes(candidates, document) for document in row))
        assert sum(lengths) <= T and sum(images) <= I


@pytest.mark.parametrize("seed", range(20))
def test_every_document_is_placed_once_or_counted(seed):
    candidates = random_candidates(seed)
    made = plan(seed, 2, candidates)
    placed = [document for row in made.rows for document in row]
    assert len(set(placed)) == len(placed)
    assert made.num_documents == 240 == len(placed) + made.num_dropped


@pytest.mark.parametrize("seed", range(20))
def test_only_what_fits_nowhere_is_dropped(seed):
    """First-fit: at the end no row has room for any dropped document, in positions and slots."""
    candidates = random_candidates(seed)
    made = plan(seed, 0, candidates)
    used = np.array([np.sum([sizes(candidates, d) for d in row], axis=0) for row in made.rows])
    room = np.array([T, I]) - used
    everything = {(s, int(e), int(r), 0) for s, c in enumerate(candidates) for e, r in zip(c.epochs, c.records)}
    dropped = everything - {document for row in made.rows for document in row}
    assert dropped and made.num_dropped == len(dropped)
    for document in dropped:
        assert not (room >= sizes(candidates, document)).all(axis=1).any()


def test_slots_alone_can_be_the_limit():
    """Twenty one-image documents of 10 positions: with one slot a row holds one, not six."""
    made = plan(0, 0, [candidate(np.full(40, 10), np.ones(40, int))], num_slots=1)
    assert [len(row) for row in made.rows] == [1] * ROWS and made.num_dropped == 20


def test_plan_is_pure():
    """The same twice; another for another window or seed."""
    assert plan(3, 5) == plan(3, 5)
    assert plan(3, 5).rows != plan(3, 6).rows
    assert plan(3, 5).rows != plan(4, 5).rows


def test_plan_ignores_global_randomness():
    np.random.seed(0)
    first = plan(1, 1)
    np.random.seed(1)
    assert plan(1, 1) == first


def test_rows_are_shuffled():
    """First-fit fills the early rows first; the run must not see a window go from full to sparse."""
    candidates = [candidate(np.full(60, 16), np.zeros(60, int))]
    counts = [len(row) for row in plan(0, 0, candidates).rows]
    assert sorted(counts, reverse=True) == [4] * 15 + [0] * 5 != counts


def test_rows_are_full():
    """Small documents to spare: nothing is left over but what no document fits."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 12, 400)
    made = plan(0, 0, [candidate(lengths, np.zeros(400, int))])
    assert sum(lengths[r] for row in made.rows for _, _, r, _ in row) > 0.97 * ROWS * T


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
    counts = packing.documents_per_window(
        shares.values(), [sizes[name][0].mean() for name in names], cfg.data.window_rows, T)
    offered = [candidate(rng.choice(sizes[name][0], count), np.full(count, sizes[name][1]))
               for name, count in zip(names, counts)]
    made = packing.plan_window(0, 0, offered, cfg.data.window_rows, T, cfg.rows.image_slots)
    used = sum(offered[s].lengths[record] for row in made.rows for s, _, record, _ in row)
    assert used > 0.97 * cfg.data.window_rows * T and made.num_dropped < 0.02 * made.num_documents


def test_documents_per_window_gives_the_token_shares():
    counts = packing.documents_per_window([3, 1], [30.0, 10.0], 100, 400)
    assert counts == [1000, 1000]  # 30,000 and 10,000 positions of 40,000
    assert packing.documents_per_window([0.6, 0.2], [30.0, 10.0], 100, 400) == counts  # shares are relative


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
