"""What experiments are put together from: groups of keys with the Transfusion paper's values, and variants.

`base` is the paper's run with two additions of ours; experiments start from it, or from the groups that their
kind of training has, and change values.
"""

from ml_collections import ConfigDict

# Table 2 of arXiv 2408.11039: layers, width, heads; FFN width is Llama's 8 d / 3 rounded up to 256.
MODEL_SIZES = {
    "0.16b": dict(num_layers=16, d_model=768, num_heads=12, d_ff=2048),
    "0.37b": dict(num_layers=24, d_model=1024, num_heads=16, d_ff=2816),
    "0.76b": dict(num_layers=24, d_model=1536, num_heads=24, d_ff=4096),
    "1.4b": dict(num_layers=24, d_model=2048, num_heads=16, d_ff=5632),
    "7b": dict(num_layers=32, d_model=4096, num_heads=32, d_ff=11008),
}
STRICT = ("strict",)


def run() -> dict:
    """What every kind of training has."""
    return dict(
        seed=0,
        optimizer=dict(learning_rate=3e-4, warmup_steps=4000, decay_steps=0, b2=0.95, weight_decay=0.1,
                       ema_decay=0.9999),
        train=dict(
            num_steps=250_000, batch_size=512, num_microbatches=1, log_every=50, eval_every=5000,
            eval_documents=8192, diagnostics_every=1000, checkpoint_every=5000,
            checkpoint_minutes=0.0, keep_last=2, keep_every=0, keep_best="none", nonfinite="stop",
            watchdog_minutes=30.0, branch_from="none", init_from="none"),
        mesh=dict(data=1, fsdp=-1, sequence=1, tensor=1))


def transformer(size: str) -> dict:
    size = MODEL_SIZES[size]
    return dict(**size, num_kv_heads=size["num_heads"], qk_norm="none", norm_order="pre",
                remat="full", compute_dtype="bfloat16")


def linear_adapter() -> dict:
    return dict(kind="linear", latent_size=32, latent_channels=8, patch_size=2, patch_positions="none")


def use_rectified_flow(config: ConfigDict, times: str = "uniform", patches: int = 256) -> None:
    """In place of ddpm. patches: of an image; of more than 256 each t is shifted towards noise, of fewer
    towards the image (arXiv 2403.03206, section 5.3.2)."""
    config.process = dict(kind="flow", times=times, shift=(patches / 256) ** 0.5)
    config.sampling.sampler = "euler"


def packed_data(**sources) -> dict:
    return dict(
        prepared="data/prepared", tokenizer="data/tokenizer.model", seq_len=4096, image_share=0.5,
        window_rows=512, caption_dropout=0.1, image_first_fraction=0.2, image_first_max_t=1.0, sources=sources)


def files(kind: str, share: float, path: str) -> dict:
    """A source of the user's own: kind 'folder' (captioned pictures) or 'jsonl' (docs/data.md)."""
    return dict(kind=kind, share=share, path=path, heldout_fraction=0.01)


def base(size: str | None = None, preset: str | None = None) -> ConfigDict:
    """Transfusion as in the paper; docs/recipe.md says where it is silent.

    Of what the paper does not mention, two things change what is learnt: a moving average of the weights
    (ema_decay 0.9999) and captions dropped for guidance (caption_dropout 0.1). preset 'strict' has neither:
    guidance then compares with what the image-first pairs teach (docs/recipe.md, 1). size: 0.76b if None.
    """
    config = ConfigDict(dict(
        objective="transfusion", **run(),
        model=dict(**transformer(size or "0.76b"), text_vocab_size=32_000, image_attention="bidirectional",
                   adapter=linear_adapter()),
        process=dict(kind="ddpm", prediction="eps", num_timesteps=1000), loss_weight=5.0,
        data=packed_data(text=files("jsonl", 0.5, "data/text"), images=files("folder", 0.5, "data/images")),
        sampling=dict(sampler="ddpm", variance="fixed_small", num_inference_steps=250, guidance_scale=3.0)))
    return of_weeks(config, preset)


def of_weeks(config: ConfigDict, preset: str | None) -> ConfigDict:
    """On many chips, some of which fail: ten minutes are lost at most, or waited for in vain, and states to go
    back to are kept."""
    config.train.update(checkpoint_minutes=10.0, watchdog_minutes=10.0, keep_every=10_000, nonfinite="skip")
    if preset == "strict":
        config.optimizer.ema_decay = 0.0
        config.data.caption_dropout = 0.0
    return config


