"""What a kind of training may keep beside its parameters: buffers, which follow them, and frozen trees, which
stay. A line fitted to points (tests/toy.py), with a moving centre of its weights and a table that is read.
"""

import os
import shutil
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toy
from tests.conftest import replace
from tests.test_resume import assert_same_bits
from tfusion import checkpoint, config, sharding
from tfusion.data import packing
from tfusion.errors import UserError
from tfusion.inference import trained
from tfusion.objectives import make_objective
from tfusion.objectives.base import KINDS, Aux
from tfusion.training import loop
from tfusion.training import state as states
from tfusion.training import step as steps
from tfusion.training.optimizer import make_optimizer

SHAPE, STEPS, EVERY = (37, 41), 6, 3  # no other array of the step has this shape
TABLE = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def objective(cfg, table=lambda: TABLE):
    """The toy's, with a frozen table in its loss, and buffers: its steps and a centre of its weights."""
    plain = toy.make(cfg)

    def loss(params, aux: Aux, batch, key):
        total, count = plain.loss(params, aux._replace(frozen={"offset": toy.OFFSET}), batch, key)["error"]
        tie = jnp.sum((params["line_kernel"] - aux.buffers["centre"]) ** 2)
        read = jnp.sum(aux.frozen["deep"][0]["table"]) * jnp.mean(params["line_kernel"] ** 2)
        return {"error": (total + 1e-3 * len(batch.y_B) * (tie + read), count)}

    def after_update(params, buffers, batch, key):
        return {"steps": buffers["steps"] + 1, "centre": 0.5 * (buffers["centre"] + params["line_kernel"])}

    return plain._replace(
        loss=loss, after_update=after_update, frozen=lambda: {"deep": [{"table": jnp.asarray(table())}]},
        init_buffers=lambda key: {"steps": jnp.zeros((), jnp.int32), "centre": jnp.ones(cfg.width)})


@pytest.fixture(scope="module")
def toy_cfg():
    tree = toy.get_config()
    tree["train"] |= dict(num_steps=STEPS, checkpoint_every=EVERY, log_every=1, eval_every=0,
                          diagnostics_every=0, num_microbatches=2, batch_size=16)
    return config.from_dict(tree)


def mesh():
    return sharding.parse_mesh("fsdp=8")


def train(cfg, workdir, table=lambda: TABLE):
    kind = KINDS["toy"]._replace(make=lambda cfg: objective(cfg, table))
    with mock.patch.dict(KINDS, toy=kind), jax.set_mesh(mesh()):
        return jax.device_get(loop.train(cfg, workdir, mesh()))


@pytest.fixture(scope="module")
def whole(toy_cfg, tmp_path_factory):
    """(workdir, last state) of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("toy") / "run"
    workdir.mkdir()
    return workdir, train(toy_cfg, workdir)


def gone():
    raise FileNotFoundError("the table's file is no longer there")


def step_of(cfg):
    """(the step, lowered; its state, frozen trees and batch) on one device."""
    made, tx = objective(cfg), make_optimizer(cfg.optimizer, STEPS)
    rows = KINDS["toy"].open_rows(cfg)
    batch = packing.stack_rows(rows.read(range(cfg.train.batch_size)))
    one = sharding.parse_mesh(None)
    with jax.set_mesh(one):
        state = states.init_state(made, tx, True, 0, one)
        frozen = made.frozen()
        return steps.jit_train_step(made, tx, cfg, state).lower(state, frozen, batch), state, frozen, batch


@pytest.mark.parametrize("micros", [1, 2])
def test_buffers_follow_the_new_parameters_once_a_step(toy_cfg, micros):
    """However many micro-batches the step has."""
    lowered, state, frozen, batch = step_of(replace(toy_cfg, "train", num_microbatches=micros))
    step, centre = lowered.compile(), np.ones(toy_cfg.width, np.float32)
    for number in range(1, 4):
        before = np.asarray(state.params["line_kernel"])
        state, _ = step(state, frozen, batch)
        after = np.asarray(state.params["line_kernel"])
        centre = np.float32(0.5) * (centre + after)
        assert (before != after).all() and int(state.buffers["steps"]) == number == int(state.step)
        np.testing.assert_array_equal(state.buffers["centre"], centre)


def test_the_loss_sees_the_buffers_of_the_step_before(toy_cfg):
    lowered, state, frozen, batch = step_of(toy_cfg)
    moved = jax.tree.map(jnp.copy, state)
    moved.buffers["centre"] += 10
    losses = [lowered.compile()(each, frozen, batch)[1]["error"][0] for each in (state, moved)]
    assert losses[1] > losses[0]


def test_frozen_trees_are_arguments_and_no_constants(toy_cfg):
    """In the program's text the table's shape stands where arguments do, and nowhere as a constant; another
    table through the same program gives another loss."""
    lowered, state, _, batch = step_of(toy_cfg)
    of_shape = [line for line in lowered.as_text().splitlines() if "tensor<37x41xf32>" in line]
    assert any("func.func public @main" in line for line in of_shape)
    assert not any("constant" in line for line in of_shape)
    step, copy = lowered.compile(), jax.tree.map(jnp.copy, state)
    assert "f32[37,41]" in step.as_text().split("entry_computation_layout=")[1].split("->")[0]
    losses = [step(each, {"deep": [{"table": table}]}, batch)[1]["error"][0]
              for each, table in ((state, TABLE), (copy, TABLE + 1))]
    assert losses[1] > losses[0]


def test_neither_is_trained_nor_averaged(toy_cfg, whole):
    """No moments, no average: the state has the table nowhere, and the buffers once."""
    state = whole[1]
    shapes = [x.shape for x in jax.tree.leaves(state)]
    assert SHAPE not in shapes and shapes.count((toy_cfg.width,)) == 1 + 2 + 1 + 1  # and the buffer itself
    assert set(states.items(state)) == {"params", "optimizer", "ema", "buffers"}
    assert states.items(state)["buffers"].keys() == {"steps", "centre"}


def test_resumed_equals_uninterrupted(toy_cfg, whole, tmp_path):
    """Bit by bit, buffers too; what the frozen trees came from is gone by then."""
    workdir, state = whole
    copy = Path(shutil.copytree(workdir, tmp_path / "run"))
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    resumed = train(toy_cfg, copy, gone)
    assert int(resumed.buffers["steps"]) == STEPS
    assert_same_bits(resumed, state)


def files(folder) -> dict:
    return {p: os.stat(p).st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def test_frozen_trees_are_saved_once(toy_cfg, whole, tmp_path):
    """In no checkpoint, and not again where a run goes on."""
    copy = Path(shutil.copytree(whole[0], tmp_path / "run"))
    before = files(copy / "frozen")
    assert sum(p.stat().st_size for p in before) > TABLE.nbytes / 2
    train(replace(toy_cfg, "train", num_steps=2 * STEPS), copy)
    assert files(copy / "frozen") == before
    assert sorted(p.name for p in (copy / "checkpoints" / str(2 * STEPS)).iterdir() if p.is_dir()) == [
        "buffers", "ema", "meta", "optimizer", "params"]


def opened(workdir, where=None):
    """Where the table's source is gone."""
    kind = KINDS["toy"]._replace(make=lambda cfg: objective(cfg, gone))
    with mock.patch.dict(KINDS, toy=kind):
        return trained.load(workdir, mesh=sharding.parse_mesh(where))


