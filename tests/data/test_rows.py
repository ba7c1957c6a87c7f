"""Rows of training: order, windows, shares, fractions, splits, identity, errors."""

import dataclasses
import itertools
import json
import math
import shutil

import numpy as np
import pytest

from tests.conftest import replace, tiny_autoencoder_config, with_shares
from tests.data.test_documents import spec
from tests.golden import write_split
from tfusion.data import layout, packing, pipeline, store, transforms
from tfusion.data.heldout import HeldOut
from tfusion.data.rows import warn_of_other_sources
from tfusion.data.tokenizers import load_tokenizer
from tfusion.errors import UserError
from tfusion.objectives import kind_of
from tfusion.types import BOS


def open_rows(cfg):
    return kind_of(cfg).open_rows(cfg)


def assert_same(a, b):
    for name, x, y in zip(a._fields, a, b):
        np.testing.assert_array_equal(x, y, err_msg=name)


def one_batch(rows, number: int):
    """The first `number` rows."""
    return packing.stack_rows([rows[row] for row in range(number)])


def batches(cfg, first: int, number: int, size: int = 8, local_rows=None):
    return list(pipeline.batches(open_rows(cfg), first, number, size, local_rows))


def test_rows_do_not_depend_on_the_order_of_reading(cfg):
    """Over three windows: in order, backwards, and in a jumbled order with repeats."""
    forwards, backwards, jumbled = (open_rows(cfg) for _ in range(3))
    wanted = [0, 1, 31, 32, 33, 70, 95]
    expected = {row: forwards[row] for row in wanted}
    for row in reversed(wanted):
        assert_same(backwards[row], expected[row])
    for row in (70, 0, 95, 33, 70, 31, 0):
        assert_same(jumbled[row], expected[row])


def test_seeds_and_splits_give_other_rows(cfg):
    plain = open_rows(cfg)[0]
    for other in (open_rows(dataclasses.replace(cfg, seed=1))[0], HeldOut(cfg.rows, "scenes")[0]):
        assert (plain.tokens_BT != other.tokens_BT).any()


def placed_lengths(rows, windows: int) -> np.ndarray:
    """Positions that each source takes in the first windows."""
    total = np.zeros(len(rows.sources))
    for window in range(windows):
        documents = list(itertools.chain(*rows.plan(window).rows))
        for document, example in zip(documents, rows.examples(documents)):
            total[document[0]] += len(example.tokens_L)
    return total


@pytest.mark.parametrize("shares", [
    {"glosses": 0.12, "scenes": 0.66, "stories": 0.22}, {"glosses": 0.5, "scenes": 0.25, "stories": 0.25}])
def test_window_gives_the_sources_token_shares(cfg, shares):
    """Within 4 % of the whole, what the window had to drop (no image slot left) included."""
    cfg = replace(with_shares(cfg, **shares), "data", window_rows=256, image_share=0.2)
    placed = placed_lengths(open_rows(cfg), 1)
    np.testing.assert_allclose(placed / placed.sum(), list(shares.values()), atol=0.04)
    assert placed.sum() > 0.9 * 256 * cfg.data.seq_len


def test_shares_do_not_forget_dropped_captions(cfg):
    """Without half of their captions pictures are short, so more of them make the same share."""
    cfg = replace(with_shares(cfg, glosses=0.5, scenes=0.5), "data", window_rows=256, image_share=0.4,
                  caption_dropout=0.5)
    placed = placed_lengths(open_rows(cfg), 1)
    np.testing.assert_allclose(placed / placed.sum(), 0.5, atol=0.04)


def test_a_source_without_share_is_left_out(cfg):
    cfg = with_shares(cfg, glosses=0.0, scenes=1.0, stories=0.0)
    rows = open_rows(replace(cfg, "data", image_share=0.2))
    assert [source.name for source in rows.sources] == ["scenes"]


