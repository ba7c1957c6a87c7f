"""A Transfusion small enough for two CPU cores and eight minutes; `make quickstart` runs all of it.

  python -m tfusion.train   --config=experiments/quickstart.py:autoencoder --workdir=runs/quickstart/autoencoder
  python -m tfusion.prepare --config=experiments/quickstart.py --codec=runs/quickstart/autoencoder
  python -m tfusion.train   --config=experiments/quickstart.py --workdir=runs/quickstart/transfusion

Its own settings, not the paper's: v-prediction (at this size eps, whose coarse errors at high noise are
divided by sqrt(alphabar), draws few sprites right), learnt patch positions, pictures first more often
and with little noise, and a short, fast optimizer schedule. docs/recipe.md has the reasons.
"""

from ml_collections import ConfigDict

from experiments.common import base, parse, run


def world(kind: str, share: float, num_records: int) -> dict:
    return dict(kind=kind, share=share, num_records=num_records, num_sprites=24, jitter=1)


def sources(smoke: bool) -> dict:
    scenes = 2000 if smoke else 32_000
    return dict(scenes=world("scenes", 0.66, scenes), stories=world("stories", 0.22, scenes // 4),
                glosses=dict(kind="glosses", share=0.12))


def transfusion() -> ConfigDict:
    config = base()
    config.model.update(
        num_layers=4, d_model=128, num_heads=4, num_kv_heads=4, d_ff=336, text_vocab_size=1022, remat="none",
        compute_dtype="float32")
    config.model.adapter.update(latent_size=8, latent_channels=8, patch_positions="learned")
    config.process.prediction = "v"
    config.data.update(
        prepared="runs/quickstart/data", tokenizer="default", seq_len=128, image_share=0.55, window_rows=256,
        image_first_fraction=0.45, image_first_max_t=0.25)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=60, b2=0.98, weight_decay=0.02, ema_decay=0.995)
    config.train.update(
        num_steps=7500, batch_size=4, log_every=50, eval_every=1000, eval_documents=128, diagnostics_every=1000,
        checkpoint_every=1500)
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
    chosen = parse(arg, objective=("transfusion", "autoencoder"), length=("smoke",))
    config = autoencoder() if chosen["objective"] == "autoencoder" else transfusion()
    config.data.sources = sources(smoke=chosen["length"] == "smoke")
    if chosen["length"] == "smoke":  # the same path in seconds, for CI
        if "prepared" in config.data:
            config.data.prepared = "runs/smoke/data"
        config.train.update(num_steps=60, log_every=20, eval_every=30, eval_documents=16, checkpoint_every=30)
    return config
