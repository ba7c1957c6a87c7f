"""The worker of `train_step.py` that trains lucidrains' transfusion-pytorch 0.20.0 (setup.py: `peers`).

Runs in an interpreter that need not have JAX. Its own defaults throughout (flow matching, U-ViT skips,
adaptive layer norm with the time, softcapped dense attention); AdamW is torch's fused one.
"""

import argparse
import contextlib
import json
import platform
from importlib.metadata import version

import torch
from transfusion_pytorch import Transfusion
from worker import serve


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--setting", type=json.loads, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    args = parser.parse_args()
    s = args.setting
    torch.set_num_threads(s["threads"])
    torch.manual_seed(0)
    model = Transfusion(
        num_text_tokens=s["text_vocab_size"], dim_latent=s["latent_channels"],
        modality_default_shape=(s["latent_size"],) * 2,
        transformer=dict(dim=s["width"], depth=s["layers"], heads=s["heads"], dim_head=s["head_dim"]))
    latent_shape = (s["latent_size"], s["latent_size"], s["latent_channels"])

    def text():
        return torch.randint(0, s["text_vocab_size"], (s["text_part"],))

    rows = [[x for _ in range(s["images"]) for x in (text(), torch.randn(latent_shape))] + [text()]
            for _ in range(s["batch_size"])]
    tx = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        cast = torch.autocast("cpu", torch.bfloat16) if args.dtype == "bfloat16" else contextlib.nullcontext()
        tx.zero_grad()
        with cast:
            loss = model(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        tx.step()
        return loss.item()

    seen = []  # positions that the transformer sees, with the peer's own marks
    hook = model.transformer.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[:2].numel()))
    first_loss = step()
    hook.remove()
    serve({"params": sum(p.numel() for p in model.parameters()), "first_loss": first_loss,
           "config": {**s, "dtype": args.dtype, "positions_with_marks": seen[0]},
           "versions": {"python": platform.python_version(), "torch": torch.__version__,
                        "transfusion-pytorch": version("transfusion-pytorch")}},
          {"step": step}, finish=lambda: None)


if __name__ == "__main__":
    main()