def test_planned_lengths_are_the_documents(cfg):
    """The coin thrown for the plan is the coin thrown at reading, so rows are as long as planned."""
    cfg = replace(cfg, "data", caption_dropout=0.5, image_first_fraction=0.5, image_share=0.3)
    rows = open_rows(cfg)
    for index, documents in enumerate(rows.plan(0).rows):
        examples = rows.examples(documents)
        used = sum(len(example.tokens_L) for example in examples)
        assert used <= cfg.data.seq_len
        assert (rows[index].segment_ids_BT > 0).sum() == used
        assert rows[index].segment_ids_BT.max() == len(documents)


def documents_of(batch):
    """(number of scored positions, first token after BOS, max_t of its images) per document with images."""
    for row, segments in enumerate(batch.segment_ids_BT):
        for number in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == number)
            images = np.isin(batch.image_start_BI[row], here)
            if images.any():
                yield (batch.loss_mask_BT[row, here].sum(), batch.tokens_BT[row, here[1]],
                       set(batch.max_t_BI[row, images].tolist()))


def test_caption_dropout_and_image_first_come_out(cfg):
    """Fractions of documents, within 0.05: no LM loss for 0.3 of them, and of the others 0.4 start with a
    picture, with its noise limited to 0.5."""
    cfg = replace(cfg, "data", caption_dropout=0.3, image_first_fraction=0.4, image_first_max_t=0.5,
                  image_share=0.2)
    seen = list(documents_of(one_batch(open_rows(cfg), 256)))
    dropped = [scored == 0 for scored, _, _ in seen]
    kept = [(token, limits) for scored, token, limits in seen if scored]
    first = [token == cfg.vocabulary.boi for token, _ in kept]
    assert len(seen) > 600
    assert abs(np.mean(dropped) - 0.3) < 0.05 and abs(np.mean(first) - 0.4) < 0.05
    assert all(limits == ({0.5} if token == cfg.vocabulary.boi else {1.0}) for token, limits in kept)
    assert all(token == cfg.vocabulary.boi and limits == {1.0} for scored, token, limits in seen if not scored)


def test_captions_are_dropped_in_training_only(cfg):
    cfg = replace(cfg, "data", caption_dropout=0.9, image_share=0.6)
    train, heldout = (list(documents_of(one_batch(rows, 8)))
                      for rows in (open_rows(cfg), HeldOut(cfg.rows, "scenes")))
    assert np.mean([scored == 0 for scored, _, _ in train]) > 0.7
    assert heldout and all(scored > 0 for scored, _, _ in heldout)


def test_every_record_once_per_epoch(cfg):
    """In a new order each epoch, also where an epoch ends inside a window."""
    rows = open_rows(cfg)
    offered = [rows.offered(window) for window in range(12)]
    for index, (source, count) in enumerate(zip(rows.sources, rows.mixture.records[0])):
        own = [c.take((c.sources == index) & (c.pieces == 0)) for c in offered]
        assert {len(c.records) for c in own} <= {math.floor(count), math.ceil(count)}
        assert sum(len(c.records) for c in own) == round(12 * count)
        epochs, records = (np.concatenate([getattr(c, name) for c in own]) for name in ("epochs", "records"))
        complete = epochs.max()
        orders = [records[epochs == epoch] for epoch in range(complete)]
        assert complete == 0 or (np.diff(epochs) >= 0).all()
        for order in orders:
            np.testing.assert_array_equal(np.sort(order), np.arange(len(source)))
        assert all((a != b).any() for a, b in itertools.pairwise(orders))
        assert complete >= 2 or source.name == "glosses"


