"""The planner's arithmetic against numbers worked out by hand; nothing is compiled for a TPU."""

import json
import math

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.experimental import pallas as pl

from experiments import transfusion
from tests.planning.plans import small_config
from tfusion import config, sharding
from tfusion.accelerators import CHIPS, GIB, parse_accelerator
from tfusion.errors import UserError
from tfusion.models import flops
from tfusion.objectives import kind_of
from tfusion.objectives import transfusion as transfusion_objective
from tfusion.planning import collectives, compile, plan, roofline, search, text, topology, walk
from tfusion.planning.collectives import Collectives
from tfusion.planning.memory import Memory
from tfusion.planning.walk import Work


def toy_parameters():
    """A 100 x 60 matrix split by fsdp and tensor, and a scale that nothing splits."""
    return {"w": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((100, 60), jnp.float32), ("embed", "mlp")),
            "scale": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((100,), jnp.float32), ("norm",))}


def test_collective_bytes_of_a_toy():
    cfg = small_config(batch_size=16, num_microbatches=2)  # bf16, 2 layers, full remat
    shape = {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 2}
    got = collectives.collectives(cfg, toy_parameters(), shape)
    weights = (100 * 60 / 2 + 100) * 2  # bytes a chip needs whole; their gradients are float32
    activations = 16 * 128 / 8 * 64 * 2  # positions per chip, both micro-batches, x d_model x 2 bytes
    assert got == Collectives(
        fsdp_gather=2 * 2 * weights * 3 / 4, fsdp_scatter=2 * 2 * weights * 3 / 4,
        data_reduce=2 * 2 * 2 * weights / 4 * 1 / 2, tensor_reduce=2 * (2 * 5 + 2) * activations * 1 / 2,
        sequence_keys=0, sequence_reduce=0)
    assert got.total == sum(got)


def test_collective_bytes_of_rows_split_over_chips():
    """2 layers, 4 key heads of 16 values, rows of 128 positions, bf16, full remat."""
    cfg = small_config(batch_size=16, num_microbatches=2)
    shape = {"data": 1, "fsdp": 4, "sequence": 4, "tensor": 2}
    got = collectives.collectives(cfg, toy_parameters(), shape)
    weights = (100 * 60 / 2 + 100) * 2
    keys = 2 * 16 / 4 * 128 * (4 / 2 * 16) * 2  # and values: a chip's rows, whole, its heads
    activations = 16 / 4 * 128 / 4 * 64 * 2  # a chip's part of its rows
    assert got == Collectives(
        fsdp_gather=2 * 2 * weights * 3 / 4, fsdp_scatter=2 * 2 * weights * 3 / 4, data_reduce=0,
        tensor_reduce=2 * (2 * 5 + 2) * activations * 1 / 2,
        sequence_keys=2 * (1 + 1 + 2) * keys * 3 / 4,  # forward, recomputed, and the sum of gradients
        sequence_reduce=2 * 2 * 2 * weights / 4 * 3 / 4)
    kept = search.change(cfg, model={"remat": "none"})
    assert collectives.collectives(kept, toy_parameters(), shape).sequence_keys == 2 * (1 + 2) * keys * 3 / 4


def test_one_chip_receives_nothing():
    cfg = small_config()
    shape = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert collectives.collectives(cfg, toy_parameters(), shape).total == 0


