"""Your own captioned pictures, 32 pixels wide, on a CPU: from a folder to samples in three commands.

  python -m tfusion.train   --config=experiments/own_data.py:autoencoder --config.data.sources.photos.path=DIR \
      --workdir=runs/own/autoencoder
  python -m tfusion.prepare --config=experiments/own_data.py --config.data.sources.photos.path=DIR \
      --codec=runs/own/autoencoder
  python -m tfusion.train   --config=experiments/own_data.py --config.data.sources.photos.path=DIR \
      --workdir=runs/own/transfusion
  python -m tfusion.sample  --workdir=runs/own/transfusion --prompt="a photo of a frog" --draw

and what has become of it, drawn and told, in a page: runs/own/transfusion/report.html

  python -m tfusion.evaluate --workdir=runs/own/transfusion
  python -m tfusion.report   --workdir=runs/own/transfusion

DIR holds pictures, each with its caption in NAME.txt beside it, or in a metadata.jsonl or CSV (docs/data.md).
NAME=KIND names other sources, each with `path` and `share` (but for glosses, which come with the package):

  python -m tfusion.prepare --config=experiments/own_data.py:photos=folder,notes=jsonl \
      --config.data.sources.photos.path=DIR --config.data.sources.notes.path=DIR/notes.jsonl \
      --config.data.prepared=runs/both/data --codec=runs/own/autoencoder

The quickstart's settings, but for rows twice as long, which hold captions of a hundred words, and slots for
images wherever they fit. The tokenizer is the shipped one, though it learnt from emoji captions and a
dictionary: it takes half as many tokens as bytes do for English, and spells in bytes what it does not know, so
that any text comes back as it was.
"""

from ml_collections import ConfigDict

from experiments.common import base, parse, shorten, small_autoencoder, small_transformer

FILES = dict(share=1.0, heldout_fraction=0.05)
KINDS = {"folder": FILES, "jsonl": FILES, "array_record": FILES | dict(heldout_path="none"),
         "tfds": FILES | dict(train_split="train", heldout_split="none", image="image", text="text",
                              key="none"),
         "glosses": dict(share=1.0)}
EXAMPLES = "photos=folder, notes=jsonl"


def make_sources(named: list[str]) -> dict:
    """{NAME: its source} of the words NAME=KIND; the path is the name until a flag gives another."""
    sources = {}
    for word in named or ["photos=folder"]:
        name, kind = word.split("=", 1)
        if not name.isidentifier() or name in sources or kind not in KINDS:
            raise ValueError(f"variant '{word}': a source is NAME=KIND, once; kinds: {', '.join(KINDS)}")
        sources[name] = dict(kind=kind, **KINDS[kind], **(dict(path=name) if kind != "glosses" else {}))
    return sources


def transfusion() -> ConfigDict:
    config = base()
    small_transformer(config)
    config.data.update(prepared="runs/own/data", seq_len=256, image_share=0.8, window_rows=128)
    config.train.update(num_steps=4000, checkpoint_every=1000)
    return config


def get_config(arg=None):
    words = arg.split(",") if arg else []
    try:
        chosen = parse(",".join(word for word in words if "=" not in word),
                       objective=("transfusion", "autoencoder"), length=("smoke",))
    except ValueError as e:
        raise ValueError(f"{e}; and sources, NAME=KIND: {EXAMPLES}") from None
    config = small_autoencoder() if chosen["objective"] == "autoencoder" else transfusion()
    config.data.sources = make_sources([word for word in words if "=" in word])
    if chosen["length"] == "smoke":
        shorten(config)
        if "prepared" in config.data:
            config.data.prepared = "runs/own_smoke/data"
    return config