def test_every_document_of_a_window_at_most_once_and_there_or_in_the_next(cfg):
    """Over 40 windows; the statistics tell what is not placed, source by source."""
    rows = open_rows(replace(cfg, "data", window_rows=8, image_share=0.2))
    placed = {}
    for window in range(41):
        for document in itertools.chain(*rows.plan(window).rows):
            assert placed.setdefault(document, window) == window
    late, gone = 0, 0
    for window in range(40):
        offered = rows.offered(window).named(slice(None))
        when = [placed.get(document) for document in offered]
        assert set(when) <= {window, window + 1, None}
        late, gone, stats = late + when.count(window + 1), gone + when.count(None), rows.stats(8 * (window + 1))
        assert stats["data/dropped_documents"] == pytest.approx(when.count(None) / len(when))
        for index, source in enumerate(rows.sources):
            of = [at for at, document in zip(when, offered) if document[0] == index]
            assert stats[f"data/dropped_documents/{source.name}"] == pytest.approx(of.count(None) / len(of))
    assert late > 5 and gone > 20 and rows.stats(0)["data/dropped_documents"] == 0
    assert len(placed) > 1000


def test_a_row_costs_two_packings(cfg, monkeypatch):
    packed, real = [], packing.pack
    monkeypatch.setattr(packing, "pack", lambda seed, w, *x: packed.append(w) or real(seed, w, *x))
    rows = open_rows(cfg)
    rows[1_000_000]
    assert sorted(packed) == [31_249, 31_250]
    for row in range(1_000_001, 1_000_040):
        rows[row]
        rows.stats(row)
    assert sorted(packed) == [31_249, 31_250, 31_251]


def test_epochs_are_told(cfg):
    rows = open_rows(cfg)
    for index, (source, count) in enumerate(zip(rows.sources, rows.mixture.records[0])):
        told = rows.stats(cfg.data.window_rows * 10 - 1)[f"data/epochs/{source.name}"]
        assert told == pytest.approx(round(10 * count) / len(source))
        offered = rows.offered(9)
        assert offered.epochs[offered.sources == index][-1] == math.ceil(told - 1e-9) - 1


def test_sources_are_shuffled_apart(cfg):
    """Two sources of the same length are not read in the same order."""
    rows = open_rows(cfg)
    assert len(rows.sources[0]) == len(rows.sources[1])
    a, b = (order.between(0, 50).records for order in rows.order[:2])
    assert (a != b).sum() > 40


def test_together_or_one_by_one(cfg):
    """Several rows, of two windows, in any order: what each is alone."""
    rows = open_rows(cfg)
    for row, read in zip(wanted := [40, 3, 31, 32, 3], rows.read(wanted)):
        assert_same(read, rows[row])


def test_few_records_opened_from_many_shards(prepared_root, cfg, tmp_path, monkeypatch):
    """Opening reads ledgers and the sizes of a few shards; a row those of its window's block."""
    records = [[text] for text in ("one", "two two", "three three three")] * 100
    for split in ("train", "heldout"):
        write_split(tmp_path, "many", split, records, lambda xs: [[ord(c) for c in x] for x in xs], None, 300)
    store.write_meta(tmp_path, load_tokenizer("byte"), "none", (4, 4, 4))
    cfg = replace(cfg, "data", prepared=str(tmp_path), sources={"many": spec(1.0)}, window_rows=2, seq_len=64)
    opened, real = [], store.Split.sizes
    monkeypatch.setattr(store.Split, "sizes", lambda self, shard: opened.append(shard) or real(self, shard))
    rows = open_rows(cfg)
    assert len(rows.sources[0]) == 300 and len(opened) == 16
    opened.clear()
    rows[10**6]
    assert 0 < len(opened) <= 4 * 64


def test_rows_keep_the_contract(cfg):
    """Each document opens with BOS, patches hold the pad id and stand where their slot says."""
    batch = one_batch(open_rows(cfg), 32)
    packing.check_batch(batch, cfg.vocabulary)
    starts = (batch.positions_BT == 0) & (batch.segment_ids_BT > 0)
    assert (batch.tokens_BT[starts] == BOS).all()
    assert (batch.tokens_BT[batch.image_ids_BT > 0] == 0).all()
    for row, slot in np.argwhere(batch.image_start_BI < cfg.data.seq_len):
        start = batch.image_start_BI[row, slot]
        assert batch.tokens_BT[row, start - 1] == cfg.vocabulary.boi
        assert batch.tokens_BT[row, start + cfg.model.num_patches] == cfg.vocabulary.eoi
        assert batch.latents_BIhwc[row, slot].any() and batch.max_t_BI[row, slot] > 0


