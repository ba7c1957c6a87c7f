"""SentencePiece models: the shipped one, Llama 2's, or any other."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from tfusion.data.tokenizers.base import CHOICES, MODEL, SHIFT, read_model, special, write_about
from tfusion.errors import UserError
from tfusion.types import BOS, EOS

RULE = b"SentencePiece, ids from 4; pad, bos, eos, unk = 0, 1, 2, 3\n"


class SentencePieceTokenizer:
    """Ids are the model's where its bos and eos are 1 and 2 (it may lack a pad, as Llama 2's: rows are padded
    with id 0); else its id i is i + SHIFT.

    Raises:
      UserError: there is no such file, or it is not a SentencePiece model.
    """

    def __init__(self, path: str | Path):
        model = read_model(path)
        self._processor = own = sentencepiece.SentencePieceProcessor()
        try:
            own.LoadFromSerializedProto(model)
            size = own.get_piece_size()
        except RuntimeError:
            size = 0
        if not size:
            raise UserError(f"tokenizer {str(path)!r} is not a SentencePiece model; {CHOICES}")
        self._specials = {own.pad_id(), own.bos_id(), own.eos_id(), own.unk_id()}
        self._model, self.bos, self.eos = model, BOS, EOS
        if (own.bos_id(), own.eos_id()) == (BOS, EOS):
            self.shift, self.pad, self.unk, rule = 0, max(own.pad_id(), 0), own.unk_id(), b""
        else:
            self.shift, self.pad, self.unk, rule = SHIFT, 0, own.unk_id() + SHIFT, RULE
        self.vocab_size = size + self.shift
        self.fingerprint = hashlib.sha256(rule + model).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        ids = self._processor.encode(list(texts))
        return [[i + self.shift for i in some] for some in ids] if self.shift else ids

    def decode(self, ids: Iterable[int]) -> str:
        own = (int(i) - self.shift for i in ids if self.shift <= i < self.vocab_size)
        return self._processor.decode([i for i in own if i not in self._specials | {self.pad - self.shift}])

    def piece(self, token: int) -> str:
        named = special(token, self.vocab_size)
        return named if named and self.shift else self._processor.id_to_piece(
            int(token) - self.shift).replace("\u2581", " ")

    def save(self, folder: Path) -> None:
        (folder / MODEL).write_bytes(self._model)
        write_about(self, "sentencepiece", folder)