def test_memory_follows_shardings():
    cfg = small_config()
    planner = search.Planner(cfg, parse_accelerator("h100-8"))
    whole = planner.candidate(search.change(cfg, mesh={"data": 8, "fsdp": 1}))
    split = planner.candidate(search.change(cfg, mesh={"data": 1, "fsdp": 8}))
    params = sum(math.prod(x.shape) for x in jax.tree.leaves(nn.meta.unbox(planner.state.params)))
    assert whole.memory.parameters == whole.memory.ema == whole.memory.gradients == 4 * params
    assert whole.memory.optimizer == 8 * params + 8  # two moments, two counters
    assert 4 * params / 8 < split.memory.parameters < 4 * params / 7  # norms and biases are not split
    positions = 8 * cfg.data.seq_len / 8
    assert whole.memory.batch == split.memory.batch == positions * (4 * 4 + 1) + 8 / 8 * (
        4 + cfg.rows.image_slots * (4 + 4 + 8 + 4 * math.prod(cfg.model.latent_shape)))
    # Full remat keeps each layer's input, once: L x T x D x 2 bytes a row.
    assert whole.memory.residuals == 2 * 128 * 64 * 2
    assert whole.memory.total == sum(whole.memory)
    long = planner.candidate(search.change(cfg, mesh={"data": 1, "fsdp": 2, "sequence": 4}))
    # 4 rows on a chip, a quarter of each: as many positions as before. Parameters and batch are not split.
    assert long.memory.residuals == whole.memory.residuals
    assert long.memory.batch == 4 * whole.memory.batch
    assert 4 * params / 2 <= long.memory.parameters < 4 * params / 1.9
    micros = planner.candidate(search.change(cfg, mesh={"data": 1, "fsdp": 4, "tensor": 2},
                                             train={"num_microbatches": 2}))
    assert micros.memory.gradients == 2 * micros.memory.parameters


def test_roofline_by_hand():
    cfg = small_config(batch_size=256)
    accelerator = parse_accelerator("v5litepod-256")
    chip, chips = accelerator.chip, 256
    shape = {"data": 1, "fsdp": 64, "sequence": 1, "tensor": 4}
    work = Work(flops=1e18, weight_bytes=4e9, activation_bytes=256e9, residual_bytes=0,
                largest_bytes=0, kernels=0)
    held = Memory(1e9, 2e9, 1e9, 0, 1e9, 0, 0)
    step = roofline.estimate(cfg, accelerator, shape, work, held, Collectives(4e9, 2e9, 0, 1e9, 0, 0))
    assert step.matmul == pytest.approx(1e18 / chips / (197e12 * roofline.MATMUL_EFFICIENCY))
    assert step.hbm == pytest.approx((1e9 + 1e9 + 9e9) / (819e9 * roofline.HBM_EFFICIENCY))
    assert step.weights == pytest.approx(6e9 / (100e9 * roofline.ICI_EFFICIENCY))  # half the links
    assert step.tensor == pytest.approx(1e9 / (100e9 * roofline.ICI_EFFICIENCY))
    assert (step.dcn, step.seconds) == (0, pytest.approx(step.matmul + step.tensor))
    shape = {"data": 1, "fsdp": 32, "sequence": 2, "tensor": 4}
    long = roofline.estimate(cfg, accelerator, shape, work, held, Collectives(4e9, 2e9, 0, 1e9, 3e9, 8e9))
    assert long.executed_flops == 1e18
    assert long.weights == pytest.approx(14e9 / (100e9 * roofline.ICI_EFFICIENCY))  # on two axes, no third
    assert long.sequence == pytest.approx(3e9 / (100e9 * roofline.ICI_EFFICIENCY))
    assert long.seconds == pytest.approx(max(long.matmul, long.weights) + long.tensor + long.sequence)
    assert step.tokens_per_sec == pytest.approx(256 * 128 / step.seconds)
    assert step.mfu == pytest.approx(step.model_flops / step.seconds / (chips * chip.peak_flops))


def test_links_that_do_not_wrap_carry_half():
    exchange, held = Collectives(1e9, 0, 0, 0, 0, 0), Memory(0, 0, 0, 0, 0, 0, 0)
    nothing = Work(0, 0, 0, 0, 0, 0)

    def seconds(name):
        a = parse_accelerator(name)
        shape = {"data": 1, "fsdp": a.num_chips, "sequence": 1, "tensor": 1}
        return roofline.estimate(small_config(), a, shape, nothing, held, exchange).seconds

    assert seconds("v5litepod-64") == pytest.approx(2 * seconds("v5litepod-256"))


