"""Vocabularies of Hugging Face's tokenizers and of tiktoken, tiny ones made here: their ids behind our four."""

import base64
import json
import pickle
import sys

import numpy as np
import pytest

from tfusion.data.tokenizers import SAVED, load_saved, load_tokenizer
from tfusion.errors import UserError

LINES = ["a panda left of an apple on a teal canvas", "naïve 🦝, and two  spaces", "the fox; the foxes"] * 3
SPECIALS = ["<|endoftext|>", "<pad>"]
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
AWKWARD = {
    "empty": "", "spaces": "two  spaces \n\n\t and a tab ",
    "emoji": "naïve 👩‍👩‍👧 🦝 🇩🇪", "nul": "a\0b\x01\x7f",
    "their specials": "a<|endoftext|> <pad><pad> </s>", "ours": "<s> <bos><eos> <unk> <boi>",
    "unassigned": "\U0010ffff\ufffe\ufffd", "marks": "e\u0301\u200d\u202e\ufeff", "lines": "\r\n\u2028\x85",
    "long": "fox " * 50_000, "one long word": "fox" * 100_000, "long blank": " " * 100_000,
}


def write_huggingface(folder, specials=SPECIALS, **settings):
    """A byte-level BPE whose specials come first, as GPT-2's come last and Llama 3's: it must not matter."""
    made = pytest.importorskip("tokenizers")
    own = made.Tokenizer(made.models.BPE())
    own.pre_tokenizer = made.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = made.decoders.ByteLevel()
    trainer = made.trainers.BpeTrainer(vocab_size=300, special_tokens=specials, show_progress=False,
                                       initial_alphabet=made.pre_tokenizers.ByteLevel.alphabet())
    own.train_from_iterator(LINES, trainer)
    own.post_processor = made.processors.TemplateProcessing(
        single=f"{specials[0]} $A {specials[0]}", special_tokens=[(specials[0], 0)])
    own.enable_truncation(4)
    own.enable_padding(length=16)
    path = folder / "tokenizer.json"
    own.save(str(path))
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return path


def write_tiktoken(folder, merges=(b"pa", b"an", b" f", b"ox", b" fox", b"the"), pattern=PATTERN + "\n"):
    pytest.importorskip("tiktoken")
    ranks = [*(bytes([b]) for b in reversed(range(256))), *merges]
    path = folder / "tiny.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)))
    (folder / "tiny.pattern").write_text(pattern)
    return path


WRITE = {"huggingface": write_huggingface, "tiktoken": write_tiktoken}


@pytest.fixture(scope="module", params=WRITE)
def path(request, tmp_path_factory):
    return WRITE[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture
def tokenizer(path):
    return load_tokenizer(str(path))


def theirs(path, text: str) -> list[int]:
    """The ids as the library itself gives them, without specials."""
    if path.suffix == ".json":
        own = sys.modules["tokenizers"].Tokenizer.from_file(str(path))
        own.no_truncation()
        own.no_padding()
        return own.encode(text, add_special_tokens=False).ids
    ranks = {base64.b64decode(a): int(b) for a, b in map(str.split, path.read_text().splitlines())}
    return sys.modules["tiktoken"].Encoding("x", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
                                            ).encode(text)


@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD)
def test_round_trip_is_exact(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(np.array(ids, np.int32)) == text
    assert all(4 <= i < tokenizer.vocab_size for i in ids) and tokenizer.unk not in ids


def test_ids_are_theirs_moved_by_four(path, tokenizer):
    for text in LINES:
        assert tokenizer.encode(text) == [i + 4 for i in theirs(path, text)]
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.unk) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 4 + {".json": 300, ".tiktoken": 262}[path.suffix]


def test_a_batch_is_its_texts(tokenizer):
    texts = list(AWKWARD.values())
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_words_that_spell_a_special_are_pieces(tokenizer):
    for word in SPECIALS:
        assert len(tokenizer.encode(word)) > 1
    assert tokenizer.piece(tokenizer.encode("<|endoftext|>")[0]) == "<"


def test_decode_passes_over_our_specials_and_image_symbols(tokenizer):
    ids, boi = tokenizer.encode("a fox"), tokenizer.vocab_size
    assert tokenizer.decode([1, *ids[:1], boi, boi + 1, *ids[1:], 2, 0, 0, 3, -1, boi + 9]) == "a fox"


def test_every_id_decodes_and_has_a_piece(tokenizer):
    for token in range(tokenizer.vocab_size):
        assert isinstance(tokenizer.decode([token]), str) and tokenizer.piece(token)
    assert [tokenizer.piece(i) for i in range(4)] == ["<pad>", "<bos>", "<eos>", "<unk>"]
    assert "".join(map(tokenizer.piece, tokenizer.encode("the foxes"))) == "the foxes"
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match="not a text id"):
            tokenizer.piece(token)


def test_half_a_letter_becomes_a_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("🦝")[:-1]) == "\ufffd"


