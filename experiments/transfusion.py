"""Table 2 of the Transfusion paper: five sizes, its optimizer, batch (2M tokens) and schedule.

  python -m tfusion.train --config=experiments/transfusion.py:0.76b --workdir=/mnt/runs/0.76b \
      --config.data.prepared=DIR --config.data.tokenizer=DIR/llama2/tokenizer.model
"""

from experiments.common import MODEL_SIZES, base, parse


def get_config(arg=None):
    size = MODEL_SIZES[parse(arg, size=MODEL_SIZES)["size"] or "0.76b"]
    config = base()
    config.model.update(size, num_kv_heads=size["num_heads"])
    return config
