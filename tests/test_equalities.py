"""Docs: DESIGN.md, Equalities. The same numbers whichever way they are computed.

One device, unsharded, one micro-batch, unrolled is the reference. All in float32, from one state whose
every parameter is away from its initial zero or one, so that every gradient is alive.

B batch rows, T positions, I image slots, h w c latent, V vocabulary.
"""

import dataclasses
import itertools
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import replace, tiny_config, with_shares
from tfusion import config, sharding
from tfusion.data import packing, pipeline
from tfusion.diffusion.losses import NUM_BINS, diffusion_losses, draw_noise
from tfusion.diffusion.process import ddpm
from tfusion.models import lm_head
from tfusion.models.transfusion import Transfusion
from tfusion.objectives import kind_of, make_objective
from tfusion.objectives.base import Aux
from tfusion.training import loop
from tfusion.training import state as states
from tfusion.training import step as steps
from tfusion.training.optimizer import B1, CLIP_NORM, make_optimizer

STEPS = 20
LOSS_RTOL, GRADIENT_RTOL, CURVE_RTOL = 1e-5, 1e-4, 1e-4
NO_AUX = Aux(0, {}, {})
ONE = (1, 1, 1, 1)
MESHES = {  # (data, fsdp, tensor, sequence), micro-batches; the first three are not slow
    "data4-tensor2-micro2": ((4, 1, 2, 1), 2),
    "fsdp2-tensor2-sequence2": ((1, 2, 2, 2), 1),
    "sequence4": ((1, 1, 1, 4), 1),
    "data2-fsdp2-tensor2": ((2, 2, 2, 1), 1),
    "fsdp8": ((1, 8, 1, 1), 1),
    "data2": ((2, 1, 1, 1), 1),
    "tensor2": ((1, 1, 2, 1), 1),
    "data2-sequence4": ((2, 1, 1, 4), 1),
}
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if i > 2 else []) for i, name in enumerate(MESHES)]


pytestmark = pytest.mark.usefixtures("quick_compiles")


