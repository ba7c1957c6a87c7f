"""One table of accelerators, and the names that clouds give their slices.

Units: FLOP/s dense bf16, bytes, bytes/s, all per device as JAX counts them: a chip, but for tpu7x (Ironwood),
whose chips are two devices, a TensorCore and half of the chip's HBM each. Sources: the pages of
docs.cloud.google.com/tpu/docs on v4, v5e, v5p, v6e and tpu7x, read as of 2026-08 (ICI there is both directions:
halved here; v4's ICI from arXiv 2304.01433, its DCN a guess; the link between tpu7x's two halves, of which no
figure is given, is left out), and NVIDIA's data sheets (HBM less a tenth that the runtime keeps). A TPU's
`hbm_bytes` is what libtpu 0.0.42's compiler gives a program ("exceeds available HBM (15.75G)").
"""

import dataclasses
import difflib
import math
import re

from tfusion.errors import UserError

GIB = 2**30

# EDIT ME: on-demand list prices in US dollars per chip-hour, from memory, as of 2025-06, US regions. Yours will
# differ (region, spot, reservations). None = no price known.
DOLLARS_PER_CHIP_HOUR = {
    "v4": 3.22, "v5e": 1.20, "v5p": 4.20, "v6e": 2.70, "tpu7x": None,
    "a100": 5.07, "h100": 11.06, "h200": 10.60,
}
PRICES_AS_OF = "2025-06"


@dataclasses.dataclass(frozen=True)
class Chip:
    name: str
    device_kinds: tuple[str, ...]  # what jax calls it
    peak_flops: float  # dense bf16 FLOP/s, the maker's figure
    hbm_bytes: float  # usable by one program
    hbm_bandwidth: float  # bytes/s
    ici_bandwidth: float  # bytes/s out of one device, all its links together, one direction (NVLink on a GPU)
    dcn_bandwidth: float  # bytes/s out of one device: its share of its host's
    chips_per_host: int  # of a slice of several
    count_per_chip: int  # what the number in the name counts: 2 = cores ('v5p-8' is 4 chips), 1 = chips
    prefixes: tuple[str, ...]  # of the name; the first is the cloud's
    shapes: tuple[str, ...]  # valid slices, each of its own chip count, ascending
    largest_host: int = 0  # chips of the largest host that is a slice by itself; 0: chips_per_host
    devices_per_chip: int = 1
    topology_options: tuple = ()  # further arguments for jax's topology description

    @property
    def is_tpu(self) -> bool:
        return self.name.startswith(("v", "tpu"))

    @property
    def dollars_per_hour(self) -> float | None:
        """Of a chip."""
        return DOLLARS_PER_CHIP_HOUR[self.name]

    @property
    def devices_of_host(self) -> int:
        """Devices of the largest host."""
        return (self.largest_host or self.chips_per_host) * self.devices_per_chip


# v4, v5p, tpu7x: whole 4x4x4 cubes above 64 chips. v5p and tpu7x list the commoner ones; the largest job of v5p
# is 16x16x24, a whole pod of tpu7x 16x24x24.
_SMALL_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")
_V4_SHAPES = (*_SMALL_3D, "4x8x8", "8x8x8", "8x8x12", "8x8x16", "8x16x16", "12x16x16", "16x16x16")
_V5P_SHAPES = (*_SMALL_3D, "4x4x12", "4x8x8", "4x8x12", "8x8x8", "4x12x12", "8x8x12", "8x8x16", "8x12x12",
               "8x12x16", "8x16x16", "12x12x16", "12x16x16", "16x16x16", "16x16x24")
_7X_SHAPES = ("1x1x1", *_V5P_SHAPES, "16x16x32", "16x24x24")
_2D_SHAPES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_GPU_SHAPES = tuple(map(str, (1, 2, 4, *range(8, 129, 8), *range(160, 1025, 32), *range(1280, 16385, 256))))

