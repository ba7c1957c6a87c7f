"""Documents: whatever the records, laid out as their plan counted them; a text longer than a row goes on."""

import threading

import numpy as np
import pytest

from tests.conftest import replace
from tests.golden import write_split
from tfusion import config
from tfusion.data import documents as documents_module
from tfusion.data import layout, packing, store
from tfusion.data.documents import Documents
from tfusion.data.rows import PackedRows
from tfusion.data.tokenizers import load_tokenizer
from tfusion.errors import UserError
from tfusion.types import BOS, EOS

SPLITS = ("train", "heldout")


def picture(rng):
    return rng.integers(0, 256, (4, 4, 3), np.uint8)


def text(rng, low: int, high: int) -> str:
    return "".join(chr(c) for c in rng.integers(97, 123, rng.integers(low, high)))


KINDS = {  # records of every kind: (rng) -> parts
    "pair": lambda r: [text(r, 1, 20), picture(r)],
    "pair without a caption": lambda r: ["", picture(r)],
    "pictures alone": lambda r: [picture(r), picture(r)],
    "story": lambda r: [text(r, 1, 9), picture(r), text(r, 1, 9), picture(r), text(r, 0, 9)],
    "text": lambda r: [text(r, 1, 60)],
    "two texts": lambda r: [text(r, 1, 30), text(r, 1, 30)],
    "empty text": lambda r: [""],
    "nothing": lambda r: [],
}


def spec(share: float):
    """What is prepared is read alike, whatever it was made from."""
    return config.REGISTRY["source"]["glosses"]("glosses", share)


def write(root, cfg, shards: int = 1, **sources):
    """Sources of the given records, the same in both splits: a byte a token, a picture its own latent."""
    def encode(images):
        return (images[..., [0, 1, 2, 0]] - 127.5) / 74

    for name, records in sources.items():
        for split in SPLITS:
            write_split(root, name, split, records, lambda xs: [[ord(c) for c in x] for x in xs], encode,
                        shards=shards)
    store.write_meta(root, load_tokenizer("byte"), "none", cfg.model.latent_shape)
    return replace(cfg, "data", prepared=str(root), image_share=0.8,
                   sources={name: spec(1.0) for name in sources})


def open_rows(cfg, **data):
    cfg = replace(cfg, "data", **data)
    return PackedRows(cfg.rows, cfg.seed)


@pytest.mark.parametrize("seed", range(6))
def test_plan_and_layout_agree(cfg, tmp_path, seed):
    """Positions used are those planned, and the batch keeps the contract; with dropped captions and without."""
    rng = np.random.default_rng(seed)
    records = [KINDS[kind](rng) for kind in rng.choice(list(KINDS), 200)]
    cfg = write(tmp_path, cfg, shards=3, mixed=records)
    rows = open_rows(cfg, caption_dropout=0.3 * (seed % 2), image_first_fraction=0.4, seq_len=96)
    R = cfg.data.window_rows
    batch = packing.stack_rows([rows[row] for row in range(2 * R)])
    rows.check(batch)
    for window in range(2):
        for row, documents in enumerate(rows.plan(window).rows, start=window * R):
            lengths = [len(example.tokens_L) for example in rows.examples(documents)]
            assert sum(lengths) == (batch.segment_ids_BT[row] > 0).sum() <= 96


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropped", [False, True])
def test_lengths_are_the_layouts(cfg, tmp_path, kind, dropped):
    """Document by document: from stored counts as laid out, the last one scored nowhere."""
    rng = np.random.default_rng(0)
    cfg = write(tmp_path, cfg, one=[KINDS[kind](rng) for _ in range(20)])
    rows = open_rows(cfg, caption_dropout=float(dropped), window_rows=2)
    offered = rows.offered(0)
    named = offered.named(slice(None))
    for example, (*_, piece), length, images in zip(
            rows.examples(named), named, offered.lengths, offered.images):
        assert (len(example.tokens_L), len(example.max_t_I), piece) == (length, images, 0)
        assert example.loss_mask_L.any() != (dropped and images > 0) and not example.loss_mask_L[-1]


T = 10
TEXTS = {  # tokens: positions of the pieces
    0: [2], 1: [3], 8: [10], 9: [10, 2], 10: [10, 3], 16: [10, 9], 17: [10, 10], 18: [10, 10, 2],
    40: [10] * 4 + [6]}


