"""Held-out documents: each exactly once, with the same draws, whatever the run, the rows and the batches."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from tests.conftest import replace, tiny_autoencoder_config, with_shares
from tests.data.test_documents import picture, spec, text, write
from tests.data.test_transforms import splitmix64_chain_state
from tfusion.data import packing
from tfusion.data.heldout import HeldOut, open_heldout
from tfusion.data.rows import PackedRows
from tfusion.errors import UserError
from tfusion.objectives import kind_of
from tfusion.types import BOS


@pytest.fixture
def mixed(cfg, tmp_path):
    """30 pairs, 10 stories of two pictures and 40 texts of 5 to 70 tokens."""
    rng = np.random.default_rng(0)
    pairs = [[text(rng, 1, 20), picture(rng)] for _ in range(30)]
    stories = [[text(rng, 1, 9), picture(rng), text(rng, 1, 9), picture(rng)] for _ in range(10)]
    return write(tmp_path, cfg, shards=3, mixed=[*pairs, *stories, *([text(rng, 5, 70)] for _ in range(40))],
                 other=pairs)


def heldout(cfg, source: str = "mixed", documents=None, **options):
    return HeldOut(cfg.rows, source, documents, **options)


def documents_of(batch):
    """Of each document in a batch: (tokens, scored positions, its pictures, their max_t and noise ids)."""
    for row, segments in enumerate(batch.segment_ids_BT):
        for number in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == number)
            slots = np.flatnonzero(np.isin(batch.image_start_BI[row], here))
            yield (tuple(batch.tokens_BT[row, here].tolist()), batch.loss_mask_BT[row, here].tobytes(),
                   batch.latents_BIhwc[row, slots].tobytes(), tuple(batch.max_t_BI[row, slots].tolist()),
                   tuple(map(tuple, batch.noise_ids_BI2[row, slots].tolist())))


def everything(held, batch_size: int = 4) -> Counter:
    return Counter(document for batch in held.batches(batch_size) for document in documents_of(batch))


def test_a_run_that_knows_no_captions_is_shown_none(mixed):
    """With some dropped in training all are shown; with all, documents are <bos>, pictures and <eos>."""
    some, none = (everything(heldout(replace(mixed, "data", caption_dropout=share))) for share in (0.9, 1.0))
    assert some == everything(heldout(mixed))
    pictured = [document for document in none.elements() if document[3]]
    assert len(pictured) == 40 and none.total() == 80
    N = mixed.model.num_patches
    assert {len(tokens) for tokens, *_ in pictured} == {1 + (N + 2) + 1, 1 + 2 * (N + 2) + 1}
    assert not any(np.frombuffer(scored, bool).any() for _, scored, *_ in pictured)


def test_every_document_once(mixed):
    """As the records are stored, captions first, all scored, t up to 1."""
    held = heldout(mixed)
    seen = everything(held)
    assert held.num_documents == 80 == seen.total() == len(seen)
    source = held.source
    stored = {tuple(example.tokens_L.tolist()) for example in source.read([(r, 0) for r in range(80)])}
    assert {tokens for tokens, *_ in seen} == stored
    assert all(tokens[0] == BOS and max(limits, default=1) == min(limits, default=1) == 1
               and np.frombuffer(scored, bool).any() for tokens, scored, _, limits, _ in seen)


RUNS = {  # what may differ between runs, and must not matter
    "seed": lambda c: dataclasses.replace(c, seed=7),
    "dropout": lambda c: replace(c, "data", caption_dropout=0.99),
    "image first": lambda c: replace(c, "data", image_first_fraction=1.0, image_first_max_t=0.3),
    "shares": lambda c: replace(c, "data", sources={"other": spec(3.0), "mixed": spec(0.1)}),
    "window": lambda c: replace(c, "data", window_rows=2),
    "length": lambda c: replace(c, "data", seq_len=72),
    "slots": lambda c: replace(c, "data", image_share=0.04),
    "batch": lambda c: replace(c, "train", batch_size=1),
}


@pytest.mark.parametrize("change", RUNS.values(), ids=RUNS.keys())
def test_nothing_that_a_run_varies_matters(mixed, change):
    """The same documents, limits and noise ids, which are all that t and eps are drawn by."""
    changed = change(mixed)
    assert everything(heldout(changed), changed.train.batch_size) == everything(heldout(mixed))


def test_rows_are_filled_and_the_last_batch_is_padded(mixed):
    held = heldout(mixed)
    batches = list(held.batches(5))
    assert len(held) % 5 > 0 and len(batches) == -(-len(held) // 5)
    assert all(batch.tokens_BT.shape == (5, mixed.data.seq_len) for batch in batches)
    used = np.concatenate([(batch.segment_ids_BT > 0).mean(axis=1) for batch in batches])
    assert used[: len(held) - 2].min() > 0.7 and (used[: len(held)] > 0).all() and not used[len(held) :].any()
    padding = held[len(held)]
    assert not padding.loss_mask_BT.any() and not padding.max_t_BI.any()


def test_noise_is_keyed_by_the_pictures_name(mixed):
    """A 64-bit hash of (source, record, picture), the high half first: written out in plain Python. No two
    pictures share one, though the sources hold the same pictures."""
    named = [{}, {}]
    for names, source in zip(named, ("mixed", "other")):
        held = heldout(mixed, source)
        for record, _ in (document for row in held._rows for document in row):
            pictures = held.source.read([(record, 0)])[0].latents_Ihwc
            names |= {(record, k): pictures[k].tobytes() for k in range(len(pictures))}
        ids = {ids: pixels for _, _, pixels, _, each in everything(held) for ids in each}
        expected = {splitmix64_chain_state(held.source.key, record, k) for record, k in names}
        assert {a << 32 | b for a, b in ids} == expected and len(expected) == len(names)
        names.clear()
        names |= ids
    assert len(named[0]) == 50 and len(named[1]) == 30 and not named[0].keys() & named[1].keys()


def test_image_first_where_it_is_asked_for(mixed):
    """For captions given pictures: BOI stands second, t goes up to 1, and the noise is as it was."""
    plain, first = (everything(heldout(mixed, "other", image_first=x)) for x in (False, True))
    assert all(tokens[1] == mixed.vocabulary.boi and limits == (1.0,) for tokens, _, _, limits, _ in first)
    assert {x[2:] for x in plain} == {x[2:] for x in first}


def test_first_records_with_all_their_pieces(cfg, tmp_path):
    cfg = write(tmp_path, cfg, long=[["a" * 50], ["b" * 200], ["c" * 30], ["d" * 300]])
    cfg = replace(cfg, "data", seq_len=64)
    seen = [heldout(cfg, "long", n) for n in (1, 2, 3, None, 99)]
    assert [held.num_documents for held in seen] == [1, 5, 6, 11, 11]
    tokens = Counter(t for document in everything(seen[2]).elements() for t in document[0])
    assert [tokens[ord(c)] for c in "abcd"] == [50, 200, 30, 0]


def test_sources_without_held_out_records_are_named_and_left_out(cfg, tmp_path, capsys):
    """Prepared with none, or not at all. Training on a source with none is refused in one line."""
    cfg = write(tmp_path, cfg, some=[["abc"]], none=[], never=[["abc"]])
    for path in (tmp_path / "never" / "heldout").iterdir():
        path.unlink()
    (tmp_path / "never" / "heldout").rmdir()
    found = open_heldout(cfg.rows)
    assert list(found) == ["some"] and found["some"].num_documents == 1
    said = capsys.readouterr().out
    assert f"{tmp_path}/none/heldout holds no records: 'none' is not evaluated\n" in said and "'never'" in said
    with pytest.raises(UserError, match=r"none/train holds no records: .*data.sources.none.share to 0"):
        PackedRows(cfg.rows, cfg.seed)


def test_documents_that_fit_no_row_are_refused(mixed):
    with pytest.raises(UserError, match=r"heldout: 10 of 40 records .* one has 2 images"):
        heldout(replace(mixed, "data", image_share=0.02))


def test_held_out_rows_of_the_prepared_data(cfg):
    """Of every source that has a share; batches keep the contract."""
    cfg = with_shares(cfg, scenes=0.66, stories=0.0, glosses=0.12)
    found = open_heldout(cfg.rows, 50)
    assert {name: held.num_documents for name, held in found.items()} == {"scenes": 50, "glosses": 50}
    for held in found.values():
        for batch in held.batches(8):
            packing.check_batch(batch, cfg.vocabulary)


def test_pictures_for_the_autoencoder():
    cfg = tiny_autoencoder_config()
    (held,) = kind_of(cfg).open_heldout(cfg, 20).values()
    batches = list(held.batches(8))
    assert len(held) == 20 and len(batches) == 2
    seen = np.concatenate([batch.images_BHWC for batch in batches])
    np.testing.assert_array_equal(seen, held.images[:16])
    assert len(next(iter(held.batches(32))).images_BHWC) == 32
