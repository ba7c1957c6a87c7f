"""Text to ids and back, one file a kind: bytes, SentencePiece, Hugging Face's tokenizers, tiktoken."""

import json
from pathlib import Path

from tfusion import paths
from tfusion.data import packs
from tfusion.data.tokenizers.base import ABOUT, MODEL, SAVED, Tokenizer
from tfusion.data.tokenizers.byte import ByteTokenizer
from tfusion.data.tokenizers.huggingface import HuggingFaceTokenizer
from tfusion.data.tokenizers.sentencepiece import SentencePieceTokenizer
from tfusion.data.tokenizers.tiktoken import ENDING, TiktokenTokenizer
from tfusion.errors import UserError

__all__ = ["SAVED", "ByteTokenizer", "HuggingFaceTokenizer", "SentencePieceTokenizer", "TiktokenTokenizer",
           "Tokenizer", "load_saved", "load_tokenizer"]

KINDS = {  # how a saved one is opened: by its model's path, and what the folder says of it
    "byte": lambda model, about: ByteTokenizer(),
    "sentencepiece": lambda model, about: SentencePieceTokenizer(model),
    "huggingface": lambda model, about: HuggingFaceTokenizer(model),
    "tiktoken": lambda model, about: TiktokenTokenizer(model, about["pattern"]),
}


def load_saved(folder) -> Tokenizer:
    """The tokenizer that was saved in a folder. Raises UserError where it is missing or broken, or needs a
    library that is not here."""
    path = paths.path(folder) / ABOUT
    try:
        about = json.loads(path.read_text())
        tokenizer = KINDS[about["kind"]](path.with_name(MODEL), about)
        whole = tokenizer.fingerprint == about["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        if isinstance(e.__cause__, ImportError):
            raise
        raise UserError(f"the tokenizer in {folder} is missing or broken ({e})") from e
    if not whole:
        raise UserError(f"{path.with_name(MODEL)} is not the tokenizer that {path} describes: bring the former "
                        "back")
    return tokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """Opens a tokenizer: 'byte', 'default' (the shipped model), or by a path: Hugging Face's JSON where it
    ends in .json, ranks where in .tiktoken, else a SentencePiece model.

    Raises:
      UserError: there is no such file, it is not usable, or its library is not installed.
    """
    if name == "byte":
        return ByteTokenizer()
    if name == "default":
        return SentencePieceTokenizer(packs.pack_path(packs.TOKENIZER))
    kind = {".json": HuggingFaceTokenizer, ENDING: TiktokenTokenizer}
    return kind.get(Path(name).suffix.lower(), SentencePieceTokenizer)(name)
