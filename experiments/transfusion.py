"""Table 2 of the Transfusion paper: five sizes, its optimizer, batch (2M tokens) and schedule.

  python -m tfusion.train --config=experiments/transfusion.py:0.76b --workdir=/mnt/runs/0.76b \
      --config.data.prepared=DIR --config.data.tokenizer=DIR/llama2/tokenizer.model
  python -m tfusion.train --config=experiments/transfusion.py:7b,strict --workdir=/mnt/runs/table_3 \
      --config.sampling.guidance_scale=5

strict: nothing that the paper does not mention, so no moving average and no dropped captions. The paper draws
with guidance 5 in its section 4.2 (table 3, figure 5), with 3 in its ablations and here; training is the same.
"""

from experiments.common import MODEL_SIZES, STRICT, base, parse


def get_config(arg=None):
    return base(**parse(arg, size=MODEL_SIZES, preset=STRICT))