CHIPS = {chip.name: chip for chip in (
    Chip("v4", ("TPU v4",), 275e12, 30.75 * GIB, 1200e9, 300e9, 6.25e9, 4, 2, ("v4-",), _V4_SHAPES,
         topology_options=(("chip_config_name", "megacore"),)),  # one device a chip, as on the real machine
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 819e9, 200e9, 3.125e9, 4, 1,
         ("v5litepod-", "v5e-"), _2D_SHAPES, largest_host=8),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95.74 * GIB, 2765e9, 600e9, 6.25e9, 4, 2,
         ("v5p-",), _V5P_SHAPES),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 31.25 * GIB, 1638e9, 400e9, 12.5e9, 4, 1,
         ("v6e-",), _2D_SHAPES, largest_host=8),
    Chip("tpu7x", ("TPU7x",), 2307e12 / 2, 94.75 * GIB, 7380e9 / 2, 600e9 / 2, 12.5e9 / 2, 4, 2,
         ("tpu7x-",), _7X_SHAPES, devices_per_chip=2),
    Chip("a100", ("NVIDIA A100-SXM4-80GB",), 312e12, 0.9 * 80e9, 2039e9, 300e9, 25e9, 8, 1,
         ("a100-",), _GPU_SHAPES),
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 989e12, 0.9 * 80e9, 3350e9, 450e9, 50e9, 8, 1,
         ("h100-",), _GPU_SHAPES),
    Chip("h200", ("NVIDIA H200",), 989e12, 0.9 * 141e9, 4800e9, 450e9, 50e9, 8, 1,
         ("h200-",), _GPU_SHAPES),
)}


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One or several equal slices of one chip type."""

    chip: Chip
    shape: tuple[int, ...]  # chips along each axis of one slice
    num_slices: int = 1

    @property
    def chips_per_slice(self) -> int:
        return math.prod(self.shape)

    @property
    def num_chips(self) -> int:
        return self.chips_per_slice * self.num_slices

    @property
    def num_devices(self) -> int:
        """As JAX counts them: the mesh is made of these."""
        return self.num_chips * self.chip.devices_per_chip

    @property
    def num_hosts(self) -> int:
        """Processes to start: v5e's and v6e's 8 chips are one host by themselves, and two in a larger slice."""
        if self.chips_per_slice <= self.chip.largest_host:
            return self.num_slices
        return self.num_slices * math.ceil(self.chips_per_slice / self.chip.chips_per_host)

    @property
    def topology(self) -> str:
        """'4x4x8': the shape of one slice."""
        return "x".join(map(str, self.shape))

    @property
    def name(self) -> str:
        slices = f"{self.num_slices}x" if self.num_slices > 1 else ""
        return f"{slices}{self.chip.prefixes[0]}{self.chips_per_slice * self.chip.count_per_chip}"

    @property
    def torus(self) -> bool:
        """True where the links wrap around: v4, v5p, tpu7x from whole cubes on, v5e and v6e the full pod."""
        if len(self.shape) == 3:
            return all(size % 4 == 0 for size in self.shape)
        return self.shape == (16, 16) or len(self.shape) == 1


def peak_flops_per_sec(device_kind: str) -> float | None:
    """The device's peak FLOP/s, or None where it is not known (a CPU): then MFU is not reported."""
    for chip in CHIPS.values():
        if device_kind in chip.device_kinds:
            return chip.peak_flops
    return None


def names(chip: Chip) -> dict[int, str]:
    """{number in the name: shape} of every valid slice of a chip."""
    return {math.prod(map(int, shape.split("x"))) * chip.count_per_chip: shape for shape in chip.shapes}


def parse_accelerator(text: str, num_slices: int = 1) -> Accelerator:
    """'v5p-256' (128 chips, 4x4x8), 'v5litepod-256', 'h100-64', '2xv5litepod-256' (two slices).

    Raises UserError naming the nearest valid names.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z]+\d+[a-z]*-)(\d+)", text.strip().lower())
    chip = match and next((c for c in CHIPS.values() if match[2] in c.prefixes), None)
    if not chip:
        raise UserError(f"unknown topology '{text}'; {_nearest_chip(text)}")
    slices = int(match[1] or 1)
    if slices > 1 and num_slices not in (1, slices):
        raise UserError(f"'{text}' says {slices} slices, --num_slices={num_slices} another number; give one")
    if min(slices, num_slices) < 1:
        raise UserError(f"'{text}': the number of slices must be at least 1")
    slices = max(slices, num_slices)
    if slices > 1 and not chip.is_tpu:
        raise UserError(f"'{text}': only TPUs come in slices; say {chip.prefixes[0]}{slices * int(match[3])}")
    valid, count = names(chip), int(match[3])
    if count not in valid:
        near = sorted(sorted(valid, key=lambda n: abs(math.log(n / max(count, 1))))[:3])
        counts = "cores" if chip.count_per_chip == 2 else "chips"
        raise UserError(f"'{text}' is not a valid slice of {chip.name} (the number counts {counts}); nearest: "
                        + ", ".join(f"{match[2]}{n} ({valid[n]})" for n in near))
    return Accelerator(chip, tuple(map(int, valid[count].split("x"))), slices)


def _nearest_chip(text: str) -> str:
    known = {prefix: chip for chip in CHIPS.values() for prefix in chip.prefixes}
    near = difflib.get_close_matches(re.sub(r"^\d+x|\d*$", "", text.lower()), known, n=2, cutoff=0.5)
    examples = [f"{prefix}{list(names(known[prefix]))[min(5, len(known[prefix].shapes) - 1)]}"
                for prefix in near or known]
    return f"{'nearest' if near else 'known'}: {', '.join(examples)}"
