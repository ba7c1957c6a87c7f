"""Ahead-of-time compiles for TPU slices that are not there. Skipped where libtpu is not installed."""

import jax
import pytest

from tests.planning.plans import small_config
from tfusion import config
from tfusion.accelerators import GIB, parse_accelerator
from tfusion.planning import plan, search, text, topology

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not topology.have_libtpu(), reason="no libtpu: pip install '.[tpu]'")]


@pytest.mark.parametrize("name", ["v5litepod-4", "v5p-8"])
def test_two_layers_compile_and_the_arguments_are_ours(name):
    cfg = small_config(d_model=512, d_ff=1024, text_vocab_size=4000)
    made = plan.make_plan(cfg, parse_accelerator(name), "two layers", tokens=1e9)
    compiler, held = made["compiler"], made["memory"]
    assert made["fits"]
    ours = held["parameters"] + held["optimizer"] + held["ema"] + held["batch"]
    assert compiler["argument_bytes"] == pytest.approx(ours, rel=0.05)  # theirs are padded to tiles
    assert ours < compiler["hbm_bytes"] < GIB
    assert sum(part["bytes"] for part in made["hbm"]) == pytest.approx(compiler["hbm_bytes"])
    assert "fits: " in text.render(made)


def test_slices_and_topologies_describe_their_devices():
    for name in ("v4-8", "v5litepod-1", "v5litepod-8", "v5p-256", "v6e-256", "2xv5litepod-16"):
        accelerator = parse_accelerator(name)
        found = topology.devices(accelerator)
        assert len(found) == accelerator.num_chips
        assert found[0].device_kind in accelerator.chip.device_kinds
    mesh = topology.make_mesh(config.MeshConfig(2, -1, 1, 4), accelerator)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "sequence": 4, "tensor": 1}
    assert [{d.slice_index for d in half.flat} for half in mesh.devices] == [{0}, {1}]
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_two_slices_compile():
    cfg = search.change(small_config(batch_size=8), mesh={"data": 2})
    made = plan.make_plan(cfg, parse_accelerator("2xv5litepod-4"), "two slices")
    assert made["fits"]
    assert made["step"]["dcn"] > 0
    assert made["notes"] == ["2 hosts: the same command runs on each, one process a host, and all must "
                             "reach --workdir", "FLOPs of 4 attention kernels, which the compiler cannot count"
                             ", are by formula: of the pairs of positions that the mask shows"]


def test_rows_split_over_chips_compile():
    """Two half rows on a chip need less than two whole ones."""
    cfg = small_config(batch_size=4, d_model=512, d_ff=1024)
    cfg = search.change(cfg, data={"seq_len": 4096}, mesh={"fsdp": 2, "sequence": 2})
    made = plan.make_plan(cfg, parse_accelerator("v5litepod-4"), "half rows")
    assert made["mesh"] == {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 1}
    assert made["exchange"]["sequence_keys"] > 0
    assert made["step"]["sequence"] > 0
    shown = text.render(made)
    assert "fsdp 2 x sequence 2" in shown
    assert "sequence: keys and values" in shown
    cfg = search.change(cfg, mesh={"fsdp": 4, "sequence": 1}, train={"batch_size": 8})
    whole = plan.make_plan(cfg, parse_accelerator("v5litepod-4"), "whole rows")
    assert made["compiler"]["hbm_bytes"] < 0.7 * whole["compiler"]["hbm_bytes"]


def test_does_not_fit_says_what_would():
    """1.2 B parameters, whole on every chip: 18 GiB with the optimizer; split by fsdp they fit."""
    cfg = search.change(small_config(d_model=2048, text_vocab_size=300_000), mesh={"data": 4})
    made = plan.make_plan(cfg, parse_accelerator("v5litepod-4"), "too large")
    assert not made["fits"]
    assert made["compiler"]["available_bytes"] == pytest.approx(15.75 * GIB)
    assert made["compiler"]["needed_bytes"] > 15.75 * GIB
    assert "does not fit: " in made["verdict"]
    assert "of 15.75 GiB" in made["verdict"]
    assert "compiled: " in made["suggestion"]
    assert "--config.mesh.fsdp=4" in made["suggestion"]