def test_what_crosses_slices():
    two = parse_accelerator("2xv5litepod-256")
    exchange = Collectives(fsdp_gather=512e9, fsdp_scatter=0, data_reduce=3e9, tensor_reduce=0,
                           sequence_keys=7e9, sequence_reduce=0)
    assert roofline.split_dcn(exchange, two, {"data": 2, "fsdp": 256, "tensor": 1}) == (512e9, 3e9)
    # fsdp over both slices: each chip fetches its 1/256 of the half that its slice lacks
    assert roofline.split_dcn(exchange, two, {"data": 1, "fsdp": 512, "tensor": 1}) == (515e9, 1e9)
    one = parse_accelerator("v5litepod-256")
    assert roofline.split_dcn(exchange, one, {"data": 1, "fsdp": 256, "tensor": 1}) == (515e9, 0)


def test_days_chip_hours_dollars():
    cfg = small_config(batch_size=256)
    accelerator = parse_accelerator("v5p-256")
    step = roofline.Step(*[0.0] * 8, seconds=3.6, tokens_per_sec=0, mfu=0)
    run = roofline.run(cfg, accelerator, step, params=10**9, tokens=1000 * 256 * 128)
    assert (run.steps, run.days, run.chip_hours) == (1000, pytest.approx(1 / 24), pytest.approx(128))
    assert run.dollars == pytest.approx(128 * CHIPS["v5p"].dollars_per_hour)
    by_flops = roofline.run(cfg, accelerator, step, params=10**9, total_flops=6e9 * 1000 * 256 * 128)
    assert by_flops.steps == 1000
    assert roofline.run(cfg, accelerator, step, 1).steps == cfg.train.num_steps


def test_assumed_batch_is_half_patches():
    cfg = config.from_dict(transfusion.get_config("7b"))
    expected = kind_of(cfg).expected(cfg)
    counts = flops.Counts(text=512 * 4096 / 2, patches=512 * 4096 / 2, scored=512 * (4096 / 2 - 8 - 8),
                          images=512 * 8, pairs=512 * 8 * (512 * 513 / 2 + 256 * 255 / 2))
    assert (expected.positions, expected.scored, expected.pairs) == (512 * 4096, counts.scored, counts.pairs)
    assert expected.flops == transfusion_objective.model_flops(cfg, counts)


