"""A Transfusion small enough for two CPU cores and eight minutes; `make quickstart` runs all of it.

  python -m tfusion.train   --config=experiments/quickstart.py:autoencoder --workdir=runs/quickstart/autoencoder
  python -m tfusion.prepare --config=experiments/quickstart.py --autoencoder=runs/quickstart/autoencoder
  python -m tfusion.train   --config=experiments/quickstart.py --workdir=runs/quickstart/transfusion

Its own settings, not the paper's: v-prediction (at this size eps, whose coarse errors at high noise are
divided by sqrt(alphabar), draws few sprites right), learnt patch positions, pictures first more often
and with little noise, and a short, fast optimizer schedule. docs/recipe.md has the reasons.
"""

from experiments.common import base, parse


def get_config(arg=None):
    chosen = parse(arg, objective=("transfusion", "autoencoder"), length=("smoke",))
    config = base()
    config.model.update(
        num_layers=4, d_model=128, num_heads=4, num_kv_heads=4, d_ff=336, text_vocab_size=1022,
        latent_size=8, latent_channels=8, patch_positions="learned", remat="none", compute_dtype="float32")
    config.diffusion.prediction = "v"
    config.autoencoder.update(width=64, num_blocks=1, downsample=4, kl_weight=1e-5)
    config.data.update(
        prepared="runs/quickstart/data", tokenizer="default", seq_len=128, image_share=0.55, window_rows=256,
        image_first_fraction=0.45, image_first_max_t=0.25, num_scenes=32_000)
    config.data.mixture = dict(scenes=0.66, stories=0.22, glosses=0.12)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=60, b2=0.98, weight_decay=0.02, ema_decay=0.995)
    config.train.update(
        num_steps=7500, batch_size=4, log_every=50, eval_every=1000, eval_documents=128, diagnostics_every=1000,
        checkpoint_every=1500)
    config.sampling.update(sampler="ddim", num_inference_steps=25, guidance_scale=2.5)
    if chosen["objective"] == "autoencoder":
        config.objective = "autoencoder"
        config.train.update(num_steps=5000, batch_size=32, eval_every=1000, eval_documents=256,
                            diagnostics_every=0, checkpoint_every=2500)
        config.optimizer.update(b2=0.99, weight_decay=1e-4)
    if chosen["length"] == "smoke":  # the same path in seconds, for CI
        config.data.prepared = "runs/smoke/data"
        config.data.num_scenes = 2000
        config.train.update(num_steps=60, log_every=20, eval_every=30, eval_documents=16, checkpoint_every=30)
    return config
