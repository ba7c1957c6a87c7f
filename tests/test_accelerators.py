"""The table of chips and the names of slices."""

import math

import pytest

from tfusion import accelerators
from tfusion.accelerators import CHIPS, GIB, parse_accelerator
from tfusion.errors import UserError

NAMES = [  # Google's names, as its documentation lists them
    ("v5p-8", "v5p", 4, "2x2x1"), ("v5p-256", "v5p", 128, "4x4x8"), ("v5p-1024", "v5p", 512, "8x8x8"),
    ("v5p-12288", "v5p", 6144, "16x16x24"), ("v4-8", "v4", 4, "2x2x1"), ("v4-4096", "v4", 2048, "8x16x16"),
    ("v5litepod-1", "v5e", 1, "1x1"), ("v5litepod-16", "v5e", 16, "4x4"),
    ("v5litepod-256", "v5e", 256, "16x16"), ("v5e-256", "v5e", 256, "16x16"),
    ("v6e-8", "v6e", 8, "2x4"), ("v6e-256", "v6e", 256, "16x16"),
    ("V5P-256", "v5p", 128, "4x4x8"), ("h100-64", "h100", 64, "64"),
]


@pytest.mark.parametrize(("name", "chip", "chips", "topology"), NAMES)
def test_names(name, chip, chips, topology):
    a = parse_accelerator(name)
    assert (a.chip.name, a.num_chips, a.topology, a.num_slices) == (chip, chips, topology, 1)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_every_name_parses_to_itself(chip):
    for count, shape in accelerators.names(chip).items():
        a = parse_accelerator(f"{chip.prefixes[0]}{count}")
        assert (a.name, a.topology) == (f"{chip.prefixes[0]}{count}", shape)
    chips = [math.prod(map(int, shape.split("x"))) for shape in chip.shapes]
    assert chips == sorted(set(chips)), "one shape per size, ascending"


def test_slices():
    a = parse_accelerator("2xv5litepod-256")
    assert (a.num_slices, a.num_chips, a.chips_per_slice, a.name) == (2, 512, 256, "2xv5litepod-256")
    assert parse_accelerator("v5litepod-256", 2) == a == parse_accelerator("2xv5e-256", 2)


@pytest.mark.parametrize(("text", "slices", "message"), [
    ("v5p-100", 1, r"'v5p-100' is not a valid slice of v5p \(the number counts cores\); nearest: "
                   r"v5p-64 \(2x4x4\), v5p-128 \(4x4x4\), v5p-256 \(4x4x8\)"),
    ("v5litepod-512", 1, r"v5litepod-256 \(16x16\)"),
    ("v5p-32768", 1, "nearest: .*v5p-12288"),  # libtpu would accept 32x32x16
    ("v5p-0", 1, "nearest"),
    ("v5x-8", 1, "unknown topology 'v5x-8'; nearest: v5"),
    ("gpu", 1, "unknown topology 'gpu'; known: v4-"),
    ("v5p", 1, "unknown topology"),
    ("0xv5p-8", 1, "number of slices must be at least 1"),
    ("2xv5p-8", 3, "--num_slices=3"),
    ("2xh100-64", 1, "h100-128"),
])
def test_bad_names_are_one_line(text, slices, message):
    with pytest.raises(UserError, match=message) as error:
        parse_accelerator(text, slices)
    assert "\n" not in str(error.value)


def test_torus():
    wraps = {name: parse_accelerator(name).torus
             for name in ("v5p-256", "v5p-64", "v5litepod-256", "v5litepod-64")}
    assert wraps == {"v5p-256": True, "v5p-64": False, "v5litepod-256": True, "v5litepod-64": False}


def test_peak_by_device_kind():
    assert accelerators.peak_flops_per_sec("TPU v5 lite") == 197e12
    assert accelerators.peak_flops_per_sec("TPU v5") == accelerators.peak_flops_per_sec("TPU v5p") == 459e12
    assert accelerators.peak_flops_per_sec("NVIDIA H200") == 989e12
    assert accelerators.peak_flops_per_sec("cpu") is None
    kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))


def test_every_chip_has_a_price_entry_and_sane_units():
    assert set(accelerators.DOLLARS_PER_CHIP_HOUR) == set(CHIPS)
    for chip in CHIPS.values():
        assert 8 * GIB < chip.hbm_bytes < 300 * GIB
        assert 1e14 < chip.peak_flops < 1e16
        assert chip.dcn_bandwidth < chip.ici_bandwidth < chip.hbm_bandwidth