@pytest.mark.parametrize(("tokens", "expected"), TEXTS.items())
def test_long_text_in_pieces_by_hand(cfg, tmp_path, tokens, expected):
    """A row of 10 positions holds BOS and 9 tokens. The text comes back whole, each token predicted once."""
    ids = list(range(30, 30 + tokens))
    cfg = write(tmp_path, cfg, long=[["".join(map(chr, ids[:3])), "".join(map(chr, ids[3:]))]])
    documents = Documents(replace(cfg, "data", seq_len=T).rows, "long", "train")
    cut = documents.cut([0])
    assert cut.of.tolist() == [0] * len(expected) and cut.pieces.tolist() == list(range(len(expected)))
    assert cut.lengths.tolist() == expected
    read, predicted = [], []
    for example, length in zip(documents.read([(0, piece) for piece in cut.pieces]), expected):
        assert len(example.tokens_L) == len(example.image_ids_L) == length and example.tokens_L[0] == BOS
        assert example.loss_mask_L.tolist() == [True] * (length - 1) + [False]
        read += example.tokens_L[1:].tolist()
        predicted += example.tokens_L[1:][example.loss_mask_L[:-1]].tolist()
    assert read == predicted == [*ids, EOS]


@pytest.mark.parametrize("shards", [1, 3])
def test_records_are_cut_each_into_its_pieces(cfg, tmp_path, shards):
    """Short and long texts, pictures between them, in any order and through the shards; read likewise."""
    rng = np.random.default_rng(0)
    records = [["a" * 30], ["b"], ["", picture(rng)], [], ["c" * 18], ["d" * 8]]
    documents = Documents(replace(write(tmp_path, cfg, shards, mixed=records), "data", seq_len=T).rows, "mixed",
                          "train")
    asked, pieces = [4, 0, 2, 0, 5, 1, 3], [3, 4, 1, 4, 1, 1, 1]
    cut = documents.cut(asked)
    assert list(zip(cut.of.tolist(), cut.pieces.tolist())) == [
        (i, piece) for i, number in enumerate(pieces) for piece in range(number)]
    named = [(asked[i], piece) for i, piece in zip(cut.of.tolist(), cut.pieces.tolist())]
    for document, example in zip(named, documents.read(named)):
        for x, y in zip(example, documents.read([document])[0]):
            np.testing.assert_array_equal(x, y)
    assert [documents.read([(record, 0)])[0].tokens_L[1] for record in (0, 1, 4, 5)] == [ord(c) for c in "abcd"]


def test_a_record_is_read_once_and_a_shard_at_a_time(cfg, tmp_path, monkeypatch):
    records = [["a" * 30], ["b"], ["c"], ["d" * 20]]
    cfg = replace(write(tmp_path, cfg, 2, some=records), "data", seq_len=T)
    documents = Documents(cfg.rows, "some", "train")
    calls, real = [], documents.source.read
    monkeypatch.setattr(documents.source, "read", lambda *x: calls.append(x) or real(*x))
    documents.read([(3, 1), (0, 0), (0, 2), (3, 0), (1, 0), (0, 0)])
    assert sorted(calls) == [(0, [0, 1]), (1, [1])]


