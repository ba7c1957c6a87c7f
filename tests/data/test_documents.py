"""Documents: whatever the records, laid out as their plan counted them; a text longer than a row goes on."""

import numpy as np
import pytest

from tests.conftest import replace
from tfusion import config
from tfusion.data import packing, pipeline, prepared
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


def write(root, cfg, **sources):
    """Sources of the given records, the same in both splits: a byte a token, a picture its own latent."""
    def encode(images):
        return (images[..., [0, 1, 2, 0]] - 127.5) / 74

    for name, records in sources.items():
        for split in SPLITS:
            prepared.write_source(root / name / split, records, lambda xs: [[ord(c) for c in x] for x in xs],
                                  encode)
    prepared.write_meta(root, load_tokenizer("byte"), "none", cfg.model.latent_shape)
    return replace(cfg, "data", prepared=str(root), image_share=0.8,
                   sources={name: spec(1.0) for name in sources})


def open_rows(cfg, **data):
    cfg = replace(cfg, "data", **data)
    return pipeline.PackedRows(cfg.rows, cfg.seed)


@pytest.mark.parametrize("seed", range(6))
def test_plan_and_layout_agree(cfg, tmp_path, seed):
    """Positions used are those planned, and the batch keeps the contract; with dropped captions and without."""
    rng = np.random.default_rng(seed)
    records = [KINDS[kind](rng) for kind in rng.choice(list(KINDS), 200)]
    cfg = write(tmp_path, cfg, mixed=records)
    rows = open_rows(cfg, caption_dropout=0.3 * (seed % 2), image_first_fraction=0.4, seq_len=96)
    R = cfg.data.window_rows
    batch = packing.stack_rows([rows[row] for row in range(2 * R)])
    rows.check(batch)
    for window in range(2):
        for row, documents in enumerate(rows.plan(window).rows, start=window * R):
            lengths = [len(rows.example(*document).tokens_L) for document in documents]
            assert sum(lengths) == (batch.segment_ids_BT[row] > 0).sum() <= 96


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropped", [False, True])
def test_lengths_are_the_layouts(cfg, tmp_path, kind, dropped):
    """Document by document: from stored counts as laid out, the last one scored nowhere."""
    rng = np.random.default_rng(0)
    cfg = write(tmp_path, cfg, one=[KINDS[kind](rng) for _ in range(20)])
    rows = open_rows(cfg, caption_dropout=float(dropped), window_rows=2)
    (offered,) = rows.offered(0)
    for epoch, record, piece, length, images in zip(*offered):
        example = rows.example(0, int(epoch), int(record), int(piece))
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
    documents = open_rows(cfg, seq_len=T).sources[0]
    records, pieces = documents.locate(range(len(documents)))
    assert records.tolist() == [0] * len(expected) and pieces.tolist() == list(range(len(expected)))
    assert documents.lengths(records, pieces).tolist() == expected
    read, predicted = [], []
    for piece, length in enumerate(expected):
        example = documents.read(0, piece)
        assert len(example.tokens_L) == len(example.image_ids_L) == length and example.tokens_L[0] == BOS
        assert example.loss_mask_L.tolist() == [True] * (length - 1) + [False]
        read += example.tokens_L[1:].tolist()
        predicted += example.tokens_L[1:][example.loss_mask_L[:-1]].tolist()
    assert read == predicted == [*ids, EOS]


def test_documents_are_numbered_record_by_record(cfg, tmp_path):
    """Short and long texts, pictures between them: each record's pieces in turn."""
    rng = np.random.default_rng(0)
    records = [["a" * 30], ["b"], ["", picture(rng)], [], ["c" * 18], ["d" * 8]]
    documents = open_rows(write(tmp_path, cfg, mixed=records), seq_len=T).sources[0]
    pairs = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (3, 0), (4, 0), (4, 1), (4, 2), (5, 0)]
    assert list(zip(*(x.tolist() for x in documents.locate(np.arange(len(documents)))))) == pairs
    assert [x.item() for x in documents.locate(8)] == [4, 1]


def test_a_very_long_text_is_spread_over_the_run(cfg, tmp_path):
    """A megabyte beside short texts: its pieces are spread over windows like any other document, each once;
    rows are full and shares come out."""
    rng = np.random.default_rng(0)
    short = [[text(rng, 5, 90)] for _ in range(2000)]
    cfg = write(tmp_path, cfg, long=[["X" * 1_000_000]], short=short)
    rows = open_rows(cfg, window_rows=64, seq_len=96, sources={"long": spec(0.3), "short": spec(0.7)})
    assert len(rows.sources[0]) == -(-1_000_001 // 95) and len(rows.sources[1]) == 2000
    placed = [document for window in range(4) for row in rows.plan(window).rows for document in row]
    pieces = {piece for source, _, _, piece in placed if source == 0}
    assert len(pieces) == sum(source == 0 for source, *_ in placed) > 60
    batch = packing.stack_rows([rows[row] for row in range(128)])
    rows.check(batch)
    assert (batch.segment_ids_BT > 0).mean() > 0.93
    share = (batch.tokens_BT == ord("X"))[(batch.segment_ids_BT > 0)].mean()
    assert abs(share - 0.3) < 0.05
    stats = rows.stats(0)
    assert stats["data/continued_documents"] > 0.1 and stats["data/dropped_documents"] < 0.1


def test_identity_is_what_decides_the_order(cfg, tmp_path):
    """Flat and small. A record more, or two records that change places, are other data; other contents of the
    same sizes are not."""
    records = [["a" * n] for n in (5, 9, 20)]

    def identity(**sources):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        return open_rows(write(root, cfg, **sources)).identity

    first = identity(some=records, other=[["b"]])
    assert sorted(first) == ["codec", "sizes.other", "sizes.some", "tokenizer"]
    assert all(isinstance(value, str) and len(value) < 65 for value in first.values())
    assert identity(some=[[text[0].upper()] for text in records], other=[["b"]]) == first
    for changed in ([*records, ["d"]], records[::-1], records[:2], [["a" * n] for n in (5, 9, 21)]):
        now = identity(some=changed, other=[["b"]])
        assert [name for name in first if now[name] != first[name]] == ["sizes.some"]
    assert sorted(identity(some=records)) == ["codec", "sizes.some", "tokenizer"]


def test_long_text_needs_a_row_of_two(cfg, tmp_path):
    cfg = write(tmp_path, cfg, one=[["abc"]])
    assert [len(open_rows(cfg, seq_len=n).sources[0]) for n in (2, 3, 4, 5)] == [4, 2, 2, 1]
    with pytest.raises(UserError, match=r"data.seq_len = 1 must be at least 2"):
        config.from_dict({**cfg.to_dict(), "data": {**cfg.to_dict()["data"], "seq_len": 1}})


@pytest.mark.parametrize("channels", [1, 8])
def test_latents_of_another_shape_are_refused(cfg, tmp_path, channels):
    """Few channels would be broadcast into the batch without a word."""
    there = write(tmp_path / "data", cfg, some=[["a", picture(np.random.default_rng(0))]])
    for split in SPLITS:
        path = tmp_path / "data" / "some" / split / "latents.npy"
        np.save(path, np.repeat(np.load(path)[..., :1], channels, axis=-1))
    with pytest.raises(UserError, match=rf"holds latents of shape \(4, 4, {channels}\), the model expects"):
        open_rows(there)
