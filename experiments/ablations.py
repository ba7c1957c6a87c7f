"""Ablations of the Transfusion paper with the linear adapter, at 0.76B unless a size is named.

  python -m tfusion.train --config=experiments/ablations.py:causal_images --workdir=/mnt/runs/causal_images
  python -m tfusion.train --config=experiments/ablations.py:patch4,0.16b,strict --workdir=/mnt/runs/patch4
  python -m tfusion.sweep --config=experiments/ablations.py --out=sweeps/tables   tables 4 to 7, linear rows

no word             what the others are compared with: 2 x 2 patches, full attention inside images. Also table
                    4's "+ diffusion" and, with the sizes, table 7's linear rows
text_only           table 4, first row: no images, and half the batch, so that as much text is seen
stable_text_only    table 4, "+ stability changes": the same text by Chameleon's transformer and optimizer
image_codes         table 4, "+ LM loss on image tokens": the Chameleon baseline (experiments/chameleon.py)
causal_images       table 5: no bidirectional attention inside images
patch1 ... patch8   table 6: patches of 1, 2 (as with no word), 4 or 8 latent pixels squared
linear_noise_limit  t <= 500 where the image precedes its caption. Table 8 is the U-Net adapter's, so no row of
                    the paper is this one. With strict, nothing trains guidance above t = 500

`python -m tfusion.report --scaling sweeps/tables` sets what is finished beside the paper's rows.

strict as in transfusion.py. docs/recipe.md ("Ablations") has the paper's figures; tfusion/scaling/paper.py, as
data.
"""

from experiments.common import MODEL_SIZES, STRICT, base, chameleon, parse

ABLATIONS = ("text_only", "stable_text_only", "image_codes", "causal_images", "patch1", "patch2", "patch4",
             "patch8", "linear_noise_limit")

ROWS = {  # of the sweep: the words -> {table of the paper: its row}, as scaling/paper.py has them
    "text_only": {"4": "Llama 2 recipe"},
    "stable_text_only": {"4": "Chameleon: + stability changes"},
    "image_codes": {"4": "Chameleon: + LM loss on image tokens"},
    "0.76b": {"4": "Transfusion: + diffusion", "5": "bidirectional", "6": "2", "7": "0.76B"},
    "causal_images": {"5": "causal"},
    "patch1": {"6": "1"}, "patch4": {"6": "4"}, "patch8": {"6": "8"},
    "0.16b": {"7": "0.16B"}, "0.37b": {"7": "0.37B"}, "1.4b": {"7": "1.4B"}, "7b": {"7": "7B"},
}


def get_config(arg=None):
    chosen = parse(arg, ablation=ABLATIONS, size=MODEL_SIZES, preset=STRICT)
    ablation = chosen.pop("ablation")
    config = (chameleon if ablation in ("stable_text_only", "image_codes") else base)(**chosen)
    if ablation in ("text_only", "stable_text_only"):
        del config.data.sources.images
        config.data.image_share = 0.0
        config.train.batch_size //= 2
    elif ablation == "causal_images":
        config.model.image_attention = "causal"
    elif ablation == "linear_noise_limit":
        config.data.image_first_max_t = 0.5
    elif ablation and ablation.startswith("patch"):
        config.model.adapter.patch_size = int(ablation.removeprefix("patch"))
    return config


def get_sweep(arg=None):
    preset = parse(arg, preset=STRICT)["preset"]
    return [dict(name=words, config=f"experiments/ablations.py:{','.join(filter(None, (words, preset)))}",
                 tags=dict(part="tables", tables=rows)) for words, rows in ROWS.items()]
