"""How much compute each recipe needs for the same quality: ladders of sizes, each size trained both ways.

  python -m tfusion.sweep --config=experiments/scaling.py:pack --out=sweeps/pack     26 runs of minutes, 2 cores
  launch/local.sh --sweep=sweeps/pack
  python -m tfusion.sweep --config=experiments/scaling.py:paper --out=sweeps/paper   the paper's ten, for TPUs
  python -m tfusion.train --config=experiments/scaling.py:pack,chameleon,s2 --workdir=runs/one   a single run
  python -m tfusion.plan --config=experiments/scaling.py:paper,chameleon,7b --topology=v5p-256

ladder   pack, paper
recipe   transfusion, chameleon; eps, flow: transfusion that predicts the noise, or a rectified flow's velocity;
         text_only, image_only: the references of one modality, on what the ladder's run sees of it
size     s1 to s4 of the pack, 0.16b to 7b of table 2
images   the baseline sees as many images (and texts) as transfusion, instead of as many FLOPs

**Equal FLOPs.** A size has as many steps of as many positions under both recipes, and the same transformer:
6 N D is the same, with N the transformer with the text's embeddings. An image takes 16 patches of one recipe
and 64 codes of the other (256 and 1,024 in the paper): within these FLOPs the baseline sees fewer images.

**Learning rates.** One for each recipe at all sizes, as in the paper (3e-4 and 1e-4 from 0.16B to 7B). In the
pack three are tried at the two smallest sizes, which the sweep trains first. That of LEARNING_RATES is carried
upward: at s2 its held-out loss of all that is trained (lm_loss + 5 diffusion_loss; token_loss) is the lowest,
or the next higher rate gains less than 1.5 %, since the best rate falls with size (there .7 and 1.4 %, at s1 2
and 2.5 %). Where it does not hold, the best is put there and the sweep frozen anew.

**What differs between the arms**, besides codes and patches: patches have learned positions (the adapter's),
codes have RoPE alone; Transfusion samples with settings chosen at this size, the baseline with those of its
256-px runs, and draws no better with others (docs/LOG.md).

**pack.** Scenes, stories and glosses in rows of 448, in which a story of three images has room as codes too,
and both recipes drop as many documents: the shares and the length were chosen for that (tests/test_scaling.py).
It predicts v: at this size eps does not learn to draw within minutes; it and flow are trained beside it at
s3. No moving average, the same caption dropout in both arms, the same held-out documents.

**paper.** Table 2's sizes on 0.5T tokens, with its learning rates and guidance 5, strict (no moving average, no
dropout). Prepare data/prepared and data/prepared_codes first. What the paper measures and we do not yet: FID,
CLIP score, CIDEr on COCO, its seven language tasks. Losses on C4 and Wikipedia need them as sources.
"""

from ml_collections import ConfigDict

from experiments.common import (
    MODEL_SIZES,
    base,
    chameleon,
    parse,
    product,
    small_chameleon,
    small_transformer,
    use_rectified_flow,
)

PACK_SIZES = {  # with the steps that each is trained
    "s1": dict(num_layers=2, d_model=64, num_heads=1, d_ff=176, num_steps=1000),
    "s2": dict(num_layers=3, d_model=80, num_heads=2, d_ff=216, num_steps=1700),
    "s3": dict(num_layers=4, d_model=96, num_heads=2, d_ff=256, num_steps=2800),
    "s4": dict(num_layers=4, d_model=128, num_heads=2, d_ff=344, num_steps=4000),
}
LEARNING_RATES = {"transfusion": 6e-3, "chameleon": 32e-3}  # of the pack
RECIPES = ("transfusion", "chameleon", "eps", "flow", "text_only", "image_only")
LADDERS = {"pack": ("s3", PACK_SIZES), "paper": ("0.76b", MODEL_SIZES)}  # and the size that no word chooses
# Text tokens and images of a mean record: the pack's as counted, the paper's as we suppose them.
RECORDS = {
    "pack": {"scenes": (8.1, 1.0), "stories": (20.2, 2.5), "glosses": (38.0, 0.0)},
    "paper": {"text": (1000.0, 0.0), "images": (30.0, 1.0)},
}
SLICES = {  # of the paper's sizes: each row of the ladder fits, and takes days
    "0.16b": "v5p-16", "0.37b": "v5p-32", "0.76b": "v5p-64", "1.4b": "v5p-128", "7b": "v5p-512"}
