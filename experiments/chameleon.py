"""The Chameleon baseline of the Transfusion paper, in the five sizes of its table 2: images as VQ codes.

  python -m tfusion.prepare --config=experiments/chameleon.py:0.76b --codec=/mnt/runs/vq \
      --config.data.prepared=DIR --config.data.tokenizer=DIR/llama2/tokenizer.model
  python -m tfusion.train   --config=experiments/chameleon.py:0.76b --workdir=/mnt/runs/chameleon_0.76b \
      --config.data.prepared=DIR --config.data.tokenizer=DIR/llama2/tokenizer.model
  python -m tfusion.train   --config=experiments/chameleon.py:7b,strict --workdir=/mnt/runs/table_3_baseline \
      --config.sampling.guidance_scale=5

strict as in transfusion.py. As many positions as there: a picture takes 1,024 codes and not 256 patches, so
that a run sees a quarter of the pictures. docs/recipe.md ("Chameleon") says what the paper does not.
"""

from experiments.common import MODEL_SIZES, STRICT, chameleon, parse


def get_config(arg=None):
    return chameleon(**parse(arg, size=MODEL_SIZES, preset=STRICT))
