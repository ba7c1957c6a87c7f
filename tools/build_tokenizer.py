"""Trains the shipped tokenizer: `python -m tools.build_tokenizer` (for maintainers).

A byte-fallback BPE of 1,022 pieces, which the two image symbols bring to 1,024 ids, learnt from
every tenth WordNet gloss, captions of composed scenes and the emoji's labels. Takes seconds on
one core and gives the same file each time.
"""

import argparse
import hashlib
import io
from pathlib import Path

import sentencepiece

from tfusion.data import packs, scenes, tokenizers

VOCAB_SIZE = 1022
GLOSS_STRIDE = 10
NUM_CAPTIONS = 8000


def captions() -> list[str]:
    """Captions of scenes with every noun; training scenes only, none that is held out."""
    world = scenes.World(num_sprites=len(scenes.NOUNS))
    return [scenes.make_scene(world, 0, i, False).caption for i in range(NUM_CAPTIONS)]


def corpus() -> list[str]:
    """The training lines, always the same."""
    labels = [entry["label"] for entry in packs.open_emoji().meta]
    return packs.read_glosses()[::GLOSS_STRIDE] + captions() + labels


def train(lines: list[str]) -> bytes:
    """Trains the BPE and returns the serialized model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def report(path: Path) -> None:
    """Prints how well the model suits the world: whole words, and tokens per caption and gloss."""
    tokenizer = tokenizers.SentencePieceTokenizer(path)
    for what, words in (("nouns", scenes.NOUNS), ("canvases", scenes.CANVASES)):
        split = [word for word in words if len(tokenizer.encode(word)) > 1]
        print(f"{what}: {len(words) - len(split)} of {len(words)} are one piece; split: {split}")
    glosses = packs.read_glosses()[1::GLOSS_STRIDE]  # none of these was trained on
    for what, texts in (("caption", captions()), ("gloss", glosses)):
        counts = [len(ids) for ids in tokenizer.encode_batch(texts)]
        print(
            f"tokens per {what}: mean {sum(counts) / len(counts):.1f}, max {max(counts)}, "
            f"{sum(map(len, texts)) / sum(counts):.2f} characters per token"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(packs.__file__).parent / packs.TOKENIZER
    parser.add_argument("--output", type=Path, default=default, help="model file to write")
    args = parser.parse_args()
    model = train(corpus())
    args.output.write_bytes(model)
    print(f"{args.output}: {len(model)} bytes, sha256 {hashlib.sha256(model).hexdigest()}")
    report(args.output)


if __name__ == "__main__":
    main()