def make_mesh(sizes):
    return sharding.make_mesh(config.MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


def with_value(cfg, name: str, value):
    group, key = name.split(".")
    return replace(cfg, group, **{key: value})


def shake(tree, seed: int):
    """Adds normal noise to every leaf: zeros and ones would hide what does not reach them."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten([x + 0.05 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves])


class Runs:
    """20 steps from one state on the same 20 batches, on any mesh; each is run once."""

    def __init__(self, root):
        self.cfg = tiny_config(root)
        self.objective = make_objective(self.cfg)
        self.tx = make_optimizer(self.cfg.optimizer, STEPS)
        self.rows = kind_of(self.cfg).open_rows(self.cfg)
        self.batches = list(pipeline.batches(self.rows, 0, STEPS, self.cfg.train.batch_size))
        self.on = cache(self._on)

    @property
    def batch(self):
        return self.batches[0]

    def start(self):
        mesh = make_mesh(ONE)
        with jax.set_mesh(mesh):
            fresh = jax.device_get(states.init_state(self.objective, self.tx, True, self.cfg.seed, mesh))
        return fresh._replace(params=shake(fresh.params, 1), ema_params=shake(fresh.params, 2))

    def placed(self, mesh, state):
        target = states.restore_target(self.objective, self.tx, True, mesh)
        return jax.tree.map(lambda x, t: jax.device_put(x, t.sharding), state, target)

    def _on(self, sizes=ONE, num_microbatches=1, donate=True):
        mesh = make_mesh(sizes)
        cfg = with_value(self.cfg, "train.num_microbatches", num_microbatches)
        with jax.set_mesh(mesh):
            state = self.placed(mesh, self.start_state)
            step = steps.jit_train_step(self.objective, self.tx, cfg, state) if donate else \
                jax.jit(steps.make_train_step(self.objective, self.tx, cfg))
            placed = state_shardings(state)
            first, losses = [], []
            for batch in self.batches:
                state, values = step(state, {}, sharding.put_batch(batch, mesh, len(batch.row_ids_B)))
                losses.append(jax.device_get(values))
                if len(first) < 3:
                    first.append(jax.device_get(state))
        return SimpleNamespace(losses=losses, first=first, last=jax.device_get(state),
                               shardings=(placed, state_shardings(state)))

    @property
    def start_state(self):
        if not hasattr(self, "_start"):
            self._start = self.start()
        return self._start


def state_shardings(state):
    return jax.tree.map(lambda x: x.sharding, state)


@pytest.fixture(scope="module")
def runs(prepared_root):
    return Runs(prepared_root)


def mean(losses, name: str) -> float:
    total, count = losses[name]
    return float(total) / float(count)


def gradients_of(state, losses):
    """A step's gradients from Adam's first moment after it: (1 - B1) * clipped gradient."""
    norm = float(losses["grad_norm"][0])
    return jax.tree.map(lambda m: m / (1 - B1) * max(1.0, norm / CLIP_NORM), state.opt_state[1][0].mu)


def assert_gradients_equal(got, want, rtol=GRADIENT_RTOL):
    """Norm-wise, parameter by parameter; and no parameter is without a gradient."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(t) for t in (got, want))):
        name, norm = jax.tree_util.keystr(path), np.linalg.norm(b)
        assert norm > 0, f"{name} has no gradient: the comparison is empty"
        assert np.linalg.norm(a - b) <= rtol * norm, name


# ---------------------------------------------------------------- meshes

@pytest.mark.parametrize("name", NAMES)
def test_first_step_on_a_mesh_equals_one_device(runs, name):
    got, want = runs.on(*MESHES[name]), runs.on()
    for loss in ("lm_loss", "diffusion_loss", "grad_norm"):
        assert mean(got.losses[0], loss) == pytest.approx(mean(want.losses[0], loss), rel=LOSS_RTOL)
        assert got.losses[0][loss][1] == want.losses[0][loss][1]  # counts: exactly
    assert_gradients_equal(gradients_of(got.first[0], got.losses[0]),
                           gradients_of(want.first[0], want.losses[0]))


@pytest.mark.parametrize("name", NAMES)
def test_curve_on_a_mesh_equals_one_device(runs, name):
    got, want = runs.on(*MESHES[name]), runs.on()
    for loss in ("lm_loss", "diffusion_loss"):
        curves = [[mean(x, loss) for x in run.losses] for run in (got, want)]
        np.testing.assert_allclose(*curves, rtol=CURVE_RTOL, err_msg=loss)
        assert len(set(curves[1])) == STEPS


@pytest.mark.parametrize("name", NAMES)
def test_state_stays_in_its_shards(runs, name):
    run = runs.on(*MESHES[name])
    shapes = jax.tree.map(lambda x: x.ndim, run.last)
    same = jax.tree.map(lambda a, b, ndim: a.is_equivalent_to(b, ndim), *run.shardings, shapes)
    assert all(jax.tree.leaves(same)), [jax.tree_util.keystr(p) for p, ok in
                                        jax.tree_util.tree_leaves_with_path(same) if not ok]


def test_parameters_are_really_sharded(runs):
    mesh = make_mesh((2, 2, 2, 1))
    with jax.set_mesh(mesh):
        state = states.init_state(runs.objective, runs.tx, True, runs.cfg.seed, mesh)
    m, layers = runs.cfg.model, runs.cfg.model.num_layers
    D, F, H, K, V = m.d_model, m.d_ff, m.num_heads, m.num_kv_heads, m.padded_vocab_size
    want = {"wq_kernel": (layers, D // 2, H * m.head_dim // 2),
            "wk_kernel": (layers, D // 2, K * m.head_dim // 2),
            "wo_kernel": (layers, H * m.head_dim // 2, D // 2),
            "gate_kernel": (layers, D // 2, F // 2), "down_kernel": (layers, F // 2, D // 2),
            "token_embedding": (V // 2, D // 2), "lm_head_kernel": (D // 2, V // 2)}
    for tree in (state.params, state.opt_state[1][0].mu, state.opt_state[1][0].nu, state.ema_params):
        shards = {path[-1].key: (x.shape, {s.data.shape for s in x.addressable_shards},
                                 len({str(s.index) for s in x.addressable_shards}))
                  for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        for name, shape in want.items():
            full, shapes, distinct = shards[name]
            assert shapes == {shape}, name
            assert distinct * np.prod(shape) == np.prod(full), name
    alone = runs.start_state  # shaken from the same seed on one device
    fresh = jax.device_get(state.params)
    for x, y in zip(jax.tree.leaves(shake(fresh, 1)), jax.tree.leaves(alone.params)):
        np.testing.assert_array_equal(x, y)  # initialised alike on any mesh


def test_lowered_step_has_sharding_constraints(runs):
    """`with mesh:` in place of `jax.set_mesh(mesh)` would leave none of them (see test_sharding.py)."""
    mesh = make_mesh((2, 2, 2, 1))
    with jax.set_mesh(mesh):
        state = states.restore_target(runs.objective, runs.tx, True, mesh)
        step = steps.jit_train_step(runs.objective, runs.tx, runs.cfg, state)
        text = step.lower(state, {}, sharding.put_batch(runs.batch, mesh, 8)).as_text()
    lines = [line for line in text.splitlines() if "sdy.sharding_constraint" in line]
    rows, tensor = '[{"data", "fsdp"}, {"sequence"}, ', '{"tensor"}'
    B, T, m = *runs.batch.tokens_BT.shape, runs.cfg.model

    def count(spec, shape):
        return sum(f"{rows}{spec}]>" in line and f"<{'x'.join(map(str, shape))}xf32>" in line
                   for line in lines)

    # Each once forward and once backward; the blocks share one body.
    assert count("{}", (B, T, m.d_model)) >= 4  # the residual stream: into the decoder, after a block
    assert count(tensor + ", {}", (B, T, m.num_heads, m.head_dim)) >= 2  # heads
    assert count(tensor, (B, T, m.d_ff)) >= 2  # the MLP's hidden layer
    table = f"[{tensor}, {{}}]> : tensor<{m.padded_vocab_size}x{m.d_model}xf32>"
    assert sum(line.endswith(table) for line in lines) >= 2  # the embedding: split in vocabulary alone
    images = f'[{{"data", "fsdp"}}, {{}}, {{}}]> : tensor<{B}x{runs.cfg.rows.image_slots}x{m.d_model}xf32>'
    assert sum(line.endswith(images) for line in lines) >= 2  # the adapter: split by rows alone
    queries, keys = f"{rows}{tensor}, {{}}]", f'[{{"data", "fsdp"}}, {{}}, {tensor}, {{}}]'
    kernels = [line for line in text.splitlines() if "sdy.manual_computation" in line]
    assert any(queries in line and keys in line for line in kernels)  # attention: queries split, keys whole


# ---------------------------------------------------------------- one device

def gradients(runs, num_microbatches=1, **model):
    cfg = runs.cfg
    for key, value in model.items():
        cfg = with_value(cfg, f"model.{key}", value)
    key = steps.noise_key(cfg.seed, 0)
    fn = jax.jit(lambda params, batch: steps.gradients(make_objective(cfg), params, NO_AUX, batch, key,
                                                       num_microbatches))
    with jax.set_mesh(make_mesh(ONE)):
        return jax.device_get(fn(runs.start_state.params, runs.batch))


@pytest.fixture(scope="module")
def whole(runs):
    """Gradients and losses of one batch in one piece, blocks unrolled."""
    assert runs.cfg.model.remat == "none"
    return gradients(runs)


def assert_same_losses(got, want):
    for name in want:
        assert got[name][1] == want[name][1], name
        assert float(got[name][0]) == pytest.approx(float(want[name][0]), rel=LOSS_RTOL), name


@pytest.mark.parametrize("num_microbatches", [2, 4])
def test_microbatches_equal_one_batch(runs, whole, num_microbatches):
    micros = steps.split_microbatches(runs.batch, num_microbatches)
    counts = [int(m.sum()) for m in micros.loss_mask_BT]
    assert len(set(counts)) > 1, "equal counts would hide a division in the wrong place"
    got, losses = gradients(runs, num_microbatches)
    assert_same_losses(losses, whole[1])
    assert_gradients_equal(got, whole[0])


@pytest.mark.parametrize("remat", ["attention", "dots", "full"])
def test_scanned_with_remat_equals_unrolled(runs, whole, remat):
    got, losses = gradients(runs, remat=remat)
    assert_same_losses(losses, whole[1])
    assert_gradients_equal(got, whole[0])


def test_donated_step_equals_not_donated(runs):
    got, want = runs.on(), runs.on(donate=False)
    assert got.losses == want.losses  # bits
    for a, b in zip(jax.tree.leaves(got.last), jax.tree.leaves(want.last)):
        np.testing.assert_array_equal(a, b)


def test_step_counts_and_uses_the_gradients(runs, whole):
    run = runs.on()
    assert [int(s.step) for s in run.first] == [1, 2, 3]
    assert_gradients_equal(gradients_of(run.first[0], run.losses[0]), whole[0])
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in jax.tree.leaves(whole[0])))
    assert run.losses[0]["grad_norm"][0] == pytest.approx(norm, rel=1e-5)


def test_moving_average_is_its_definition(runs):
    """e <- d e + (1 - d) p, of the new parameters; d = min(decay, (1 + n) / (10 + n)) at step n."""
    run, decay = runs.on(), runs.cfg.optimizer.ema_decay
    ema = jax.tree.map(np.float64, runs.start_state.ema_params)
    for n, state in enumerate(run.first):
        d = min(decay, (1 + n) / (10 + n))
        ema = jax.tree.map(lambda e, p, d=d: d * e + (1 - d) * p, ema, state.params)
        for a, b in zip(jax.tree.leaves(state.ema_params), jax.tree.leaves(ema)):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_diagnostics_are_the_norms_of_separate_gradients(runs):
    objective, cfg, batch = runs.objective, runs.cfg, runs.batch
    key = steps.eval_key()

    @jax.jit
    def separate(params, chosen):
        def total(p):
            losses = objective.loss(p, NO_AUX, batch, key)
            lm, diffusion = losses["lm_loss"], losses["diffusion_loss"]
            return (chosen[0] * lm[0] / lm[1]
                    + chosen[1] * cfg.loss_weight * diffusion[0] / diffusion[1])
        return jax.grad(total)(params)

    def norm(tree):
        return float(np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(tree))))

    params = runs.start_state.params
    got = jax.jit(steps.make_diagnostics(objective))(params, NO_AUX, batch)
    assert set(got) == {"lm_loss", "diffusion_loss"}
    lm, diffusion = (separate(params, np.float32(c)) for c in ([1, 0], [0, 1]))
    assert float(got["lm_loss"]) == pytest.approx(norm(lm), rel=1e-4)
    assert float(got["diffusion_loss"]) == pytest.approx(norm(diffusion), rel=1e-4)


# ---------------------------------------------------------------- packing

def suits(runs, rows, limit: int) -> bool:
    """No more than `limit` documents, some with several pictures, some with none, several to a row."""
    images = [[int(runs.rows.sources[s].sizes([r])[1][0]) for s, _, r, _ in plan] for _, plan in rows]
    every = list(itertools.chain(*images))
    return len(every) <= limit and 0 in every and max(every) > 1 and min(map(len, images)) > 1


def test_packed_rows_equal_each_document_alone(runs):
    """Losses summed, outputs position by position, gradients."""
    model = runs.cfg.model
    B, plans = runs.cfg.train.batch_size, runs.rows.plan(0).rows
    packed = next(pair for pair in itertools.combinations(enumerate(plans), 2) if suits(runs, pair, B))
    packed = [(row, runs.rows.examples(plan)) for row, plan in packed]
    documents = [(i, x) for i, (_, examples) in enumerate(packed) for x in examples]

    def rows(chosen):
        chosen = [*chosen, *[(0, [])] * (B - len(chosen))]
        return packing.stack_rows([packing.pack_row(i, examples, runs.cfg.rows) for i, examples in chosen])

    together, alone = rows(packed), rows([(0, [x]) for _, x in documents])
    # The noise belongs to the row, so the documents alone are given what the packed rows drew.
    process = ddpm(runs.cfg.process.prediction, runs.cfg.process.num_timesteps)
    t_BI, eps = draw_noise(process, steps.noise_key(0, 0), together.noise_ids_BI2, together.max_t_BI,
                           model.latent_shape)
    t_BI, eps = np.asarray(t_BI), np.asarray(eps)
    places, t_alone, eps_alone = [], np.zeros_like(t_BI), np.zeros_like(eps)
    starts, slots = [0] * B, [0] * B
    for i, (row, example) in enumerate(documents):
        n, k = len(example.tokens_L), len(example.max_t_I)
        places.append((row, starts[row], slots[row], n, k))
        t_alone[i, :k] = t_BI[row, slots[row] : slots[row] + k]
        eps_alone[i, :k] = eps[row, slots[row] : slots[row] + k]
        starts[row], slots[row] = starts[row] + n, slots[row] + k

    transformer = Transfusion(model, runs.cfg.data.seq_len)

    def total(params, batch, t, eps):
        x0 = batch.latents_BIhwc
        h_BTD, prediction = transformer.apply({"params": params}, batch, process.corrupt(x0, eps, t), t)
        target = process.target(x0, eps, t)
        head_DV = transformer.apply({"params": params}, method="lm_head")
        lm = lm_head.next_token_loss(h_BTD, head_DV, batch.tokens_BT, batch.loss_mask_BT, model.vocab_size)
        diffusion = diffusion_losses(prediction, target, t, batch.max_t_BI)["diffusion_loss"]
        logits = transformer.apply({"params": params}, h_BTD, method="logits")
        return lm[0] + diffusion[0], (lm, diffusion, logits, prediction)

    fn = jax.jit(jax.value_and_grad(total, has_aux=True))
    params = runs.start_state.params
    (_, (*losses, logits, prediction)), grads = jax.device_get(fn(params, together, t_BI, eps))
    (_, (*losses_alone, logits_alone, prediction_alone)), grads_alone = jax.device_get(
        fn(params, alone, t_alone, eps_alone))
    for (a, n), (b, m) in zip(losses, losses_alone):
        assert n == m > 0
        assert float(a) == pytest.approx(float(b), rel=LOSS_RTOL)
    for i, (row, start, slot, n, k) in enumerate(places):
        np.testing.assert_allclose(logits[row, start : start + n], logits_alone[i, :n], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(prediction[row, slot : slot + k], prediction_alone[i, :k],
                                   rtol=1e-4, atol=1e-5)
    assert_gradients_equal(grads, grads_alone)


# ---------------------------------------------------------------- draws

@pytest.fixture(scope="module")
def draws(runs):
    """(function of (noise ids, max_t), the numbers it gives on one device)."""
    key = steps.noise_key(runs.cfg.seed, 7)

    def draw(noise_ids_BI2, max_t_BI):
        return draw_noise(ddpm("v", runs.cfg.process.num_timesteps), key, noise_ids_BI2, max_t_BI,
                          runs.cfg.model.latent_shape)

    with jax.set_mesh(make_mesh(ONE)):
        return draw, jax.device_get(jax.jit(draw)(runs.batch.noise_ids_BI2, runs.batch.max_t_BI))


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_the_same_on_any_mesh(runs, draws, name):
    draw, want = draws
    mesh = make_mesh(MESHES[name][0])
    with jax.set_mesh(mesh):
        got = jax.jit(draw)(*sharding.put_batch((runs.batch.noise_ids_BI2, runs.batch.max_t_BI), mesh, 8))
    for a, b in zip(got, want):
        np.testing.assert_array_equal(np.asarray(a), b)


def test_noise_is_the_same_in_any_microbatch_and_order(runs, draws):
    draw, want = draws
    micros = steps.split_microbatches(runs.batch, 4)
    row_of = {int(row): i for i, row in enumerate(runs.batch.row_ids_B)}
    assert sorted(row_of) == sorted(micros.row_ids_B.ravel().tolist())
    for row_ids, ids, max_t in zip(micros.row_ids_B, micros.noise_ids_BI2, micros.max_t_BI):
        order = [row_of[int(row)] for row in row_ids]
        for a, b in zip(draw(ids, max_t), want):
            np.testing.assert_array_equal(np.asarray(a), b[order])


def test_noise_differs_between_rows_slots_and_steps(runs, draws):
    t, eps = draws[1]
    flat = eps.reshape(-1, *runs.cfg.model.latent_shape)
    assert len(np.unique(flat[:, 0, 0, 0])) == len(flat)
    assert len(np.unique(t[runs.batch.max_t_BI == 1])) > 1
    a, b = (jax.random.key_data(steps.noise_key(0, n)) for n in (3, 4))
    assert (a != b).any()


def test_rows_are_the_same_for_any_number_of_processes(runs):
    B = runs.cfg.train.batch_size
    want = runs.batches[3]
    fresh = kind_of(runs.cfg).open_rows(runs.cfg)  # starts in the middle
    shares = np.arange(B).reshape(2, 2, -1).swapaxes(0, 1).reshape(4, -1)  # none need follow each other
    for local in (shares[0], np.concatenate(shares[[1, 2]])):
        for got, field in zip(next(pipeline.batches(fresh, 3 * B, 1, B, local)), want):
            np.testing.assert_array_equal(got, field[local])
    np.testing.assert_array_equal(want.row_ids_B, np.arange(3 * B, 4 * B))


def test_evaluation_draws_the_same_noise_at_every_step(runs):
    """And never that of a training step, of whatever seed."""
    seen = []
    objective = runs.objective._replace(loss=lambda params, aux, batch, key: seen.append(key) or {})
    steps.make_eval_step(objective)(None, NO_AUX, None)
    key = jax.random.key_data(seen[0])
    assert (key == jax.random.key_data(steps.noise_key(0, 2**31 - 1))).all()
    assert all(jnp.any(key != jax.random.key_data(steps.noise_key(seed, 0))) for seed in (0, runs.cfg.seed))


COMPARED = {  # what two runs may differ in and still be compared
    "data": lambda cfg: replace(with_shares(dataclasses.replace(cfg, seed=7), glosses=3.0, stories=0.1,
                                            scenes=0.2), "data", image_first_max_t=0.1),
    "rows": lambda cfg: replace(replace(cfg, "train", batch_size=4, num_microbatches=2), "data", seq_len=256),
}


@pytest.fixture(scope="module")
def held_out_figures(runs):
    def figures(cfg, state=runs.start_state):
        mesh = make_mesh(ONE)
        with jax.set_mesh(mesh):
            held = loop.Held(cfg, make_objective(cfg), mesh, None)
            return held.evaluate(state, {}, lambda losses: False)

    return figures, figures(runs.cfg)


@pytest.mark.parametrize("change", COMPARED.values(), ids=COMPARED.keys())
def test_held_out_losses_of_two_runs_can_be_compared(runs, held_out_figures, change):
    """The same model is given the same figures, whatever its run's seed, shares, limits, batches and rows."""
    figures, want = held_out_figures
    got = figures(change(runs.cfg))
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=1e-5), name


def test_held_out_losses_are_of_the_moving_average(runs, held_out_figures):
    figures, want = held_out_figures
    assert figures(runs.cfg, runs.start_state._replace(params=runs.start_state.ema_params)) == want
    assert figures(runs.cfg, runs.start_state._replace(ema_params=runs.start_state.params)) != want


def test_held_out_losses_stand_apart_by_source_and_together(held_out_figures):
    _, got = held_out_figures
    losses, sources = ("lm_loss", "diffusion_loss"), ("scenes", "stories", "glosses")
    apart = {f"eval/{source}/{name}" for source in sources for name in losses} - {"eval/glosses/diffusion_loss"}
    bins = {f"eval/diffusion_loss_bin{i}" for i in range(NUM_BINS)}
    assert got.keys() == apart | bins | {f"eval/{name}" for name in losses}
    for name in losses:
        each = [value for key, value in got.items() if key.startswith("eval/") and key.endswith("/" + name)
                and key != f"eval/{name}"]
        assert min(each) < got[f"eval/{name}"] < max(each)