def test_survives_pickling_for_worker_processes(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    for text in AWKWARD.values():
        assert copy.encode(text) == tokenizer.encode(text)
    assert (copy.vocab_size, copy.fingerprint) == (tokenizer.vocab_size, tokenizer.fingerprint)


def test_a_run_keeps_what_it_needs(path, tokenizer, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    tokenizer.save(run)
    assert sorted(file.name for file in run.iterdir()) == sorted(SAVED)
    saved = load_saved(run)
    assert saved.fingerprint == tokenizer.fingerprint and saved.encode(LINES[0]) == tokenizer.encode(LINES[0])
    (run / "tokenizer.model").write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(UserError, match=r"tokenizer.model is not the tokenizer that .*tokenizer.json desc"):
        load_saved(run)


def test_another_vocabulary_or_pattern_is_another_fingerprint(tmp_path):
    def fingerprint(write, **options):
        return load_tokenizer(str(write(tmp_path, **options))).fingerprint

    assert len({fingerprint(write_tiktoken), fingerprint(write_tiktoken, merges=(b"pa",)),
                fingerprint(write_tiktoken, pattern=r"\S+|\s+"), fingerprint(write_huggingface),
                fingerprint(write_huggingface, specials=["<s>"])}) == 5


def test_an_unknown_word_is_their_unk_and_no_text(tmp_path):
    made = pytest.importorskip("tokenizers")
    own = made.Tokenizer(made.models.WordLevel({"[UNK]": 0, "a": 1, "fox": 2, "far": 9}, unk_token="[UNK]"))
    own.pre_tokenizer = made.pre_tokenizers.Whitespace()
    own.save(str(tmp_path / "x.json"))
    words = load_tokenizer(str(tmp_path / "x.json"))
    assert words.encode("a red fox") == [5, 4, 6] and words.unk == 4 and words.vocab_size == 14
    assert words.decode([5, 4, 6, 9]) == "a fox" and words.piece(9) == "<none>"


def test_words_of_a_unigram_model_keep_their_blanks(tmp_path):
    made = pytest.importorskip("tokenizers")
    own = made.Tokenizer(made.models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("▁fox", -1.0), ("es", -1.5)], 0))
    own.pre_tokenizer, own.decoder = made.pre_tokenizers.Metaspace(), made.decoders.Metaspace()
    own.save(str(tmp_path / "x.json"))
    words = load_tokenizer(str(tmp_path / "x.json"))
    ids = words.encode("a foxes")
    assert words.decode(ids) == "a foxes" and [words.piece(i) for i in ids] == [" a", " fox", "es"]
    unknown = words.encode("a 🦝")
    assert words.unk == 4 and words.unk in unknown and words.decode(unknown).strip() == "a"


def ranks(*lines):
    def write(folder):
        path = write_tiktoken(folder)
        path.write_bytes(path.read_bytes() + b"\n".join(lines))
        return path
    return write


def without_pattern(folder):
    path = write_tiktoken(folder)
    path.with_suffix(".pattern").unlink()
    return path


def text(name, content):
    def write(folder):
        pytest.importorskip("tokenizers")
        (folder / name).write_bytes(content)
        return folder / name
    return write


def cut(folder):
    path = write_tiktoken(folder)
    path.write_bytes(b"\n".join(path.read_bytes().splitlines()[:200]))
    return path


ERRORS = {
    "no JSON": (text("x.json", b"no JSON"), r"x.json' is not a tokenizer.json of Hugging Face's tokenizers \("),
    "another JSON": (text("x.json", b'{"kind": "byte"}'), r"x.json' is not a tokenizer.json of Hugging Face's"),
    "bytes": (text("x.json", b"\xff\0"), r"x.json' is not a tokenizer.json of Hugging Face's"),
    "no ranks": (ranks(b"hello"), r"tiny.tiktoken' is no file of ranks with its pattern \("),
    "no base64": (ranks(b"!!!! 262"), r"tiny.tiktoken' is no file of ranks with its pattern \("),
    "a rank twice": (ranks(b"Zm94 3"), r"\(its ranks are not 0 to n - 1, each once\)"),
    "bytes twice": (ranks(base64.b64encode(b"the") + b" 262"), r"\(its ranks are not 0 to n - 1, each once\)"),
    "cut": (cut, r"\(56 bytes have no rank, such as 0x00\)"),
    "no pattern": (without_pattern, r"tiny.pattern, which says how text is split .* is missing"),
    "empty pattern": (lambda folder: write_tiktoken(folder, pattern="\n"), r"tiny.pattern is empty"),
    "no expression": (lambda folder: write_tiktoken(folder, pattern="(a"), r"is no file of ranks with its pat"),
    "missing": (lambda folder: folder / "nope.tiktoken", r"nope.tiktoken' not found; give 'default'"),
    "missing JSON": (lambda folder: folder / "nope.json", r"nope.json' not found; give 'default'"),
}


@pytest.mark.parametrize("write, message", ERRORS.values(), ids=ERRORS)
def test_what_is_no_tokenizer_is_named(tmp_path, write, message):
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(str(write(tmp_path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, kind", [("tokenizers", "huggingface"), ("tiktoken", "tiktoken")])
def test_a_library_that_is_not_installed_is_named(tmp_path, monkeypatch, name, kind):
    """Also where the run was trained elsewhere; needs neither of them."""
    monkeypatch.setitem(sys.modules, name, None)
    file = tmp_path / ("x.json" if kind == "huggingface" else "x.tiktoken")
    file.write_text("x")
    file.with_suffix(".pattern").write_text("x")
    message = rf"^this tokenizer needs the library {name}: pip install '{name}', or tfusion\[{kind}\]$"
    with pytest.raises(UserError, match=message):
        load_tokenizer(str(file))
    file.rename(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"kind": kind, "fingerprint": "", "pattern": "x"}))
    with pytest.raises(UserError, match=message):
        load_saved(tmp_path)
