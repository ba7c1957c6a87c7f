"""What every tokenizer is, and which ids it has.

Ids run from 0 to V - 1 (V = `vocab_size`); image symbols are added behind them by others (BOI = V,
EOI = V + 1), so that a tokenizer knows nothing of images. Rows are laid out with pad, bos, eos = 0, 1, 2. A
model that has bos 1 and eos 2 itself, as Llama 2's, keeps its ids. Any other's are moved behind our four: its
id i is i + SHIFT, and V its size + SHIFT. One addition, whatever specials it has and wherever they stand, and
none of them can be taken for one of ours; to rows they are pieces like others.
"""

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from tfusion import paths
from tfusion.errors import UserError

SHIFT = 4  # pad, bos, eos, unk
ABOUT, MODEL = "tokenizer.json", "tokenizer.model"
SAVED = (ABOUT, MODEL)  # the files that a tokenizer leaves in a folder, as far as it has them
CHOICES = ("give 'default', 'byte' or the path of a SentencePiece model, a Hugging Face tokenizer.json or a "
           "NAME.tiktoken")


class Tokenizer(Protocol):
    """What the data pipeline and the sampler need of a tokenizer.

    vocab_size: V, the number of text ids, specials included.
    pad, bos, eos, unk: ids of the specials.
    shift: what the ids of its model were moved by; 0 where they are its own.
    fingerprint: sha256 (hex) of what defines the mapping; equal means interchangeable.
    """

    vocab_size: int
    pad: int
    bos: int
    eos: int
    unk: int
    shift: int
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


def special(token: int, vocab_size: int) -> str | None:
    """How one of our four is written; None for a model's own. Raises ValueError where the id is no text id."""
    if not 0 <= token < vocab_size:
        raise ValueError(f"token id {token} is not a text id; choose 0 to {vocab_size - 1}")
    return ("<pad>", "<bos>", "<eos>", "<unk>")[token] if token < SHIFT else None


def read_model(path: str | Path) -> bytes:
    path = paths.path(path)
    if not path.is_file():
        raise UserError(f"tokenizer {str(path)!r} not found; {CHOICES}")
    return path.read_bytes()


def library(name: str, extra: str):
    """A library that not everyone needs. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise UserError(f"this tokenizer needs the library {name}: pip install '{name}', or tfusion[{extra}]"
                        ) from e


def write_about(tokenizer: Tokenizer, kind: str, folder: Path, **more) -> None:
    about = {"kind": kind, "fingerprint": tokenizer.fingerprint, **more}
    (folder / ABOUT).write_text(json.dumps(about) + "\n")