def test_walk_counts_loops_shards_and_platforms():
    mesh = jax.sharding.AbstractMesh((4,), ("x",))
    spec = jax.sharding.PartitionSpec("x")

    def by_platform(x):
        return jax.lax.platform_dependent(x, tpu=lambda x: x @ x @ x, default=lambda x: x @ x)

    def loop(x):
        return jax.lax.scan(lambda c, _: (by_platform(c), None), x, None, length=5)[0]

    def some(x, n):
        return jax.lax.fori_loop(0, n, lambda _, c: c @ x, x)

    def sharded(x):
        return jax.shard_map(lambda x: jnp.einsum("bij,bjk->bik", x, x), mesh=mesh, in_specs=spec,
                             out_specs=spec)(x)

    def flops_of(f, shape, platform, *more):
        jaxpr = jax.make_jaxpr(f)(jax.ShapeDtypeStruct(shape, jnp.float32), *more).jaxpr
        return sum(walk.product_flops(eqn) * n for eqn, n, _ in walk.equations(jaxpr, platform, loops=7))

    assert flops_of(loop, (8, 8), "tpu") == 5 * 2 * 2 * 8**3
    assert flops_of(loop, (8, 8), "cpu") == 5 * 2 * 8**3
    assert flops_of(some, (8, 8), "tpu", 3) == 7 * 2 * 8**3
    with compile.entered(mesh):
        assert flops_of(sharded, (4, 8, 8), "tpu") == 4 * 2 * 8**3

    def conv(x):  # 3 x 3, 4 to 6 channels, in two groups
        return jax.lax.conv_general_dilated(x, jnp.ones((3, 3, 2, 6)), (1, 1), "SAME", feature_group_count=2,
                                            dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert flops_of(conv, (5, 8, 8, 4), "cpu") == 2 * 5 * 64 * 6 * 9 * 2


@pytest.mark.parametrize(("micros", "shape"), [
    (1, {"data": 1, "fsdp": 8, "sequence": 1, "tensor": 1}), (1, dict.fromkeys(sharding.AXES, 1)),
    (2, {"data": 2, "fsdp": 1, "sequence": 2, "tensor": 2})])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_walk_counts_the_head_by_the_expected_number_of_scored_positions(micros, shape, platform):
    """On any mesh; three products per scored position, in the step's one loop of unknown length."""
    cfg = small_config(batch_size=8, num_microbatches=micros, text_vocab_size=700)
    mesh = jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape))
    jaxpr = compile.trace(cfg, compile.abstract_state(cfg), mesh).jaxpr.jaxpr
    found = list(walk.equations(jaxpr, platform, roofline.expected_chunks(cfg, shape)))
    D, V, scored = cfg.model.d_model, cfg.model.padded_vocab_size, kind_of(cfg).expected(cfg).scored
    head = sum(walk.product_flops(eqn) * n for eqn, n, _ in found
               if any(V // shape["tensor"] in v.aval.shape for v in (*eqn.invars, *eqn.outvars)))
    assert head == pytest.approx(3 * 2 * D * V * scored)
    assert sum(eqn.primitive.name == "while" for eqn, *_ in found) == 1


def test_weights_inside_shard_map_are_each_chips_own():
    """Four chips read a whole 8 x 6 matrix each: as many bytes a chip as when one reads it outside."""
    mesh = jax.sharding.AbstractMesh((4,), ("x",))
    rows, whole = jax.sharding.PartitionSpec("x"), jax.sharding.PartitionSpec()
    x, w = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((8, 6), jnp.float32)

    def split(x, w):
        return jax.shard_map(jnp.dot, mesh=mesh, in_specs=(rows, whole), out_specs=rows)(x, w)

    with compile.entered(mesh):
        inside = walk.work(jax.make_jaxpr(split)(x, w).jaxpr, w, 1)
    outside = walk.work(jax.make_jaxpr(jnp.dot)(x, w).jaxpr, w, 1)
    assert (outside.weight_bytes, outside.activation_bytes) == (4 * 8 * 6, 4 * 4 * (8 + 6))
    assert (inside.weight_bytes, inside.activation_bytes) == (0, 4 * 4 * 8 * 6 + 4 * 4 * (8 + 6))
    assert inside.largest_bytes == outside.largest_bytes == 4 * 4 * 6


def test_kernels_with_a_stated_cost_are_counted_and_others_noted():
    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...]

    def call(x, cost):
        return pl.pallas_call(kernel, out_shape=x, cost_estimate=cost, interpret=True)(x)

    x = jnp.ones((8, 128))
    cost = pl.CostEstimate(flops=7, bytes_accessed=11, transcendentals=0)
    done = walk.work(jax.make_jaxpr(lambda x: call(call(x, cost), None))(x).jaxpr, {}, 1)
    assert (done.flops, done.activation_bytes, done.kernels) == (7, 11, 1)


def test_attention_kernels_are_charged_for_visible_pairs():
    cfg = small_config()
    pairs = kind_of(cfg).expected(cfg).pairs
    done = roofline.kernel_work(cfg, Work(1.0, 0, 0, 0, 0, kernels=3), pairs)
    m = cfg.model
    assert done.flops == 1 + 2 * 9 * m.num_layers * m.num_heads * m.head_dim * pairs


@pytest.mark.parametrize(("message", "want"), [
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (60.83G) "
     "exceeds available HBM (15.75G).", (60.83 * GIB, 15.75 * GIB, "the compiler's count of temporaries")),
    ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: needs (30.58G) exceeds available HBM (15.75G)",
     (30.58 * GIB, 15.75 * GIB, "in all")),
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 900.5M of 15.75G hbm.",
     (900.5 * 2**20, 15.75 * GIB, "in all")),
])
def test_out_of_memory_is_parsed(message, want):
    needed, available, what = compile.parse_out_of_memory(message)
    assert (needed, available, what) == (pytest.approx(want[0]), pytest.approx(want[1]), want[2])


