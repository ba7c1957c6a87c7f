"""Text as its UTF-8 bytes."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tfusion.data.tokenizers.base import SHIFT, special, write_about


class ByteTokenizer:
    """UTF-8 bytes: 0/1/2/3 = pad/bos/eos/unk, then byte b at id b + 4."""

    pad, bos, eos, unk = 0, 1, 2, 3
    shift, vocab_size = SHIFT, 256 + SHIFT
    fingerprint = hashlib.sha256(
        b"utf-8 bytes from id 4; pad, bos, eos, unk = 0, 1, 2, 3"
    ).hexdigest()

    def encode(self, text: str) -> list[int]:
        return [byte + SHIFT for byte in text.encode()]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        # Bytes that are not UTF-8 (a half-trained model writes them) become U+FFFD.
        return bytes(int(i) - SHIFT for i in ids if SHIFT <= i < self.vocab_size).decode(errors="replace")

    def piece(self, token: int) -> str:
        if named := special(token, self.vocab_size):
            return named
        byte = chr(token - SHIFT)
        return byte if byte.isascii() and byte.isprintable() else f"<0x{token - SHIFT:02X}>"

    def save(self, folder: Path) -> None:
        write_about(self, "byte", folder)