ERRORS = {  # changes, what the message must name
    "document with images longer than a row": (
        {"data": {"seq_len": 60}}, ("records", "a row has 60", "never cut: raise data.seq_len to ")),
    "more images than was said": ({"data": {"image_share": 0.08}},
                                   ("of the positions", "1.25 x data.image_share = 0.08", "raise it to 0.")),
    "more images than slots": (
        {"data": {"image_share": 0.04}}, ("3 images", "2 image slots", "raise data.image_share to 0.08")),
    "another vocabulary": (
        {"model": {"text_vocab_size": 100}}, ("260 pieces", "model.text_vocab_size = 100", "prepare again")),
    "other latents": (
        {"model.adapter": {"latent_channels": 8}}, ("(4, 4, 4)", "(4, 4, 8)", "model.adapter.latent_*")),
    "source that was not prepared": (
        {"data": {"sources": {"photos": spec(1.0)}}}, ("photos", "data.sources")),
    "folder that is not there": ({"data": {"prepared": "/nowhere"}}, ("/nowhere", "data.prepared")),
}


@pytest.mark.parametrize("changes, parts", ERRORS.values(), ids=ERRORS.keys())
def test_data_that_does_not_fit_is_refused(cfg, changes, parts):
    for group, values in changes.items():
        cfg = replace(cfg, group, **values)
    with pytest.raises(UserError) as error:
        open_rows(cfg)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


def test_data_of_another_tokenizer_are_refused(cfg, tmp_path):
    """Of the same size too; one that is not on this machine is not asked."""
    data = tmp_path / "data"
    shutil.copytree(cfg.data.prepared, data)
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps({**meta, "tokenizer": "another's"}))
    with pytest.raises(UserError, match="was tokenised by another tokenizer"):
        open_rows(replace(cfg, "data", prepared=str(data)))
    open_rows(replace(cfg, "data", prepared=str(data), tokenizer=str(tmp_path / "gone.model")))


def test_a_broken_token_on_disk_is_refused_with_its_row(cfg, tmp_path):
    """Where the ledger promises less than the records hold, the batch's own check speaks up."""
    root = shutil.copytree(cfg.data.prepared, tmp_path / "prepared")
    shutil.rmtree(root / "scenes" / "train")
    with store.Writer(root, "scenes", "train", 0) as writer:
        for _ in range(100):
            writer.add([layout.text([300])])
    (path,) = (root / "scenes" / "train").glob("ledger*")
    path.write_text(path.read_text().replace('"max_token_id": 300', '"max_token_id": 3'))
    with pytest.raises(UserError, match=r"row \d+, position \d+: token id 300 is outside"):
        batches(replace(cfg, "data", prepared=str(root)), 0, 1)