def test_hbm_is_read_from_the_compilers_report(tmp_path):
    assert compile.buffers_in_hbm(tmp_path) is None
    report = ("Memory Space: default (color=0)\nTotal bytes: 813 (813B)\n\n"
              "Memory Space: vmem (color=1)\nTotal bytes: 9000 (9KiB)\n")
    (tmp_path / "module_3.after_optimizations-memory-usage-report.txt").write_text(report)
    assert compile.buffers_in_hbm(tmp_path) == 813


def test_other_compiler_errors_are_one_line():
    with pytest.raises(UserError, match=r"the compiler failed: INTERNAL: no$"):
        compile.parse_out_of_memory("INTERNAL: no\nmore")


@pytest.mark.parametrize(("batch_size", "micros", "message"), [
    (500, 1, "train.batch_size=384 or 512"), (100, 1, "batch_size=128, or --config.mesh.tensor=2"),
    (128, 3, "batch_size=384")])
def test_batch_that_does_not_divide(batch_size, micros, message):
    mesh = topology.abstract_mesh(config.MeshConfig(1, -1, 1, 1), parse_accelerator("v5p-256"))
    with pytest.raises(UserError, match=message):
        sharding.check_batch_size(batch_size, micros, mesh)
    sharding.check_batch_size(512, 4, mesh)


def test_mesh_that_does_not_fit_the_chips():
    with pytest.raises(UserError, match=r"data=3 .* does not fit 128 devices"):
        topology.mesh_shape(config.MeshConfig(3, -1, 1, 1), parse_accelerator("v5p-256"))
    assert topology.mesh_shape(config.MeshConfig(2, -1, 4, 1), parse_accelerator("v5p-256")) == {
        "data": 2, "fsdp": 16, "sequence": 1, "tensor": 4}


def test_only_meshes_that_training_can_make_are_planned():
    """Between slices runs data alone: in what is asked for, in what would fit, in what the search looks at."""
    slices = parse_accelerator("2xv5litepod-16")
    with pytest.raises(UserError, match=r"^mesh\.data = 1 does not divide over 2 slices.*mesh\.data=2 or a"):
        topology.mesh_shape(config.MeshConfig(1, -1, 1, 1), slices)
    assert topology.mesh_shape(config.MeshConfig(-1, 4, 2, 1), slices)["data"] == 4
    cfg = search.change(small_config(batch_size=64), mesh={"data": 4})
    smaller = list(search.smaller(cfg, topology.mesh_shape(cfg.mesh, slices), 2))
    looked = [group[0] for group in search.settings(cfg, slices)]
    shapes = [[topology.mesh_shape(c.mesh, slices) for c in configs] for configs in (smaller, looked)]
    assert [{shape["data"] for shape in part} for part in shapes] == [{4, 2}, {2, 4, 8, 16, 32}]
    assert {shape["fsdp"] for shape in shapes[0]} == {8, 16, 4, 2}


def test_rows_and_heads_must_divide():
    planner = search.Planner(small_config(), parse_accelerator("h100-24"))
    with pytest.raises(UserError, match=r"^data\.seq_len = 128 does not divide over mesh\.sequence = 3"):
        planner.candidate(search.change(planner.cfg, mesh={"sequence": 3}))
    with pytest.raises(UserError, match=r"^model\.num_kv_heads = 4 does not divide over mesh\.tensor = 8"):
        planner.candidate(search.change(planner.cfg, mesh={"fsdp": 1, "tensor": 8, "sequence": 1, "data": 3},
                                        train={"batch_size": 24}))


@pytest.mark.parametrize(("name", "hosts"), [("h100-8", 1), ("h100-24", 3), ("v5p-8", 1), ("v5p-16", 2),
                                             ("v5litepod-8", 1), ("2xv5litepod-4", 2), ("2xv5p-64", 16)])
