"""Ablations of the Transfusion paper, at 0.76B unless a size is named; strict as in transfusion.py.

  python -m tfusion.train --config=experiments/ablations.py:causal_images --workdir=/mnt/runs/causal_images

causal_images: table 5, no bidirectional attention inside images. noise_limit: table 8, t <= 500 where the
image precedes its caption.
"""

from experiments.common import MODEL_SIZES, STRICT, base, parse

ABLATIONS = ("causal_images", "noise_limit")


def get_config(arg=None):
    chosen = parse(arg, ablation=ABLATIONS, size=MODEL_SIZES, preset=STRICT)
    ablation = chosen.pop("ablation") or "causal_images"
    config = base(**chosen)
    if ablation == "causal_images":
        config.model.image_attention = "causal"
    else:
        config.data.image_first_max_t = 0.5
    return config
