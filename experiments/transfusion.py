"""Table 2 of the Transfusion paper: five sizes, its optimizer, batch (2M tokens) and schedule.

  python -m tfusion.train --config=experiments/transfusion.py:0.76b --workdir=/mnt/runs/0.76b \
      --config.data.prepared=DIR --config.data.tokenizer=DIR/llama2/tokenizer.model
  python -m tfusion.train --config=experiments/transfusion.py:7b,strict --workdir=/mnt/runs/table_3 \
      --config.sampling.guidance_scale=5

strict: nothing that the paper does not mention, so no moving average and no dropped captions. The paper draws
with guidance 5 in its section 4.2 (table 3, figure 5), with 3 in its ablations and here; training is the same.

Two things that came after the paper: `flow`, rectified flow instead of DDPM, t logit-normal and shifted by the
number of patches; `wsd`, a plateau and the last tenth of the steps to decay in, so that one run can be decayed
at several lengths (train.branch_from).
"""

from experiments.common import MODEL_SIZES, STRICT, base, parse, use_rectified_flow


def get_config(arg=None):
    chosen = parse(arg, size=MODEL_SIZES, preset=STRICT, process=("flow",), schedule=("wsd",))
    config = base(chosen["size"], chosen["preset"])
    if chosen["process"]:
        adapter = config.model.adapter
        use_rectified_flow(config, "logit_normal", (adapter.latent_size // adapter.patch_size) ** 2)
    if chosen["schedule"]:
        config.optimizer.decay_steps = config.train.num_steps // 10
    return config
