"""Ablations of the Transfusion paper with the linear adapter, at 0.76B unless a size is named.

  python -m tfusion.train --config=experiments/ablations.py:causal_images --workdir=/mnt/runs/causal_images
  python -m tfusion.train --config=experiments/ablations.py:patch4,0.16b,strict --workdir=/mnt/runs/patch4

no word             what the others are compared with: 2 x 2 patches, full attention inside images. Also table
                    4's "+ diffusion" and, with the sizes, table 7's linear rows
text_only           table 4, first row: no images, and half the batch, so that as much text is seen
stable_text_only    table 4, "+ stability changes": the same text by Chameleon's transformer and optimizer
image_codes         table 4, "+ LM loss on image tokens": the Chameleon baseline (experiments/chameleon.py)
causal_images       table 5: no bidirectional attention inside images
patch1 ... patch8   table 6: patches of 1, 2 (as with no word), 4 or 8 latent pixels squared
linear_noise_limit  t <= 500 where the image precedes its caption. Table 8 is the U-Net adapter's, so no row of
                    the paper is this one. With strict, nothing trains guidance above t = 500

strict as in transfusion.py. docs/recipe.md ("Ablations") has the paper's figures; tfusion/scaling/paper.py, as
data.
"""

from experiments.common import MODEL_SIZES, STRICT, base, chameleon, parse

ABLATIONS = ("text_only", "stable_text_only", "image_codes", "causal_images", "patch1", "patch2", "patch4",
             "patch8", "linear_noise_limit")


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
