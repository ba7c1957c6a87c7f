"""The worker of `gpu.py` that times PyTorch's FlexAttention under the same mask.

Runs in an interpreter that need not have JAX. `torch.compile` with its defaults (no autotuning); the block mask
is made once per batch, outside the times, and its own time is said. On a CPU (a rehearsal) it is not compiled.

B batch, T positions, H heads, K key/value heads, E head dimension.
"""

import argparse
import json
import time

import numpy as np
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from worker import serve


def make_functions(case: dict, intervals, device: str, attend):
    """{'forward': function, 'forward_backward': function} and the milliseconds that the block mask took.

    intervals: k_start_BT and k_end_BT.
    """
    B, T, H, K, E = (case[axis] for axis in "BTHKE")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    k_start, k_end = (torch.from_numpy(x).to(device) for x in intervals)

    def visible(b, h, q, k):
        return (k_start[b, q] <= k) & (k < k_end[b, q])

    for _ in range(2):  # the second time counts
        began = time.perf_counter()
        mask = create_block_mask(visible, B, None, T, T, device=device)
        finish(device)
        mask_ms = 1e3 * (time.perf_counter() - began)
    shapes = (B, H, T, E), (B, K, T, E), (B, K, T, E), (B, H, T, E)
    q, k, v, dout = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def forward():
        with torch.no_grad():
            return attend(q, k, v, block_mask=mask, enable_gqa=H != K)

    def forward_backward():
        out = attend(*leaves, block_mask=mask, enable_gqa=H != K)
        return out, torch.autograd.grad(out, leaves, dout)

    return {"forward": forward, "forward_backward": forward_backward}, mask_ms


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=json.loads, required=True)
    parser.add_argument("--intervals", required=True, help="npz file: k_start and k_end of every case")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # every case compiles on its own
    attend = flex_attention if args.device == "cpu" else torch.compile(flex_attention, dynamic=False)
    stored, functions, errors, mask_ms = np.load(args.intervals), {}, {}, {}
    for n, case in enumerate(args.cases):
        name = case["name"]
        try:
            made, mask_ms[name] = make_functions(case, stored[f"case{n}"], args.device, attend)
        except Exception as e:  # the other cases go on
            errors[name] = one_line(e)
            continue
        for direction, function in made.items():
            try:
                function()
                finish(args.device)
                functions[f"{name} {direction}"] = function
            except Exception as e:
                errors[f"{name} {direction}"] = one_line(e)
    serve({"functions": list(functions), "errors": errors, "torch": torch.__version__,
           "block_mask_ms": mask_ms}, functions, finish=lambda: finish(args.device))


if __name__ == "__main__":
    main()
