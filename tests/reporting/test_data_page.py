"""The page on prepared data: documents read back are the records that went in, numbers are counted by hand."""

import re
from html import unescape

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.conftest import fake_encode, replace, tiny_dict
from tfusion import config
from tfusion.data import layout, store
from tfusion.data.tokenizers import ByteTokenizer
from tfusion.models.codecs import base
from tfusion.preparing import card
from tfusion.reporting import data_page, inspect_rows, packed_row, pictures

BYTES = ByteTokenizer()


def described(record, dropped: bool, first: bool) -> list:
    """What a row holds of a record of the tiny data (texts and pictures), by hand."""
    parts = [part if isinstance(part, str) else fake_encode(part[None])[0] for part in record]
    if any(not isinstance(part, str) for part in parts):
        if dropped:
            return [part for part in parts if not isinstance(part, str)]
        for i in range(len(parts) - 1 if first else 0):
            if isinstance(parts[i], str) and not isinstance(parts[i + 1], str):
                parts[i], parts[i + 1] = parts[i + 1], parts[i]
    return parts


def test_documents_are_the_records_that_went_in(cfg):
    """Of forty rows: every text, every picture, in order, with its noise limit; and what is scored of it."""
    data, seen = data_page.open_data(cfg), set()
    sources = {name: cfg.data.sources[name].open("train", 32) for name in data.names}
    for row, planned in zip(data.rows.read(range(40)), data.rows.documents(range(40))):
        shown = packed_row.read_documents(row, planned, data.names, data.format.vocabulary, data.tokenizer)
        assert [(each.start, each.end) for each in shown] == [
            (start, end) for segment, start, end in pictures.runs(row.segment_ids_BT) if segment]
        for each, (source, _, record, _) in zip(shown, planned, strict=True):
            name = data.names[source]
            assert each.source == source and each.where.startswith(f"{name}, record {record:,}")
            raw = sources[name][record]
            raw = [part[:60] for part in raw] if name == "glosses" else raw
            images = [piece for piece in each.pieces if piece.kind == "image"]
            limits = {float(row.max_t_BI[piece.slot]) for piece in images}
            want = described(raw, each.unscored, limits == {0.25})
            got = [piece for piece in each.pieces if piece.kind != "special"]
            assert [piece.kind for piece in got] == ["text" if isinstance(x, str) else "image" for x in want]
            for piece, x in zip(got, want):
                if isinstance(x, str):
                    assert piece.words == x and piece.scored
                else:
                    np.testing.assert_allclose(row.latents_BIhwc[piece.slot], x, atol=0.01)
            said = not each.unscored
            around = [("<boi>", said), ("<eoi>", False)] * len(images)
            assert [("<bos>", False), *around, ("<eos>", said)] == [
                (piece.words, piece.scored) for piece in each.pieces if piece.kind == "special"]
            seen.add((len(images), each.unscored, *limits))
    assert {(0, False), (1, False, 1.0), (1, False, 0.25), (1, True, 1.0)} <= seen
    assert any(images > 1 for images, *_ in seen)


def test_a_strip_has_each_position_once(cfg):
    data = data_page.open_data(cfg)
    for row, planned in zip(data.rows.read(range(8)), data.rows.documents(range(8))):
        shown = packed_row.read_documents(row, planned, data.names, data.format.vocabulary, data.tokenizer)
        drawn = packed_row.strip(row, shown)
        for end, wanted in (('height="30" fill-opacity', row.segment_ids_BT > 0),
                            ('height="30" stroke', row.image_ids_BT > 0),
                            ('height="4"', np.roll(row.loss_mask_BT, 1))):
            times = np.zeros(len(row.tokens_BT), int)
            for x, width in re.findall(rf'<rect x="(\d+)"(?: y="33")? width="(\d+)" {end}', drawn):
                times[int(x) : int(x) + int(width)] += 1
            np.testing.assert_array_equal(times, wanted)


def test_a_long_text_is_shown_piece_by_piece(cfg, tmp_path):
    """What it is cut into is read back as it was; all documents are there, those after the first folded."""
    text = "".join(chr(97 + i % 26) for i in range(100))
    made = hand_written(tmp_path, {"long": [[text]] * 40, "short": [["x"]] * 40}, seq_len=64)
    data = data_page.open_data(made)
    found = {}
    for row, planned in zip(data.rows.read(range(32)), data.rows.documents(range(32))):
        for each, (source, epoch, record, piece) in zip(packed_row.read_documents(
                row, planned, data.names, data.format.vocabulary, data.tokenizer), planned):
            if data.names[source] == "long" and not epoch:
                found.setdefault(record, {})[piece] = each
    whole = [pieces for pieces in found.values() if len(pieces) == 2]
    assert whole
    for first, second in ((pieces[0], pieces[1]) for pieces in whole):
        assert [piece.words for piece in first.pieces] == ["<bos>", text[:63]]
        assert [piece.words for piece in second.pieces] == ["<bos>", text[63:], "<eos>"]
        assert "piece" not in first.where and second.where.endswith(", piece 2")


