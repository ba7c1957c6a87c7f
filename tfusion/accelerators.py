"""One table of accelerators. Peak is the dense bf16 figure that the maker states."""

PEAK_FLOPS_PER_SEC = {  # by jax's device_kind
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops_per_sec(device_kind: str) -> float | None:
    """The device's peak FLOP/s, or None where it is not known (a CPU): then MFU is not reported."""
    return PEAK_FLOPS_PER_SEC.get(device_kind)
