"""Tokenizers: ids, round trips, the shipped model, foreign models and clear errors."""

import hashlib
import io
import pickle
from pathlib import Path

import pytest
import sentencepiece

from tfusion.data import packs, scenes, tokenizers
from tfusion.errors import UserError

LLAMA = Path(__file__).parents[3] / "shared/golden/tokenizer.llama2"
TEXTS = [
    "naïve 🦝",
    "a panda left of an apple on a teal canvas",
    'tab\tand "quotes"',
    "two  spaces",
    "",
]


@pytest.fixture(params=["byte", "default"])
def tokenizer(request):
    return tokenizers.load_tokenizer(request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_is_exact(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(4 <= i < tokenizer.vocab_size for i in ids)


def test_a_batch_is_its_texts(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_specials_are_ours_and_never_come_from_text(tokenizer):
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.unk) == (0, 1, 2, 3)
    assert min(tokenizer.encode("<s> </s> <pad> <unk>")) >= 4


def test_decode_passes_over_specials_and_image_symbols(tokenizer):
    ids, boi = tokenizer.encode("a fox"), tokenizer.vocab_size
    assert tokenizer.decode([1, *ids[:1], boi, boi + 1, *ids[1:], 2, 0, 0, 3]) == "a fox"


def test_pieces_spell_the_text(tokenizer):
    pieces = [tokenizer.piece(i) for i in tokenizer.encode("a fox")]
    assert "".join(pieces).strip() == "a fox"
    raccoon = [tokenizer.piece(i) for i in tokenizer.encode("🦝")]
    assert raccoon[-4:] == ["<0xF0>", "<0x9F>", "<0xA6>", "<0x9D>"]
    with pytest.raises(ValueError, match="not a text id"):
        tokenizer.piece(tokenizer.vocab_size)


def test_fingerprints_tell_tokenizers_apart(tokenizer):
    other = {"byte": "default", "default": "byte"}
    name = "byte" if tokenizer.vocab_size == 260 else "default"
    assert len(tokenizer.fingerprint) == 64
    assert tokenizer.fingerprint == tokenizers.load_tokenizer(name).fingerprint
    assert tokenizer.fingerprint != tokenizers.load_tokenizer(other[name]).fingerprint


def test_survives_pickling_for_worker_processes(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (
        copy.encode("a fox") == tokenizer.encode("a fox")
        and copy.vocab_size == tokenizer.vocab_size
    )


def test_byte_ids_and_broken_utf8():
    byte = tokenizers.ByteTokenizer()
    assert byte.vocab_size == 260 and byte.encode("A") == [69]
    assert byte.decode([69, 0xF0 + 4, 69]) == "A\ufffdA"


def test_shipped_model_makes_1024_ids_with_boi_and_eoi():
    default = tokenizers.load_tokenizer("default")
    assert default.vocab_size + 2 == 1024


def test_shipped_model_knows_the_world():
    default = tokenizers.load_tokenizer("default")
    words = [*scenes.NOUNS, *scenes.CANVASES]
    assert [word for word in words if len(default.encode(word)) != 1] == []
    assert len(default.encode("a panda left of an apple on a teal canvas")) == 10


@pytest.mark.parametrize("content", [b"", b"this is no model", b"\x00" * 100])
def test_a_file_that_is_no_model_is_named(tmp_path, content):
    path = tmp_path / "x.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a SentencePiece model; give 'default'") as error:
        tokenizers.load_tokenizer(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nope\.model' not found; give 'default'"):
        tokenizers.load_tokenizer(str(tmp_path / "nope.model"))


def test_a_path_is_the_same_as_its_name():
    path = packs.pack_path(packs.TOKENIZER)
    by_path, by_name = tokenizers.load_tokenizer(str(path)), tokenizers.load_tokenizer("default")
    assert by_path.fingerprint == by_name.fingerprint


def train_tiny(path, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a fox and a panda"] * 5),
        model_writer=model,
        model_type="char",
        vocab_size=16,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return str(path)


def test_a_model_without_pad_pads_with_zero(tmp_path):
    path = train_tiny(tmp_path / "x.model", pad_id=-1)  # SentencePiece's and Llama's layout
    tiny = tokenizers.load_tokenizer(path)
    assert (tiny.pad, tiny.bos, tiny.eos, tiny.unk) == (0, 1, 2, 0)
    assert tiny.decode([1, *tiny.encode("a fox"), 2, 0]) == "a fox"


@pytest.mark.parametrize("layout", [
    dict(bos_id=-1, eos_id=1, pad_id=0, unk_id=2),  # T5's
    dict(bos_id=2, eos_id=1, pad_id=0, unk_id=3),  # Gemma's
    dict(unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1)])
def test_a_model_laid_out_otherwise_stands_behind_our_specials(tmp_path, layout):
    path = train_tiny(tmp_path / "x.model", **layout)
    tiny, own = tokenizers.load_tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=path)
    assert (tiny.pad, tiny.bos, tiny.eos, tiny.unk) == (0, 1, 2, layout["unk_id"] + 4)
    assert tiny.vocab_size == own.get_piece_size() + 4
    ids = tiny.encode("a fox")
    assert ids == [i + 4 for i in own.encode("a fox")] and tiny.encode_batch(["a fox"]) == [ids]
    assert tiny.decode([1, *ids, 2, 0, 0, 3, tiny.unk, tiny.vocab_size]) == "a fox"
    assert [tiny.piece(i) for i in (0, 1, 2, 3)] == ["<pad>", "<bos>", "<eos>", "<unk>"]
    assert "".join(tiny.piece(i) for i in ids).strip() == "a fox"
    assert tiny.encode("\N{FOX FACE}")[-1] == tiny.unk
    assert tiny.fingerprint != hashlib.sha256(Path(path).read_bytes()).hexdigest()  # the shift is part of it
    tiny.save(tmp_path)
    assert tokenizers.load_saved(tmp_path).encode("a fox") == ids


@pytest.mark.skipif(
    not LLAMA.is_file(), reason=f"Llama 2's tokenizer is not shipped; none at {LLAMA}"
)
def test_llama2():
    llama = tokenizers.load_tokenizer(str(LLAMA))
    ids = llama.encode("Hello world! A photo of a cat.")
    assert ids == [15043, 3186, 29991, 319, 15373, 310, 263, 6635, 29889]
    assert (llama.vocab_size, llama.pad, llama.bos, llama.eos, llama.unk) == (32000, 0, 1, 2, 0)
    assert llama.decode([1, *ids, 2, 0, 32000]) == "Hello world! A photo of a cat."
    assert llama.fingerprint.startswith("9e556afd")