SEEDS = (0, 1)
OUT_OF = {"transfusion": ("kl", "kl_data"), "chameleon": ("vq", "vq_data")}  # points: image tokenizer, data


def pack(recipe: str) -> ConfigDict:
    if recipe == "chameleon":
        config = small_chameleon()
    else:
        config = base()
        small_transformer(config)
        config.sampling.num_inference_steps = 50
    world = dict(num_sprites=24, jitter=1)
    config.data.update(prepared=f"runs/scaling/{OUT_OF[recipe][1]}/data", seq_len=448, window_rows=256)
    config.data.sources = dict(scenes=dict(kind="scenes", share=0.6, num_records=32_000, **world),
                               stories=dict(kind="stories", share=0.2, num_records=8000, **world),
                               glosses=dict(kind="glosses", share=0.2))
    config.optimizer.update(learning_rate=LEARNING_RATES[recipe], ema_decay=0.0)
    config.train.update(
        batch_size=2, eval_every=1000, eval_documents=256, diagnostics_every=0, checkpoint_every=100_000,
        checkpoint_minutes=2.0, keep_last=1)
    return config


def paper(recipe: str) -> ConfigDict:
    config = chameleon(preset="strict") if recipe == "chameleon" else base(preset="strict")
    config.sampling.guidance_scale = 5.0
    return config


