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

from experiments.common import base, parse, run

FILES = dict(share=1.0, heldout_fraction=0.02)
KINDS = {"folder": FILES, "jsonl": FILES, "glosses": dict(share=1.0)}
EXAMPLES = "photos=folder, notes=jsonl"


def make_sources(named: list[str]) -> dict:
    """{NAME: its source} of the words NAME=KIND; the path is the name until a flag gives another."""
    sources = {}
    for word in named or ["photos=folder"]:
        name, kind = word.split("=", 1)
        if not name.isidentifier() or name in sources or kind not in KINDS:
            raise ValueError(f"variant '{word}': a source is NAME=KIND, once; kinds: {', '.join(KINDS)}")
        sources[name] = dict(kind=kind, **KINDS[kind], **(dict(path=name) if KINDS[kind] is FILES else {}))
    return sources


def transfusion() -> ConfigDict:
    config = base()
    config.model.update(
        num_layers=4, d_model=128, num_heads=4, num_kv_heads=4, d_ff=336, text_vocab_size=1022, remat="none",
        compute_dtype="float32")
    config.model.adapter.update(latent_size=8, latent_channels=8, patch_positions="learned")
    config.process.prediction = "v"
    config.data.update(
        prepared="runs/own/data", tokenizer="default", seq_len=256, image_share=0.8, window_rows=128,
        image_first_fraction=0.45, image_first_max_t=0.25)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=60, b2=0.98, weight_decay=0.02, ema_decay=0.995)
    config.train.update(
        num_steps=4000, batch_size=4, log_every=50, eval_every=1000, eval_documents=128, diagnostics_every=1000,
        checkpoint_every=1000)
    config.sampling.update(sampler="ddim", num_inference_steps=25, guidance_scale=2.5)
    return config


def autoencoder() -> ConfigDict:
    config = ConfigDict(dict(
        objective="autoencoder", **run(), data=dict(sources=dict()),
        autoencoder=dict(image_size=32, latent_channels=8, downsample=4, width=64, num_blocks=1,
                         kl_weight=1e-5)))
    config.optimizer.update(learning_rate=3e-3, warmup_steps=60, b2=0.99, weight_decay=1e-4, ema_decay=0.995)
    config.train.update(
        num_steps=5000, batch_size=32, log_every=50, eval_every=1000, eval_documents=256, diagnostics_every=0,
        checkpoint_every=2500)
    return config


def get_config(arg=None):
    words = arg.split(",") if arg else []
    try:
        chosen = parse(",".join(word for word in words if "=" not in word),
                       objective=("transfusion", "autoencoder"), length=("smoke",))
    except ValueError as e:
        raise ValueError(f"{e}; and sources, NAME=KIND: {EXAMPLES}") from None
    config = autoencoder() if chosen["objective"] == "autoencoder" else transfusion()
    config.data.sources = make_sources([word for word in words if "=" in word])
    if chosen["length"] == "smoke":  # the same path in seconds
        config.train.update(num_steps=60, log_every=20, eval_every=30, eval_documents=16, checkpoint_every=30)
        if "prepared" in config.data:
            config.data.prepared = "runs/own_smoke/data"
    return config
