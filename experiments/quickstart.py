"""A Transfusion small enough for two CPU cores and eight minutes; `make quickstart` runs all of it.

  python -m tfusion.train   --config=experiments/quickstart.py:autoencoder --workdir=runs/quickstart/autoencoder
  python -m tfusion.prepare --config=experiments/quickstart.py --codec=runs/quickstart/autoencoder
  python -m tfusion.train   --config=experiments/quickstart.py --workdir=runs/quickstart/transfusion

Its own settings, not the paper's: v-prediction (at this size eps, whose coarse errors at high noise are
divided by sqrt(alphabar), draws few sprites right), learnt patch positions, pictures first more often
and with little noise, and a short, fast optimizer schedule. docs/recipe.md has the reasons.
"""

from ml_collections import ConfigDict

from experiments.common import base, parse, shorten, small_autoencoder, small_transformer


def world(kind: str, share: float, num_records: int) -> dict:
    return dict(kind=kind, share=share, num_records=num_records, num_sprites=24, jitter=1)


def sources(smoke: bool) -> dict:
    scenes = 2000 if smoke else 32_000
    return dict(scenes=world("scenes", 0.66, scenes), stories=world("stories", 0.22, scenes // 4),
                glosses=dict(kind="glosses", share=0.12))


def transfusion() -> ConfigDict:
    config = base()
    small_transformer(config)
    config.data.update(prepared="runs/quickstart/data", seq_len=128, image_share=0.55, window_rows=256)
    config.train.update(num_steps=7500, checkpoint_every=1500)
    return config


def get_config(arg=None):
    chosen = parse(arg, objective=("transfusion", "autoencoder"), length=("smoke",))
    config = small_autoencoder() if chosen["objective"] == "autoencoder" else transfusion()
    config.data.sources = sources(smoke=chosen["length"] == "smoke")
    if chosen["length"] == "smoke":
        shorten(config)
        if "prepared" in config.data:
            config.data.prepared = "runs/smoke/data"
    return config
