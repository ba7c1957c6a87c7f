"""Files of ranks as tiktoken has them, of GPT-4, Llama 3 and others: NAME.tiktoken, and NAME.pattern beside it.

The file of ranks does not say how text is split before; NAME.pattern does, the regular expression alone, in
UTF-8. Where there is a network once, both come from

  import pathlib, tiktoken, tiktoken.load
  own = tiktoken.get_encoding("o200k_base")
  tiktoken.load.dump_tiktoken_bpe(own._mergeable_ranks, "o200k_base.tiktoken")
  pathlib.Path("o200k_base.pattern").write_text(own._pat_str)
"""

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path

from tfusion.data.tokenizers.base import CHOICES, MODEL, SHIFT, library, read_model, special, write_about
from tfusion.errors import UserError

RULE = b"tiktoken, ids from 4; pad, bos, eos, unk = 0, 1, 2, 3; split by "
ENDING, PATTERN = ".tiktoken", ".pattern"


def read_ranks(model: bytes) -> dict[bytes, int]:
    """{bytes: rank} of lines `base64 rank`. Raises ValueError where they are not ranks 0 to n - 1 of different
    bytes, or some byte has none: text with it could not be encoded."""
    pairs = [line.split() for line in model.splitlines() if line.strip()]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    if sorted(ranks.values()) != list(range(len(pairs))):
        raise ValueError("its ranks are not 0 to n - 1, each once")
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking:
        raise ValueError(f"{len(lacking)} bytes have no rank, such as 0x{lacking[0]:02X}")
    return ranks


class TiktokenTokenizer:
    """The rank r is id r + SHIFT. The encoding's special tokens are none here: words that spell them are text.

    pattern: the regular expression; None: it stands in NAME.pattern.

    Raises:
      UserError: a file is missing, it holds no ranks or no pattern, or the library is not installed.
    """

    pad, bos, eos, unk = 0, 1, 2, 3
    shift = SHIFT

    def __init__(self, path: str | Path, pattern: str | None = None):
        model = read_model(path)
        if pattern is None:
            pattern = _read_pattern(Path(path).with_suffix(PATTERN))
        self._open(model, pattern, path)

    def _open(self, model: bytes, pattern: str, path) -> None:
        tiktoken = library("tiktoken", "tiktoken")
        try:
            ranks = read_ranks(model)
            self._own = tiktoken.Encoding("ranks", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        except ValueError as e:
            raise UserError(f"tokenizer {str(path)!r} is no file of ranks with its pattern ({str(e)[:80]}); "
                            f"{CHOICES}") from e
        self._model, self._pattern = model, pattern
        self.vocab_size = len(ranks) + SHIFT
        self.fingerprint = hashlib.sha256(RULE + pattern.encode() + b"\n" + model).hexdigest()

    def __getstate__(self) -> tuple[bytes, str]:
        return self._model, self._pattern

    def __setstate__(self, state: tuple[bytes, str]) -> None:
        self._open(*state, "")

    def encode(self, text: str) -> list[int]:
        return [i + SHIFT for i in self._own.encode_ordinary(text)]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[i + SHIFT for i in ids] for ids in self._own.encode_ordinary_batch(list(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        return self._own.decode([int(i) - SHIFT for i in ids if SHIFT <= i < self.vocab_size])

    def piece(self, token: int) -> str:
        if named := special(token, self.vocab_size):
            return named
        own = self._own.decode_single_token_bytes(int(token) - SHIFT)
        try:
            return own.decode()
        except UnicodeDecodeError:  # some bytes of a letter
            return "".join(f"<0x{byte:02X}>" for byte in own)

    def save(self, folder: Path) -> None:
        (folder / MODEL).write_bytes(self._model)
        write_about(self, "tiktoken", folder, pattern=self._pattern)


def _read_pattern(path: Path) -> str:
    try:
        pattern = path.read_bytes().decode().strip("\r\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}, which says how text is split before {path.stem}{ENDING} applies, is missing "
                        "or not UTF-8: write the encoding's regular expression there (tiktoken.get_encoding("
                        "NAME)._pat_str)") from e
    if not pattern:
        raise UserError(f"{path} is empty: it holds the encoding's regular expression")
    return pattern