@pytest.mark.parametrize("where", [None, "fsdp=4,tensor=2"])
def test_a_trained_one_is_opened_with_both(toy_cfg, whole, where):
    run = opened(whole[0], where)
    assert jax.tree.structure(run.aux.frozen) == jax.tree.structure(objective(toy_cfg).frozen())
    np.testing.assert_array_equal(run.aux.frozen["deep"][0]["table"], TABLE)
    assert_same_bits(jax.device_get(run.aux.buffers), whole[1].buffers)
    assert int(run.aux.step) == STEPS


def test_a_kind_without_them_saves_neither(prepared_root, tmp_path):
    made = make_objective(config.from_dict(toy.get_config()))._replace(
        init_buffers=lambda key: {}, after_update=lambda params, buffers, batch, key: buffers,
        frozen=lambda: {}, loss=lambda params, aux, batch, key: {"error": (
            jnp.sum((batch.x_BD @ params["line_kernel"] - batch.y_B) ** 2), len(batch.y_B))})
    tree = toy.get_config()
    tree["train"] |= dict(num_steps=1, eval_every=0, diagnostics_every=0, checkpoint_every=1)
    kind = KINDS["toy"]._replace(make=lambda cfg: made)
    with mock.patch.dict(KINDS, toy=kind), jax.set_mesh(mesh()):
        state = loop.train(config.from_dict(tree), tmp_path, mesh())
    assert state.buffers == {} and not (tmp_path / "frozen").exists()
    assert not (tmp_path / "checkpoints" / "1" / "buffers").exists()


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_frozen_trees_that_were_lost_are_one_line(toy_cfg, whole, tmp_path, how):
    copy = Path(shutil.copytree(whole[0], tmp_path / "run"))
    if how == "gone":
        shutil.rmtree(copy / "frozen")
    else:
        largest = max(files(copy / "frozen"), key=lambda p: p.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
    line = rf"{copy}/frozen cannot be read .*: bring it back from where the run was copied, or start again$"
    longer = replace(toy_cfg, "train", num_steps=2 * STEPS)
    for use in (lambda: train(longer, copy), lambda: opened(copy)):
        with pytest.raises(UserError, match=line) as e:
            use()
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("tree", [(1.0, 2.0), {"a": (1.0,)}, 1.0], ids=["tuple", "inside", "leaf"])
def test_frozen_trees_are_dicts(tree, tmp_path):
    """What is read back is: another container would be another tree to the resumed step."""
    with pytest.raises(UserError, match="must give a dict, of arrays"):
        checkpoint.save_frozen(tmp_path, jax.tree.map(np.float32, tree))
    assert not (tmp_path / "frozen").exists()