def hand_written(root, records: dict, codec: str = "foreign", **data):
    """A store written record by record, and a config that reads it: as 'bring your own latents'."""
    pictured = False
    for name, some in records.items():
        with store.Writer(root, name, "train", 0) as writer:
            for record in some:
                pictured |= any(not isinstance(part, str) for part in record)
                writer.add([layout.text(BYTES.encode(part)) if isinstance(part, str) else layout.image(part)
                            for part in record])
            writer.skip("torn", "<page 7>")
    store.write_meta(root, BYTES, codec if pictured else "", (4, 4, 4))
    tree = tiny_dict(root)
    del tree.data["sources"]
    tree.data.sources = {name: dict(kind="prepared", share=1.0) for name in records}
    tree.data.update(image_share=0.9 * pictured, **data)
    return config.from_dict(tree)


def words(page: str) -> str:
    """The page's text, a bar where tags stood."""
    return unescape(re.sub(r"(<[^>]+>\s*)+", "|", page.split("</head>")[-1]))


def test_text_alone_by_hand(tmp_path, monkeypatch):
    """Twelve of thirty-two positions a document, two of them in a row: everything can be counted."""
    monkeypatch.setattr(data_page, "SHOWN", 1)
    made = hand_written(tmp_path / "store", {"lines": [[f"<i>a & {i:03d}"] for i in range(256)]}, seq_len=32,
                        window_rows=16)
    out = tmp_path / "new" / "page.html"
    data_page.write_data_page(made, out)
    page = out.read_text()
    assert not (tmp_path / "store" / "card.json").exists()  # nothing is written there
    said = words(page)
    assert "<i>a & " in said and "<i>" not in page and 'class="pixels"' not in page
    assert page.count('class="packed"') == 2 * data_page.SHOWN
    for name, value in (("records", "256"), ("text tokens", f"{256 * 10:,}"), ("images", "0"),
                        ("positions of a row", "32"), ("positions filled", "75.0%"),
                        ("of them scored", "91.7%"), ("documents a row", "2.00")):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page, name
    assert "2 documents, 0 pictures; 8 of 32 positions are padding, 22 are scored." in said
    assert "lines/train|1 torn (<page 7>)" in said and "image slots in use" not in page
    assert "12 positions in the middle, 12 to 12; a row has 32." in said
    assert "codec" not in said and "Who sees whom" in said
    epochs = (6 * 8) / 16 * (16 * 32 / 12) / 256  # steps x batch rows of windows of 42 2/3 records
    assert re.search(rf"\|lines\|100.0%\|100.0%\|42.7\|\d+.\d%\|0\|{epochs:.3f}\|", said)


class Doubled:
    """A codec that anybody can work out: each latent pixel four of the picture."""

    image_size, shape, dtype, fingerprint = 8, (4, 4, 4), np.float32, "doubled"

    def decode(self, latents):
        return np.clip(np.repeat(np.repeat(latents[..., :3], 2, 1), 2, 2), 0, 255).astype(np.uint8)

    def save(self, path):
        base.write(path, {"kind": "doubled"}, {})

    @classmethod
    def read(cls, about, arrays):
        return cls()


def pairs(number: int) -> list:
    """Captioned pictures, whose latents are the pictures themselves; every third caption has two."""
    def plain(*colour):
        return np.tile(np.float32(colour), (4, 4, 1))

    return [[f"number {i}", plain(i, 2 * i, 0, 9), *[plain(200, i, 0, 9)] * (i % 3 == 0)]
            for i in range(number)]


