"""Text to ids and back: bytes, the shipped SentencePiece model, or any other one.

Ids run from 0 to V - 1 (V = `vocab_size`); image symbols are added behind them by others (BOI = V,
EOI = V + 1), so that a tokenizer knows nothing of images.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import sentencepiece

from tfusion.data import packs
from tfusion.errors import UserError
from tfusion.types import BOS, EOS

ABOUT, MODEL = "tokenizer.json", "tokenizer.model"
SAVED = (ABOUT, MODEL)  # the files that a tokenizer leaves in a folder, as far as it has them


class Tokenizer(Protocol):
    """What the data pipeline and the sampler need of a tokenizer.

    vocab_size: V, the number of text ids, specials included.
    pad, bos, eos, unk: ids of the specials.
    fingerprint: sha256 (hex) of what defines the mapping; equal means interchangeable.
    """

    vocab_size: int
    pad: int
    bos: int
    eos: int
    unk: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without specials around it."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, passing over specials and ids that are no text (image symbols)."""

    def piece(self, token: int) -> str:
        """How one id is written in a picture, such as ' panda', '<bos>' or '<0xF0>'.

        Raises:
          ValueError: the id is not in 0..V-1.
        """

    def save(self, folder: Path) -> None:
        """Writes what `load_saved` needs, under the names of SAVED."""


class ByteTokenizer:
    """UTF-8 bytes: 0/1/2/3 = pad/bos/eos/unk, then byte b at id b + 4."""

    pad, bos, eos, unk = 0, 1, 2, 3
    vocab_size = 260
    fingerprint = hashlib.sha256(
        b"utf-8 bytes from id 4; pad, bos, eos, unk = 0, 1, 2, 3"
    ).hexdigest()

    def encode(self, text: str) -> list[int]:
        return [byte + 4 for byte in text.encode()]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        # Bytes that are not UTF-8 (a half-trained model writes them) become U+FFFD.
        return bytes(int(i) - 4 for i in ids if 4 <= i < self.vocab_size).decode(errors="replace")

    def piece(self, token: int) -> str:
        _check_id(token, self.vocab_size)
        if token < 4:
            return ("<pad>", "<bos>", "<eos>", "<unk>")[token]
        byte = chr(token - 4)
        return byte if byte.isascii() and byte.isprintable() else f"<0x{token - 4:02X}>"

    def save(self, folder: Path) -> None:
        _write_about(self, "byte", folder)


class SentencePieceTokenizer:
    """Any SentencePiece model with bos and eos; one without a pad (Llama 2's) pads with id 0.

    Raises:
      UserError: there is no such file, it is not a SentencePiece model, or bos and eos are not 1 and 2.
    """

    def __init__(self, path: str | Path):
        if not Path(path).is_file():
            raise UserError(
                f"tokenizer {str(path)!r} not found; give 'default', 'byte' or the path of a "
                "SentencePiece model"
            )
        model = Path(path).read_bytes()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
            self.vocab_size = self._processor.get_piece_size()
        except RuntimeError:
            self.vocab_size = 0
        if not self.vocab_size:
            raise UserError(
                f"tokenizer {str(path)!r} is not a SentencePiece model; give 'default', 'byte' or "
                "the path of a file such as tokenizer.model"
            )
        self.pad = max(self._processor.pad_id(), 0)
        self.bos, self.eos = self._processor.bos_id(), self._processor.eos_id()
        self.unk = self._processor.unk_id()
        if (self.bos, self.eos) != (BOS, EOS):
            raise UserError(
                f"tokenizer {str(path)!r} has bos id {self.bos} and eos id {self.eos}; rows are laid out "
                f"with {BOS} and {EOS}: train the model with bos_id={BOS} and eos_id={EOS}"
            )
        self._model, self.fingerprint = model, hashlib.sha256(model).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(list(texts))

    def decode(self, ids: Iterable[int]) -> str:
        specials = {self.pad, self.bos, self.eos, self.unk}
        text_ids = [int(i) for i in ids if 0 <= i < self.vocab_size and int(i) not in specials]
        return self._processor.decode(text_ids)

    def piece(self, token: int) -> str:
        _check_id(token, self.vocab_size)
        return self._processor.id_to_piece(int(token)).replace("\u2581", " ")

    def save(self, folder: Path) -> None:
        (folder / MODEL).write_bytes(self._model)
        _write_about(self, "sentencepiece", folder)


def _check_id(token: int, vocab_size: int) -> None:
    if not 0 <= token < vocab_size:
        raise ValueError(f"token id {token} is not a text id; choose 0 to {vocab_size - 1}")


def _write_about(tokenizer: Tokenizer, kind: str, folder: Path) -> None:
    about = {"kind": kind, "fingerprint": tokenizer.fingerprint}
    (folder / ABOUT).write_text(json.dumps(about) + "\n")


def load_saved(folder) -> Tokenizer:
    """The tokenizer that was saved in a folder. Raises UserError where it is missing or broken."""
    path = Path(folder) / ABOUT
    try:
        about = json.loads(path.read_text())
        byte = about["kind"] == "byte"
        tokenizer = ByteTokenizer() if byte else SentencePieceTokenizer(path.with_name(MODEL))
        whole = tokenizer.fingerprint == about["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"the tokenizer in {folder} is missing or broken ({e})") from e
    if not whole:
        raise UserError(f"{path.with_name(MODEL)} is not the tokenizer that {path} describes: bring the former "
                        "back")
    return tokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """Opens a tokenizer: 'byte', 'default' (the shipped model), or a SentencePiece model's path.

    Raises:
      UserError: there is no such file, or it is not a usable SentencePiece model.
    """
    if name == "byte":
        return ByteTokenizer()
    return SentencePieceTokenizer(packs.pack_path(packs.TOKENIZER) if name == "default" else name)