def test_means_are_the_ledgers(cfg, tmp_path, monkeypatch):
    """Of some shards' sizes what the ledger does not know: pieces, dropped captions. Exact if all are seen."""
    rng = np.random.default_rng(0)
    records = [[text(rng, 1, 5 * (1 + i // 20)), picture(rng)] if i % 2 else [text(rng, 1, 1 + i)]
               for i in range(1, 201)]
    cfg = replace(write(tmp_path, cfg, 10, mixed=records), "data", seq_len=64)
    opened = []
    real = store.Split.sizes
    monkeypatch.setattr(store.Split, "sizes", lambda self, shard: opened.append(shard) or real(self, shard))
    whole = Documents(cfg.rows, "mixed", "train")
    assert sorted(opened) == list(range(10))
    cut = whole.cut(np.arange(200))
    assert whole.means(0.0)[0] == pytest.approx(cut.lengths.sum() / 200)
    assert whole.means(0.0)[1] == pytest.approx(6 * cut.images.sum() / 200)
    dropped = whole.cut(np.arange(200), np.arange(200) % 4 < 2)  # of every other record with a picture
    assert whole.means(0.5)[0] == pytest.approx(dropped.lengths.sum() / 200, rel=0.01)
    opened.clear()
    monkeypatch.setattr(documents_module, "SAMPLE", 2)
    some = Documents(cfg.rows, "mixed", "train")
    assert opened == [0, 9]
    off = abs(some.means(0.0)[0] / whole.means(0.0)[0] - 1)
    alone = whole.cut(np.r_[:20, 180:200]).lengths.sum() / 40
    assert off < 0.03 < 0.06 < abs(alone / whole.means(0.0)[0] - 1)


def test_a_long_text_is_offered_in_its_records_window(cfg, tmp_path):
    """Long texts beside short ones: every piece in the record's window, placed there or in the next or dropped;
    rows are full and shares come out."""
    rng = np.random.default_rng(0)
    short, long = [[text(rng, 5, 90)] for _ in range(2000)], [["X" * n] for n in rng.integers(200, 800, 50)]
    cfg = write(tmp_path, cfg, long=long, short=short)
    rows = open_rows(cfg, window_rows=64, seq_len=96, sources={"long": spec(0.3), "short": spec(0.7)})
    for window in range(4):
        offered = rows.offered(window)
        of_long = offered.take(offered.sources == 0)
        records, number = np.unique(of_long.records, return_counts=True)
        assert len(records) == len(rows.mixture.taken(window)[0]) > 2 and number.tolist() == [
            -(-(len(long[record][0]) + 1) // 95) for record in records]
    batch = packing.stack_rows(rows.read(range(4 * 64)))
    rows.check(batch)
    assert (batch.segment_ids_BT > 0).mean() > 0.95
    share = (batch.tokens_BT == ord("X"))[(batch.segment_ids_BT > 0)].mean()
    assert abs(share - 0.3) < 0.05
    stats = rows.stats(64)
    assert stats["data/continued_documents"] > 0.1 and stats["data/dropped_documents"] < 0.2


def test_identity_is_what_decides_the_order(cfg, tmp_path):
    """Flat and small. A record more, or two records that change places, are other data; other contents of the
    same sizes are not."""
    records = [["a" * n] for n in (5, 9, 20)]

    def identity(**sources):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        return open_rows(write(root, cfg, **sources)).identity

    first = identity(some=records, other=[["b"]])
    assert sorted(first) == ["codec", "order", "sizes.other", "sizes.some", "tokenizer"]
    assert all(isinstance(value, str) and len(value) < 65 for value in first.values())
    assert identity(some=[[text[0].upper()] for text in records], other=[["b"]]) == first
    for changed in ([*records, ["d"]], records[::-1], records[:2], [["a" * n] for n in (5, 9, 21)]):
        now = identity(some=changed, other=[["b"]])
        assert {name for name in first if now[name] != first[name]} - {"order"} == {"sizes.some"}
    assert sorted(identity(some=records)) == ["codec", "order", "sizes.some", "tokenizer"]


def test_long_text_needs_a_row_of_two(cfg, tmp_path):
    cfg = write(tmp_path, cfg, one=[["abc"]])
    assert [len(open_rows(cfg, seq_len=n).sources[0].cut([0]).of) for n in (2, 3, 4, 5)] == [4, 2, 2, 1]
    with pytest.raises(UserError, match=r"data.seq_len = 1 must be at least 2"):
        config.from_dict({**cfg.to_dict(), "data": {**cfg.to_dict()["data"], "seq_len": 1}})


@pytest.mark.parametrize("channels", [1, 8])
def test_latents_of_another_shape_are_refused(cfg, tmp_path, channels):
    """Few channels would be broadcast into the batch without a word."""
    there = write(tmp_path, cfg, some=[["a"]])
    with store.Writer(tmp_path, "some", "train", 1) as writer:
        writer.add([layout.image(np.ones((4, 4, channels), np.float32))])
    with pytest.raises(UserError, match=rf"holds latents of shape \(4, 4, {channels}\), the model expects"):
        open_rows(there)


def test_shards_are_read_side_by_side_in_the_order_asked_for(tmp_path, cfg, monkeypatch):
    rng = np.random.default_rng(0)
    cfg = write(tmp_path, cfg, 4, some=[[text(rng, 1, 20)] for _ in range(20)])
    documents, together = Documents(cfg.rows, "some", "train"), threading.Barrier(4, timeout=30)
    wanted = rng.permutation(20)
    alone = [documents.parts([record])[0] for record in wanted]
    real = store.Split.read

    def read(self, shard, records):
        together.wait()  # for the reads of the other three
        return real(self, shard, records)

    monkeypatch.setattr(store.Split, "read", read)
    for one, found in zip(alone, documents.parts(wanted), strict=True):
        np.testing.assert_array_equal(one[0].values, found[0].values)