def test_a_plan_for_several_hosts_says_that_the_trainer_starts_one(name, hosts):
    accelerator = parse_accelerator(name)
    assert accelerator.num_hosts == hosts
    mesh = topology.abstract_mesh(config.MeshConfig(accelerator.num_slices, -1, 1, 1), accelerator)
    candidate = search.Candidate(small_config(), mesh, Work(0, 0, 0, 0, 0, 0), None, None, None)
    said = [note for note in plan.notes(candidate, accelerator, "") if "hosts" in note]
    assert said == [f"{hosts} hosts: the same command runs on each, one process a host, and all must reach "
                    "--workdir"] * (hosts > 1)


@pytest.mark.parametrize(("name", "micros", "noted"), [("2xv5p-64", 4, 1), ("2xv5p-64", 1, 0),
                                                       ("v5p-64", 4, 0)])
def test_micro_batches_over_the_slow_network_are_noted(name, micros, noted):
    accelerator = parse_accelerator(name)
    cfg = search.change(small_config(), train={"batch_size": 256, "num_microbatches": micros})
    mesh = topology.abstract_mesh(config.MeshConfig(accelerator.num_slices, -1, 1, 1), accelerator)
    candidate = search.Candidate(cfg, mesh, Work(0, 0, 0, 0, 0, 0), None, None, None)
    said = [note for note in plan.notes(candidate, accelerator, "") if "slow network 4 times" in note]
    assert len(said) == noted


def test_smaller_tries_the_nearest_changes_first():
    cfg = search.change(small_config(batch_size=16), model={"remat": "none"})
    tried = [(c.model.remat, c.train.num_microbatches, c.mesh.data)
             for c in search.smaller(cfg, {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 1})]
    assert tried[:5] == [("full", 1, 2), ("full", 2, 2), ("full", 4, 2), ("full", 1, 1), ("full", 4, 1)]


def test_parts_of_hbm_add_up_to_the_compilers_figure():
    held = Memory(parameters=10, optimizer=20, ema=10, batch=2, gradients=10, residuals=40, working=30)
    made = compile.Compiled(fits=True, argument_bytes=45, code_bytes=5, hbm_bytes=125, peak_bytes=120,
                            needed_bytes=0, available_bytes=0, what="", seconds=1.0)
    parts = {part.name: part.bytes for part in plan.hbm_parts(held, made)}
    assert (parts["padding"], parts["program"], parts["not attributed"]) == (3, 5, -5)
    assert sum(parts.values()) == made.hbm_bytes
    for other in (None, made._replace(fits=False)):
        assert sum(part.bytes for part in plan.hbm_parts(held, other)) == held.total


def test_search_compiles_few(monkeypatch):
    """By formula every split of 16 chips is ranked; what was compiled is not compiled again, what does not fit
    is tried with more micro-batches, and one split of each remat policy and tensor size is enough."""
    tried = []

    def compile_step(cfg, state, mesh, label, left):
        tried.append((cfg.model.remat, cfg.mesh.tensor, cfg.train.num_microbatches))
        return compile.Compiled(cfg.train.num_microbatches > 1, 0, 0, 7, 0, 9, 8, "in all", 60.0)

    monkeypatch.setattr(search, "compile_step", compile_step)
    monkeypatch.setattr(topology, "make_mesh", lambda *_: None)
    planner = search.Planner(small_config(batch_size=64), parse_accelerator("v5litepod-16"))
    given = planner.candidate(planner.cfg)
    assert planner.compile(given) is planner.compile(given)
    best, looked = search.search(planner, wanted=3, max_compiles=7)
    assert looked == (5 + 4 + 3 + 2) * 4  # splits of 16, 8, 4 and 2 chips over data and fsdp, remat policies
    assert len(set(tried)) == len(tried) == 1 + 6
    assert [c.cfg.train.num_microbatches for c, _ in best] == [2, 2, 2]
    assert len({(c.cfg.model.remat, c.cfg.mesh.tensor) for c, _ in best}) == 3
    assert [c.step.seconds for c, _ in best] == sorted(c.step.seconds for c, _ in best)
    few, _ = search.search(planner, wanted=9, max_compiles=2)
    assert len(tried) == 1 + 6 + 2
    assert len(few) > 3, "those compiled before come free"