def chameleon(size: str | None = None, preset: str | None = None) -> ConfigDict:
    """The paper's baseline: the same transformer, data and schedule as `base`; images are 1,024 codes of a VQ
    tokenizer. What changes besides is Chameleon's: queries and keys normalised, norms behind the branches,
    z-loss, a third of the learning rate. Codes are sampled as its released code does."""
    config = ConfigDict(dict(
        objective="chameleon", **run(),
        model=dict(**transformer(size or "0.76b"), text_vocab_size=32_000, num_codes=16_384,
                   codes_per_image=1024),
        z_loss_weight=1e-5,
        data=packed_data(text=files("jsonl", 0.5, "data/text"), images=files("folder", 0.5, "data/images")),
        sampling=dict(temperature=0.7, top_p=0.9, guidance_scale=3.0)))
    config.model.update(qk_norm="layernorm", norm_order="post")
    config.optimizer.learning_rate = 1e-4
    config.data.prepared = "data/prepared_codes"
    return of_weeks(config, preset)


def small_transformer(config: ConfigDict) -> None:
    """Makes a base config one for two CPU cores and minutes: 32 x 32 pictures, the shipped tokenizer."""
    small(config)
    config.model.adapter.update(latent_size=8, latent_channels=8, patch_positions="learned")
    config.process.prediction = "v"
    config.sampling.update(sampler="ddim", num_inference_steps=25, guidance_scale=2.5)


def small(config: ConfigDict) -> None:
    """What of it any run on packed rows has."""
    config.model.update(
        num_layers=4, d_model=128, num_heads=4, num_kv_heads=4, d_ff=336, text_vocab_size=1022, remat="none",
        compute_dtype="float32")
    config.data.update(tokenizer="default", image_first_fraction=0.45, image_first_max_t=0.25)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=60, b2=0.98, weight_decay=0.02, ema_decay=0.995)
    config.train.update(batch_size=4, log_every=50, eval_every=1000, eval_documents=128, diagnostics_every=1000,
                        checkpoint_minutes=0.0, watchdog_minutes=30.0, keep_every=0, nonfinite="stop")


def small_chameleon() -> ConfigDict:
    """The baseline likewise, on pictures of 8 x 8 codes."""
    config = chameleon()
    small(config)
    config.model.update(num_codes=512, codes_per_image=64)
    return config


def small_autoencoder() -> ConfigDict:
    """Its image tokenizer, for any sources."""
    config = ConfigDict(dict(
        objective="autoencoder", **run(), data=dict(sources=dict()),
        autoencoder=dict(image_size=32, latent_channels=8, downsample=4, width=64, num_blocks=1,
                         kl_weight=1e-5)))
    config.optimizer.update(learning_rate=3e-3, warmup_steps=60, b2=0.99, weight_decay=1e-4, ema_decay=0.995)
    config.train.update(
        num_steps=5000, batch_size=32, log_every=50, eval_every=1000, eval_documents=256, diagnostics_every=0,
        checkpoint_every=2500)
    return config


def small_vq() -> ConfigDict:
    """Its twin that makes codes: the same network, on the same pictures, in the same steps."""
    config = small_autoencoder()
    config.objective = "vq_autoencoder"
    kept = {key: config.autoencoder[key] for key in ("image_size", "downsample", "width", "num_blocks")}
    config.autoencoder = ConfigDict(dict(**kept, num_codes=512, code_dim=8, commitment_weight=0.25))
    return config


def shorten(config: ConfigDict) -> None:
    """The same path in seconds, for CI."""
    config.train.update(num_steps=60, log_every=20, eval_every=30, eval_documents=16, checkpoint_every=30)


def product(**axes) -> list[dict]:
    """[{axis: value}] of all combinations, the last axis first: for get_sweep."""
    combinations = [{}]
    for axis, values in axes.items():
        combinations = [{**each, axis: value} for each in combinations for value in values]
    return combinations


def parse(arg: str | None, **groups) -> dict[str, str | None]:
    """The words after the colon of --config=FILE:word,word, in any order: {group: its word, or None}.

    groups: name=words, of which at most one may be given. Raises ValueError, in one line, on any other word.
    """
    chosen = dict.fromkeys(groups)
    for word in arg.split(",") if arg else ():
        group = next((name for name, words in groups.items() if word in words), None)
        if group is None:
            choices = "; ".join(f"{name}: {', '.join(words)}" for name, words in groups.items())
            raise ValueError(f"unknown variant '{word}'; at most one of each: {choices}")
        if chosen[group]:
            raise ValueError(f"variants '{chosen[group]}' and '{word}': at most one {group} can be chosen")
        chosen[group] = word
    return chosen