def positions(config: ConfigDict, ladder: str) -> dict[str, float]:
    """Of a mean record of each source, as the config's recipe lays it out."""
    if config.objective == "chameleon":
        patches = config.model.codes_per_image
    else:
        adapter = config.model.adapter
        patches = (adapter.latent_size // adapter.patch_size) ** 2
    keep = 1 - config.data.caption_dropout
    return {source: (tokens * keep if images else tokens) + images * (patches + 2) + 2
            for source, (tokens, images) in RECORDS[ladder].items()}


def set_image_share(config: ConfigDict, ladder: str) -> None:
    """data.image_share, which image slots follow from, as the sources' shares have it."""
    lengths, sources = positions(config, ladder), config.data.sources
    keep = 1 - config.data.caption_dropout
    text = {name: (tokens * keep + 2) / lengths[name] for name, (tokens, images) in RECORDS[ladder].items()
            if images}
    total = sum(sources[name].share for name in sources)
    share = sum(sources[name].share * (1 - text[name]) for name in text if name in sources) / total
    config.data.image_share = -(-share * 100 // 1) / 100


def match_images(config: ConfigDict, ladder: str, other: ConfigDict) -> None:
    """Of each source as many records as `other` takes: shares of what they take here, and the steps for all."""
    here, there = positions(config, ladder), positions(other, ladder)
    taken = {name: other.data.sources[name].share * here[name] / there[name] for name in here}
    for name, share in taken.items():
        config.data.sources[name].share = round(share / sum(taken.values()), 4)
    config.train.num_steps = round(other.train.num_steps * sum(taken.values()))


def keep_one_modality(config: ConfigDict, ladder: str, recipe: str) -> None:
    """The records of one modality that the ladder's run takes. image_only drops every caption: what is left of
    a document is <bos> and its images, no position is scored, and it is a latent diffusion transformer."""
    before, share = positions(config, ladder), 0.0
    if recipe == "image_only":
        config.data.caption_dropout = 1.0
    after = positions(config, ladder)
    for name, (_, images) in RECORDS[ladder].items():
        if (images > 0) != (recipe == "image_only"):
            del config.data.sources[name]
        else:
            share += config.data.sources[name].share * after[name] / before[name]
    config.train.num_steps = max(1, round(config.train.num_steps * share))


def make(ladder: str, recipe: str, size: str) -> ConfigDict:
    arm = "chameleon" if recipe == "chameleon" else "transfusion"
    config = (pack if ladder == "pack" else paper)(arm)
    chosen = dict((PACK_SIZES | MODEL_SIZES)[size])
    config.train.num_steps = chosen.pop("num_steps", config.train.num_steps)
    config.model.update(**chosen, num_kv_heads=chosen["num_heads"])
    if recipe == "eps":
        config.process.prediction = "eps"
    elif recipe == "flow":
        use_rectified_flow(config)
    elif recipe in ("text_only", "image_only"):
        keep_one_modality(config, ladder, recipe)
    set_image_share(config, ladder)
    return config


def get_config(arg=None):
    chosen = parse(arg, ladder=LADDERS, recipe=RECIPES, size=(*PACK_SIZES, *MODEL_SIZES), match=("images",))
    ladder, recipe = chosen["ladder"] or "pack", chosen["recipe"] or "transfusion"
    size = chosen["size"] or LADDERS[ladder][0]
    config = make(ladder, recipe, size)
    if chosen["match"] and recipe == "chameleon":
        match_images(config, ladder, make(ladder, "transfusion", size))
        set_image_share(config, ladder)
    return config


def run_of(ladder: str, part: str, recipe: str, size: str, seed: int = 0, match: str | None = None,
           rate: float | None = None) -> dict:
    """A point of the sweep."""
    arm = "chameleon" if recipe == "chameleon" else "transfusion"
    words = ",".join(filter(None, (ladder, recipe, size, match)))
    overrides = {"seed": seed} | ({"optimizer.learning_rate": rate} if rate else {})
    if ladder == "pack":
        overrides["data.prepared"] = f"{{{OUT_OF[arm][1]}}}/data"
    return dict(name="-".join(filter(None, (recipe, size, f"lr{rate:g}" if rate else f"seed{seed}"))),
                config=f"experiments/scaling.py:{words}", overrides=overrides,
                tags=dict(part=part, recipe=recipe, size=size, seed=seed),
                **({"topology": SLICES[size]} if ladder == "paper" else {}))


def data_of(recipe: str, tokenizer: str) -> list[dict]:
    """The image tokenizer of a recipe, and the data that it makes."""
    codec, data = OUT_OF[recipe]
    return [dict(name=codec, config=f"experiments/quickstart.py:{tokenizer}", verbs=["train"],
                 tags=dict(part="data")),
            dict(name=data, config=f"experiments/scaling.py:pack,{recipe}", verbs=["prepare"],
                 overrides={"data.prepared": f"{{{data}}}/data"}, flags={"prepare": {"codec": f"{{{codec}}}"}},
                 tags=dict(part="data"))]


def get_sweep(arg=None):
    chosen = parse(arg, ladder=LADDERS, match=("images",))
    ladder, match = chosen["ladder"] or "pack", chosen["match"]
    sizes, arms = LADDERS[ladder][1], ("transfusion", "chameleon")
    if ladder == "paper":
        return [run_of(ladder, "ladder", match=match, **each) for each in product(size=sizes, recipe=arms)]
    points = data_of("transfusion", "autoencoder") + data_of("chameleon", "vq")
    points += [run_of(ladder, "lr", recipe, size, match=match, rate=LEARNING_RATES[recipe] * factor)
               for size in list(sizes)[:2] for recipe in arms for factor in (0.5, 2)]
    points += [run_of(ladder, "ladder", match=match, **each)
               for each in product(seed=SEEDS, size=sizes, recipe=arms)]
    return points + [run_of(ladder, "process", recipe, "s3") for recipe in ("eps", "flow")]
