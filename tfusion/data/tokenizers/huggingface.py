"""The JSON of Hugging Face's `tokenizers`, as tokenizer.json of Llama 3, GPT-2, Qwen and others."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tfusion.data.tokenizers.base import CHOICES, MODEL, SHIFT, library, read_model, special, write_about
from tfusion.errors import UserError

RULE = b"Hugging Face tokenizers, ids from 4; pad, bos, eos, unk = 0, 1, 2, 3\n"


class HuggingFaceTokenizer:
    """The model's id i is i + SHIFT.

    Texts are neither cut nor padded, whatever the file says, and nothing is put around them; words that spell
    a special token are spelt in pieces, as far as the model can. What its normaliser changes (capitals,
    accents) stays changed.

    Raises:
      UserError: there is no such file, it is no such JSON, or the library is not installed.
    """

    pad, bos, eos = 0, 1, 2
    shift = SHIFT

    def __init__(self, path: str | Path):
        self._open(read_model(path), path)

    def _open(self, model: bytes, path) -> None:
        tokenizers = library("tokenizers", "huggingface")
        try:
            self._own = own = tokenizers.Tokenizer.from_buffer(model)
        except Exception as e:  # the library raises Exception itself
            raise UserError(f"tokenizer {str(path)!r} is not a tokenizer.json of Hugging Face's tokenizers "
                            f"({str(e)[:80]}); {CHOICES}") from e
        own.no_truncation()
        own.no_padding()
        own.encode_special_tokens = True
        vocabulary = own.get_vocab(with_added_tokens=True)
        about = json.loads(model)["model"]  # a Unigram model names its unk by id
        unk = about.get("unk_id", vocabulary.get(about.get("unk_token")))
        self._model, self.unk = model, 3 if unk is None else unk + SHIFT
        self.vocab_size = max(vocabulary.values(), default=-1) + 1 + SHIFT  # there may be holes
        self.fingerprint = hashlib.sha256(RULE + model).hexdigest()

    def __getstate__(self) -> bytes:
        return self._model  # the library's own state forgets encode_special_tokens

    def __setstate__(self, model: bytes) -> None:
        self._open(model, "")

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        found = self._own.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[i + SHIFT for i in one.ids] for one in found]

    def decode(self, ids: Iterable[int]) -> str:
        own = [int(i) - SHIFT for i in ids if SHIFT <= i < self.vocab_size and i != self.unk]
        return self._own.decode(own, skip_special_tokens=False)

    def piece(self, token: int) -> str:
        if named := special(token, self.vocab_size):
            return named
        own = self._own.id_to_token(int(token) - SHIFT) or "<none>"
        text = self._own.decode([int(token) - SHIFT], skip_special_tokens=False)
        part = "\u2581" in own or not text or "\ufffd" in text  # a word's start, or some bytes of a letter
        return own.replace("\u2581", " ") if part else text

    def save(self, folder: Path) -> None:
        (folder / MODEL).write_bytes(self._model)
        write_about(self, "huggingface", folder)