def test_autoencoder_rows_show_every_picture_once_per_epoch():
    """Of every source: 200 scenes, and the two or three of each of 50 stories."""
    cfg = tiny_autoencoder_config()
    rows = open_rows(cfg)
    count = len(rows.images)
    stories = cfg.data.sources["stories"].open("train", 32)
    assert count == 200 + sum(len(stories[i]) // 2 for i in range(50)) and int(rows[7].row_ids_B) == 7
    np.testing.assert_array_equal(rows.images[200], stories[0][1])

    def epoch(number: int):
        return [rows[row].images_BHWC.tobytes() for row in range(number * count, (number + 1) * count)]

    few = dataclasses.replace(cfg.data.sources["scenes"], num_records=100)
    fewer = open_rows(replace(cfg, "data", sources=cfg.data.sources | {"scenes": few}))
    assert rows.identity == open_rows(cfg).identity != fewer.identity and list(rows.identity) == ["pictures"]
    stored = sorted(image.tobytes() for image in rows.images)
    assert sorted(epoch(0)) == sorted(epoch(1)) == stored and epoch(0) != epoch(1)


def test_autoencoder_of_another_picture_size_is_refused():
    with pytest.raises(UserError, match=r"32 pixels high, 16 are wanted"):
        open_rows(tiny_autoencoder_config(image_size=16))


def test_noise_limit_where_the_picture_comes_first(cfg):
    """Only there, and as the config says."""
    cfg = replace(cfg, "data", image_first_fraction=1.0, caption_dropout=0.0, image_first_max_t=0.3)
    limits = {limit for _, _, each in documents_of(one_batch(open_rows(cfg), 8)) for limit in each}
    assert limits == {float(np.float32(0.3))}
    assert transforms.puts_image_first(cfg.data, 0, 0, 0, np.arange(9)).all()


def test_a_share_of_no_record_is_an_error(cfg):
    """A source that would never appear is told, not dropped."""
    with pytest.raises(UserError, match=r"data.sources.stories.share = 1e-06 is less than half a record"):
        open_rows(replace(with_shares(cfg, scenes=1.0, stories=1e-6), "data", image_share=0.2))


def test_choices_belong_to_the_source_not_to_its_place_among_them(cfg):
    """Adding a source changes no other source's coins or order."""
    alone = open_rows(replace(with_shares(cfg, scenes=1.0), "data", image_share=0.2))
    beside = open_rows(with_shares(cfg, glosses=0.5, scenes=0.5))
    records = np.arange(50)
    np.testing.assert_array_equal(alone._drops(0, 0, records), beside._drops(1, 0, records))
    np.testing.assert_array_equal(alone.order[0].between(0, 50), beside.order[1].between(0, 50))


def test_sources_may_be_written_in_any_order(cfg):
    """A config is compared key by key at resume, which sees no order."""
    turned = replace(cfg, "data", sources=dict(reversed(cfg.data.sources.items())))
    assert list(turned.data.sources) != list(cfg.data.sources)
    assert open_rows(turned).plan(1).rows == open_rows(cfg).plan(1).rows
    assert open_rows(turned).identity == open_rows(cfg).identity


IDENTITY = {  # what decides which document stands in row k, and what does not
    "seed": (lambda c: dataclasses.replace(c, seed=1), True),
    "shares": (lambda c: with_shares(c, glosses=0.2, scenes=0.6, stories=0.2), True),
    "a source less": (lambda c: with_shares(c, glosses=0.5, scenes=0.5), True),
    "dropout": (lambda c: replace(c, "data", caption_dropout=0.11), True),
    "window": (lambda c: replace(c, "data", window_rows=64), True),
    "length": (lambda c: replace(c, "data", seq_len=200), True),
    "slots": (lambda c: replace(c, "data", image_share=0.3), True),
    "picture first": (lambda c: replace(c, "data", image_first_fraction=0.9, image_first_max_t=0.5), False),
    "batch": (lambda c: replace(c, "train", batch_size=2), False)}


@pytest.mark.parametrize("change, other", IDENTITY.values(), ids=IDENTITY.keys())
def test_identity_is_what_decides_the_order(cfg, change, other):
    one, two = open_rows(cfg), open_rows(change(cfg))
    assert (one.identity["order"] != two.identity["order"]) == other
    assert other or one.plan(3).rows == two.plan(3).rows


def test_other_sources_than_were_prepared_are_said(cfg, capsys):
    """Training takes what stands in data.prepared: who changed a path and did not prepare is told."""
    sources = {name: dataclasses.asdict(spec) for name, spec in cfg.data.sources.items()}
    warn_of_other_sources({"sources": sources}, cfg.data.sources)
    warn_of_other_sources({}, cfg.data.sources)  # prepared by other means
    sources["scenes"] |= {"share": 0.9}  # that is training's own
    warn_of_other_sources({"sources": sources}, cfg.data.sources)
    assert capsys.readouterr().err == ""
    sources["scenes"] |= {"num_records": 7}
    warn_of_other_sources({"sources": sources}, cfg.data.sources)
    assert "data.sources.scenes was prepared with num_records = 7, the config has 200" in (
        capsys.readouterr().err)
