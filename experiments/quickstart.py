"""A Transfusion small enough for two CPU cores and eight minutes; `make quickstart` runs all of it.

  python -m tfusion.train   --config=experiments/quickstart.py:autoencoder --workdir=runs/quickstart/autoencoder
  python -m tfusion.prepare --config=experiments/quickstart.py --codec=runs/quickstart/autoencoder
  python -m tfusion.train   --config=experiments/quickstart.py --workdir=runs/quickstart/transfusion

`quickstart.py:chameleon` is the baseline: the same pictures as codes of a VQ tokenizer, one next-token loss.

`quickstart.py:captions_last` shows how shares change on the way: over the last fifth of the run that
of the dictionary goes to 0, and what is learnt at last are captions with their pictures.

Its own settings, not the paper's: v-prediction (at this size eps, whose coarse errors at high noise are
divided by sqrt(alphabar), draws few sprites right), learnt patch positions, pictures first more often
and with little noise, and a short, fast optimizer schedule. docs/recipe.md has the reasons.
"""

from ml_collections import ConfigDict

from experiments.common import (
    base,
    parse,
    shorten,
    small_autoencoder,
    small_chameleon,
    small_transformer,
    small_vq,
)


def world(kind: str, share: float, num_records: int) -> dict:
    return dict(kind=kind, share=share, num_records=num_records, num_sprites=24, jitter=1)


def sources(smoke: bool, glosses) -> dict:
    scenes = 2000 if smoke else 32_000
    return dict(scenes=world("scenes", 0.66, scenes), stories=world("stories", 0.22, scenes // 4),
                glosses=dict(kind="glosses", share=glosses))


def transfusion() -> ConfigDict:
    config = base()
    small_transformer(config)
    config.data.update(prepared="runs/quickstart/data", seq_len=128, image_share=0.55, window_rows=256)
    config.train.update(num_steps=7500, checkpoint_every=1500)
    return config


def chameleon() -> ConfigDict:
    """The same pictures as 64 codes each, in rows twice as long."""
    config = small_chameleon()
    config.optimizer.learning_rate = 1e-3
    config.data.update(prepared="runs/quickstart/codes", seq_len=256, image_share=0.76, window_rows=256)
    config.train.update(num_steps=7500, checkpoint_every=1500)
    return config


OBJECTIVES = {"transfusion": transfusion, "autoencoder": small_autoencoder, "chameleon": chameleon,
              "vq": small_vq}


def get_config(arg=None):
    chosen = parse(arg, objective=OBJECTIVES, length=("smoke",), mixture=("captions_last",))
    config = OBJECTIVES[chosen["objective"] or "transfusion"]()
    if chosen["length"] == "smoke":
        shorten(config)
        if "prepared" in config.data:
            config.data.prepared = config.data.prepared.replace("quickstart", "smoke")
    glosses = 0.12
    if chosen["mixture"] and "image_share" in config.data:
        rows = config.train.num_steps * config.train.batch_size
        glosses = ((0, glosses), (rows * 4 // 5, glosses), (rows, 0.0))
        most = dict(transfusion=0.62, chameleon=0.87)  # there is, at the end
        config.data.image_share = most[config.objective]
    config.data.sources = sources(chosen["length"] == "smoke", glosses)
    return config
