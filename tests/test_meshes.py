"""Meshes over slices that are not there, the autoencoder on meshes, and what the compiler makes of the step."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import quickstart
from tests import hlo
from tests.planning.plans import small_config
from tests.test_equalities import GRADIENT_RTOL, LOSS_RTOL, assert_gradients_equal
from tfusion import config, sharding
from tfusion.accelerators import parse_accelerator
from tfusion.config import MeshConfig
from tfusion.errors import UserError
from tfusion.models.adapters.linear import TIME_FEATURES
from tfusion.models.transformer import linear
from tfusion.objectives import make_objective
from tfusion.objectives.base import Aux
from tfusion.planning import compile, topology
from tfusion.training import step as steps
from tfusion.types import ImageBatch

# ---------------------------------------------------------------- slices


@dataclasses.dataclass(frozen=True)
class FakeChip:
    """As much of a device as a mesh is made by."""

    id: int
    slice_index: int
    coords: tuple[int, ...]
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0
    process_index: int = 0


def fake_slices(slices: int, shape=(2, 2, 4), **about) -> list[FakeChip]:
    """Slices of a torus, their chips in no order."""
    chips = [FakeChip(0, s, coords, **about) for s in range(slices) for coords in np.ndindex(*shape)]
    order = np.random.default_rng(0).permutation(len(chips))
    return [dataclasses.replace(chips[i], id=n) for n, i in enumerate(order)]


def is_box(chips) -> bool:
    """Whether they are all the chips of a block of the torus: what they say to each other stays within it."""
    sides = [sorted(set(side)) for side in zip(*(chip.coords for chip in chips))]
    return (math.prod(map(len, sides)) == len(chips)
            and all(side == list(range(side[0], side[-1] + 1)) for side in sides))


@pytest.mark.parametrize("sizes", [(2, 16, 1, 1), (4, 2, 4, 1), (2, 4, 2, 2), (8, 1, 4, 1), (-1, 2, 4, 1)])
def test_only_data_crosses_slices_and_each_follows_its_torus(sizes):
    mesh = sharding.make_mesh(MeshConfig(*sizes), fake_slices(2))
    grid = mesh.devices  # data, fsdp, sequence, tensor
    assert len(set(grid.flat)) == 32
    halves = np.split(grid, 2)
    assert [{chip.slice_index for chip in half.flat} for half in halves] == [{0}, {1}]
    tensor = np.moveaxis(grid, sharding.AXES.index("tensor"), -1).reshape(-1, grid.shape[-1])
    assert all(map(is_box, tensor))  # the axis that talks most
    for half in halves:  # the same place of each half has the same coordinates: as many links to cross
        assert [chip.coords for chip in half.flat] == [chip.coords for chip in halves[0].flat]


@pytest.mark.parametrize(("slices", "sizes", "data"), [(2, (1, -1, 1, 1), 1), (2, (1, 32, 1, 1), 1),
                                                       (4, (2, 32, 1, 1), 2), (3, (4, 12, 1, 1), 4)])
def test_slices_that_do_not_divide_data(slices, sizes, data):
    with pytest.raises(UserError, match=rf"^mesh\.data = {data} does not divide over {slices} slices.*"
                                        rf"--config\.mesh\.data={slices} or a multiple$"):
        sharding.make_mesh(MeshConfig(*sizes), fake_slices(slices))


def test_hosts_of_gpus_are_no_slices():
    """They are numbered as slices are, but rows and heads may be split over them."""
    chips = fake_slices(2, platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    grid = sharding.make_mesh(MeshConfig(1, 4, 8, 1), chips).devices
    assert [chip.id for chip in grid.flat] == list(range(32))


@pytest.mark.parametrize("axis", sharding.AXES)
def test_any_axis_takes_what_is_left(axis):
    cfg = MeshConfig(**{**dict.fromkeys(sharding.AXES, 1), axis: -1})
    assert sharding.mesh_shape(cfg, 8) == {**dict.fromkeys(sharding.AXES, 1), axis: 8}
    assert dict(sharding.parse_mesh(f"{axis}=-1").shape) == sharding.mesh_shape(cfg, 8)


def test_two_axes_cannot_take_what_is_left():
    tree = quickstart.get_config("smoke")
    tree.mesh.update(data=-1, fsdp=-1)
    with pytest.raises(UserError, match=r"^mesh: data and fsdp are -1; one axis may take the devices"):
        config.from_dict(tree)
    with pytest.raises(UserError, match=r"^--mesh: fsdp and tensor are -1"):
        sharding.parse_mesh("tensor=-1,fsdp=-1")


# ---------------------------------------------------------------- the autoencoder

def test_the_autoencoder_on_a_mesh_equals_one_device():
    """It has no heads or positions to split: what it is given of those axes repeats the work."""
    tree = quickstart.get_config("smoke,autoencoder")
    tree.autoencoder.update(image_size=8, latent_channels=3, width=8, downsample=4, kl_weight=0.25)
    cfg = config.from_dict(tree)
    objective = make_objective(cfg)
    params = jax.device_get(objective.init(jax.random.key(0)))
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
    batch = ImageBatch(np.arange(8, dtype=np.int32), images)

    def run(mesh):
        with jax.set_mesh(mesh):
            place = sharding.shardings(jax.eval_shape(objective.init, jax.random.key(0)), mesh)
            aux, key = Aux(0, {}, {}), steps.noise_key(0, 0)
            fn = jax.jit(lambda params, batch: steps.gradients(objective, params, aux, batch, key, 1))
            placed = sharding.put_batch(batch, mesh, len(batch[0]))
            return jax.device_get(fn(jax.device_put(params, place), placed))

    want, losses = run(sharding.parse_mesh(None))
    for text in ("data=2,fsdp=2,tensor=2", "fsdp=2,tensor=2,sequence=2"):
        got, others = run(sharding.parse_mesh(text))
        for name, (total, count) in losses.items():
            assert float(others[name][0]) == pytest.approx(float(total), rel=LOSS_RTOL)
            assert others[name][1] == count
        assert_gradients_equal(got, want, GRADIENT_RTOL)


# ---------------------------------------------------------------- the compiled step

@pytest.fixture(scope="module", params=hlo.MESHES)
def step(request):
    """(mesh's name, config, the program as partitioned, as compiled for CPUs)."""
    cfg, lowered = hlo.small_step(hlo.MESHES[request.param])
    return request.param, cfg, *hlo.compiled(lowered)


def layer_size(cfg) -> int:
    """Elements of one layer's matrices."""
    m = cfg.model
    return m.d_model * (2 * m.num_heads + 2 * m.num_kv_heads) * m.head_dim + 3 * m.d_model * m.d_ff


def weights(cfg, tensor: int = 1) -> set[int]:
    """Numbers of elements of the matrices that a device gathers."""
    m = cfg.model
    split = {m.d_model * n // tensor for n in (m.d_model, m.d_ff, m.padded_vocab_size)}
    return split | {m.d_model * n for n in (m.d_model, m.adapter.patch_values, TIME_FEATURES)}


def assert_nothing_is_stacked(cfg, text: str):
    """No array of all layers' matrices is exchanged."""
    L = cfg.model.num_layers
    assert not [shape for *_, shape in hlo.collectives(text) if len(shape) > 2 and shape[0] == L]


@pytest.mark.slow
def test_collectives_are_the_listed_ones(step):
    """`python -m tests.hlo` writes the list anew."""
    name, _, partitioned, _ = step
    listed = hlo.LISTED.read_text().split("mesh ")
    assert f"{name}\n{hlo.listed(hlo.collectives(partitioned))}".strip() in map(str.strip, listed)


@pytest.mark.slow
def test_little_is_whole_at_a_time(step):
    """Of what is gathered, at most two layers' matrices are live at one time in the loops over layers; outside,
    the tables (both: a CPU gathers early) and the adapter."""
    name, cfg, partitioned, text = step
    assert_nothing_is_stacked(cfg, partitioned)
    tensor, table = hlo.MESHES[name][2], cfg.model.padded_vocab_size * cfg.model.d_model
    whole = hlo.whole_at_once(text, weights(cfg, tensor))
    assert max(whole.values()) >= table // tensor, "nothing was seen to be gathered"
    for computation, size in whole.items():
        assert size <= max(2 * layer_size(cfg), 2.5 * table) // tensor, computation


@pytest.mark.slow
def test_weights_are_gathered_in_bfloat16_and_their_gradients_summed_in_float32(step):
    _, cfg, partitioned, _ = step
    assert_dtypes(cfg, partitioned)


def assert_dtypes(cfg, text: str):
    """What is gathered is bfloat16; what has a weight's shape, or a part's, is summed in float32."""
    m, found = cfg.model, hlo.collectives(text)
    gathered = {dtype for _, op, dtype, _ in found if op == "all-gather"}
    assert "bf16" in gathered and "f32" not in gathered
    sides = {n // k for n in (m.d_model, m.d_ff, m.padded_vocab_size, m.adapter.patch_values, TIME_FEATURES)
             for k in (1, 2)}
    sums = {(dtype, shape) for _, op, dtype, shape in found
            if op in ("all-reduce", "reduce-scatter") and len(shape) <= 2 and set(shape) <= sides}
    assert len(sums) > 5
    assert {dtype for dtype, _ in sums} == {"f32"}


@pytest.mark.slow
@pytest.mark.skipif(not topology.have_libtpu(), reason="no libtpu: pip install '.[tpu]'")
def test_the_step_compiled_for_a_tpu():
    cfg = small_config(batch_size=16, num_layers=3, d_ff=128, text_vocab_size=700)
    mesh = topology.make_mesh(MeshConfig(1, 8, 1, 1), parse_accelerator("v5litepod-8"))
    with jax.set_mesh(mesh):
        text = compile.trace(cfg, compile.abstract_state(cfg), mesh).lower().compile().as_text()
    assert_dtypes(cfg, text)
    assert_nothing_is_stacked(cfg, text)
    (_, outside), *loops = hlo.whole_at_once(text, weights(cfg)).items()
    table = cfg.model.padded_vocab_size * cfg.model.d_model
    assert table <= outside < 1.5 * table  # one table, and the adapter
    assert 0 < max(size for _, size in loops) <= 2 * layer_size(cfg)


def test_the_reader_of_programs():
    """By hand: what is in a loop, what is not reached, and how long a gathered array is live."""
    text = """HloModule m, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%body (p: (f32[2,8])) -> (f32[2,8]) {
  %p = (f32[2,8]{1,0}) parameter(0)
  %g = f32[2,8]{1,0} get-tuple-element(%p), index=0
  %w = bf16[8,8]{1,0} all-gather(%g), channel_id=1, dimensions={0}
  %v = bf16[8,8]{1,0} all-gather(%g), channel_id=2, dimensions={1}
  %d = f32[2,8]{1,0} dot(%g, %w)
  ROOT %t = (f32[2,8]{1,0}) tuple(%v)
}

%dead (p: f32[2]) -> f32[2] {
  %p2 = f32[2] parameter(0)
  ROOT %r = f32[2] all-reduce(%p2), to_apply=%add
}

ENTRY %main (x: f32[2,8]) -> f32[8,8] {
  %x = f32[2,8]{1,0} parameter(0)
  %e = f32[8,8]{1,0} all-gather(%x), channel_id=3, dimensions={0}
  %c = f32[8,8]{0,1} copy(%e)
  %l = f32[2,8]{1,0} while(%x), condition=%add, body=%body
  %n = f32[8,8]{1,0} add(%c, %c)
  %h = f32[8,8]{1,0} all-gather(%l), channel_id=4, dimensions={0}
  %z = f32[] all-reduce(%q), to_apply=%add
  ROOT %o = (f32[2,8]{1,0}, f32[4]{0}) all-reduce(%h, %n), to_apply=%add
}
"""
    assert hlo.collectives(text) == {
        ("loop", "all-gather", "bf16", (8, 8)): 2, ("once", "all-gather", "f32", (8, 8)): 2,
        ("once", "all-reduce", "f32", (4,)): 1, ("once", "all-reduce", "f32", (2, 8)): 1}
    assert hlo.whole_at_once(text, {64, 8}) == {"main": 64, "body": 128}
    assert hlo.whole_at_once(text, {63, 65}) == {"main": 0, "body": 0}


def test_gradients_are_summed_in_float32():
    """Of a bfloat16 product, 4096 positions of 1 + 2^-7: bfloat16 holds no such sum, nor a device's part."""
    x = jnp.full((8, 512, 1), 1 + 2**-7, jnp.bfloat16)
    with jax.set_mesh(sharding.parse_mesh("fsdp=8")):
        x = jax.device_put(x, sharding.batch_sharding(jax.sharding.get_mesh()))
        grad = jax.jit(jax.grad(lambda w: linear(x, w).astype(jnp.float32).sum()))(np.ones((1, 1), np.float32))
    assert jax.device_get(grad) == np.full((1, 1), 4096 * (1 + 2**-7), np.float32)