@pytest.mark.parametrize("fingerprint", ["doubled", "foreign", None])
def test_pictures_are_decoded_by_the_codec_that_made_them(tmp_path, monkeypatch, fingerprint):
    """Beside its own caption each; and in false colours where that codec is not there."""
    monkeypatch.setitem(base.CODECS, "doubled", Doubled)
    monkeypatch.setattr(inspect_rows, "draw_row", lambda *_: inspect_rows.Drawing(Figure(), ""))
    made = hand_written(tmp_path / "store", {"pairs": pairs(120)}, fingerprint or "foreign", seq_len=48,
                        window_rows=16, caption_dropout=0.0)
    if fingerprint:
        Doubled().save(tmp_path / "store" / "codec.npz")
    data_page.write_data_page(made, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    articles = re.findall(r'<article class="packed".*?</article>', page)
    assert len({row.count('class="pixels"') for row in page.split('<section id="row-')[1:]}) > 1
    if fingerprint == "doubled":
        assert "decoded by the codec that stands" in page and "false colours" not in page
        for article in articles:
            i = int(re.search(r"number (\d+)", article).group(1))
            wanted = [pictures.pixel_image(np.tile(np.uint8(colour), (8, 8, 1)), "a picture of the row")
                      for colour in ([i, 2 * i, 0], [200, i, 0])[: 1 + (i % 3 == 0)]]
            assert re.findall("<img[^>]*>", article) == wanted
            assert ("t ≤ 0.25" in article) == (article.index("<img") < article.index("number"))
    else:
        assert "codec that encoded the pictures is not here" in page and "encoded, in false colours" in page
        assert all(article.count("<img") >= 1 for article in articles)


def test_false_colours_are_the_first_three_channels_about_their_means():
    x = np.random.default_rng(0).normal([3, -2, 0, 100], [1, 5, 0.1, 1], (50, 8, 8, 4))
    drawn = data_page.false_colours(x).astype(float)
    assert drawn.shape == (50, 8, 8, 3)
    np.testing.assert_allclose(drawn.mean((0, 1, 2)), 127, atol=2)
    np.testing.assert_allclose(drawn.std((0, 1, 2)), 127.5 / data_page.SPREAD, rtol=0.05)
    for channel in range(3):
        assert np.corrcoef(drawn[..., channel].ravel(), x[..., channel].ravel())[0, 1] > 0.99
    grey = data_page.false_colours(x[..., :1])
    assert grey.shape == (50, 8, 8, 3) and (grey[..., 0] == grey[..., 2]).all()


def test_a_source_of_few_rows_is_shown_too(cfg, tmp_path):
    """Where the first rows do not hold it, the first row that does comes after them."""
    made = hand_written(tmp_path, {"many": [["x" * 28]] * 300, "few": [["y" * 28]] * 30}, seq_len=32,
                        window_rows=64)
    shares = {name: dict(few=0.03, many=0.97)[name] for name in made.data.sources}
    sources = {name: type(spec)(**{**vars(spec), "share": shares[name]})
               for name, spec in made.data.sources.items()}
    data = data_page.open_data(replace(made, "data", sources=sources))
    numbers, few = data_page.chosen(data), data.names.index("few")
    having = [k for k, row in enumerate(data.rows.documents(range(64))) if any(x[0] == few for x in row)]
    assert numbers == sorted({*range(data_page.SHOWN), having[0]})


def test_counts_of_real_rows(cfg, tmp_path):
    data = data_page.open_data(cfg)
    n, rows = data_page.counted(data), data.rows.read(range(32))
    assert (n.rows, n.scored) == (32, sum(int(row.loss_mask_BT.sum()) for row in rows))
    assert n.patches == sum(int((row.image_ids_BT > 0).sum()) for row in rows) == 4 * n.slots
    positions = dict.fromkeys(range(len(data.names)), 0)
    for row, planned in zip(rows, data.rows.documents(range(32))):
        for segment, (source, *_) in enumerate(planned, start=1):
            positions[source] += int((row.segment_ids_BT == segment).sum())
    assert n.positions_S.tolist() == list(positions.values())
    assert n.documents == sum(map(len, data.rows.documents(range(32))))


def test_what_a_card_says_stands_in_the_table(tmp_path):
    """Also of a source that the config leaves out, and a broken card is named."""
    made = hand_written(tmp_path, {"pairs": [*pairs(40), *pairs(3)]}, seq_len=32, window_rows=16)
    with store.Writer(tmp_path, "other", "heldout", 0) as writer:
        writer.add([layout.text([5, 6])])
    with store.Writer(tmp_path, "pairs", "heldout", 0) as writer:
        writer.add([layout.text(BYTES.encode("number 7")), layout.image(pairs(8)[7][1])])
    said = words(html := data_page.prepared(data_page.open_data(made)))
    assert "|pairs|train|43|" in said and "|3|6.98 %|" in said and "|1: 65%|2: 35%|" in said
    assert "|other|heldout, not in this config|1|few: figures say little|" in said
    assert '<span class="bad">1</span>' in html and html.index(">train<") < html.index(">heldout<")
    assert '<span class="bad">0.00 to ' in html  # of latents, one channel is 0
    assert data_page.spread([0.9, 1.1]) == "<span>0.90 to 1.10</span>"
    (tmp_path / card.NAME).write_text("{")
    with pytest.raises(ValueError, match=r"card.json is broken .* or delete it"):
        data_page.open_data(made)