def test_a_chip_of_two_devices_is_counted_as_two_and_paid_as_one():
    """tpu7x: mesh and roofline are of devices, half a chip each; hours are of chips."""
    a = parse_accelerator("2xtpu7x-8")
    assert topology.mesh_shape(config.MeshConfig(2, -1, 1, 1), a) == {
        "data": 2, "fsdp": 8, "sequence": 1, "tensor": 1}
    work, held = Work(1e18, 0, 16e12, 0, 0, 0), Memory(0, 0, 0, 0, 0, 0, 0)
    exchange = Collectives(0, 0, 3e9, 0, 0, 0)
    step = roofline.estimate(small_config(), a, {"data": 2, "fsdp": 8, "sequence": 1, "tensor": 1}, work, held,
                             exchange)
    assert step.matmul == pytest.approx(1e18 / 8 / (2307e12 * roofline.MATMUL_EFFICIENCY))  # 8 chips
    assert step.hbm == pytest.approx(16e12 / 8 / (7380e9 * roofline.HBM_EFFICIENCY))
    assert step.dcn == pytest.approx(3e9 / (100e9 / 8 / 2 * roofline.DCN_EFFICIENCY))  # half its chip's share
    assert step.mfu == pytest.approx(step.model_flops / step.seconds / (8 * 2307e12))
    run = roofline.run(small_config(), a, step._replace(seconds=3600.0), params=1)
    assert (run.chip_hours, run.dollars) == (8 * small_config().train.num_steps, None)


def test_what_libtpu_does_not_know_is_planned_by_formula_and_says_so(monkeypatch):
    def devices(accelerator):
        raise topology.Unknown(f"libtpu 0.0.1 cannot describe {accelerator.name}")

    monkeypatch.setattr(topology, "devices", devices)
    made = plan.make_plan(small_config(), parse_accelerator("tpu7x-8"), "toy", search_too=True)
    assert made["compiler"] is None and made["fits"] and made["search"]["compiles"] == 0
    assert made["notes"][:2] == [
        "libtpu 0.0.1 cannot describe tpu7x-8: by formula only, nothing was compiled",
        "8 devices, 2 a chip: the mesh is of these"]
    shown = text.render(made)
    assert "HBM per device, GiB" in shown and "by formula (untested)" in shown and "price unknown" in shown


def test_libtpu_missing_says_what_to_do(monkeypatch):
    monkeypatch.setattr(topology, "have_libtpu", lambda: False)
    with pytest.raises(UserError, match=r"pip install '\.\[tpu\]'"):
        plan.make_plan(small_config(), parse_accelerator("v5p-8"), "x")


def test_gpu_plan_is_analytic_and_readable():
    made = plan.make_plan(small_config(), parse_accelerator("h100-8"), "toy", tokens=1e6, search_too=True)
    assert json.loads(json.dumps(made)) == made
    assert made["compiler"] is None
    assert made["fits"]
    assert made["search"]["best"], "something fits"
    shown = text.render(made)
    assert "by formula" in shown
    assert "ESTIMATE" in shown
    assert max(map(len, shown.splitlines())) < 400


def test_gpu_plan_that_does_not_fit_says_what_would():
    cfg = config.from_dict(transfusion.get_config("7b"))
    cfg = search.change(cfg, model={"remat": "none"}, train={"batch_size": 512})
    made = plan.make_plan(cfg, parse_accelerator("h100-64"), "7b")
    assert not made["fits"]
    assert "does not fit" in made["verdict"]
    assert "(untested): --config.mesh.data=1" in made["suggestion"]
