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
    ("tpu7x-2", "tpu7x", 1, "1x1x1"), ("tpu7x-8", "tpu7x", 4, "2x2x1"), ("tpu7x-128", "tpu7x", 64, "4x4x4"),
    ("tpu7x-18432", "tpu7x", 9216, "16x24x24"),
    ("V5P-256", "v5p", 128, "4x4x8"), ("h100-64", "h100", 64, "64"),
]
# Of a chip, as its page says: bf16 TFLOP/s, HBM in GiB, HBM GB/s, ICI GB/s in both directions, DCN Gbit/s.
PAGES = {"v4": (275, 32, 1200, 600, None), "v5e": (197, 16, 819, 400, 6400 / 256),
         "v5p": (459, 95, 2765, 1200, 50), "v6e": (918, 32, 1638, 800, 100),
         "tpu7x": (2307, 192, 7380, 1200, 100)}


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


@pytest.mark.parametrize("name", PAGES)
def test_figures_are_the_pages(name):
    chip, (tflops, gib, hbm, ici, dcn) = CHIPS[name], PAGES[name]
    n = chip.devices_per_chip
    assert chip.peak_flops * n == pytest.approx(tflops * 1e12)
    assert 0.95 < chip.hbm_bytes * n / (gib * GIB) < 1.01  # less what the compiler keeps; v5p's 95 is short
    assert chip.hbm_bandwidth * n == pytest.approx(hbm * 1e9)
    assert chip.ici_bandwidth * n == pytest.approx(ici / 2 * 1e9)
    assert dcn is None or chip.dcn_bandwidth * n == pytest.approx(dcn / 8 * 1e9)


@pytest.mark.parametrize(("name", "devices", "hosts"), [
    ("v5p-256", 128, 32), ("v4-8", 4, 1), ("tpu7x-128", 128, 16), ("tpu7x-8", 8, 1), ("tpu7x-2", 2, 1),
    ("2xtpu7x-128", 256, 32), ("v5litepod-1", 1, 1), ("v5litepod-8", 8, 1), ("v5litepod-16", 16, 4),
    ("v5litepod-256", 256, 64), ("v6e-8", 8, 1), ("v6e-256", 256, 64), ("2xv6e-8", 16, 2), ("h100-24", 24, 3)])
def test_devices_and_hosts(name, devices, hosts):
    """As libtpu numbers them in these shapes, and the pages their VMs: 4 chips each in a slice of several."""
    a = parse_accelerator(name)
    assert (a.num_devices, a.num_hosts) == (devices, hosts)


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
    ("tpu7x-100", 1, r"slice of tpu7x \(the number counts cores\); nearest: .*tpu7x-128 \(4x4x4\)"),
    ("tpu-8", 1, "unknown topology 'tpu-8'; nearest: tpu7x-"),
    ("v7x-8", 1, "unknown topology 'v7x-8'; nearest: tpu7x-"),
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
    assert accelerators.peak_flops_per_sec("TPU7x") == 2307e12 / 2  # a device is half a chip
    assert accelerators.peak_flops_per_sec("cpu") is None
    kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))


def test_every_chip_has_a_price_entry_and_sane_units():
    assert set(accelerators.DOLLARS_PER_CHIP_HOUR) == set(CHIPS)
    for chip in CHIPS.values():
        assert 8 * GIB < chip.hbm_bytes < 300 * GIB
        assert 1e14 < chip.peak_flops < 1e16
        assert chip.dcn_bandwidth < chip.ici_bandwidth < chip.hbm_bandwidth
