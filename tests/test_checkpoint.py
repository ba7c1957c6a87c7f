"""What is compared at resume, key by key; what a checkpoint holds, and what is done with one that is broken."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests import toy
from tests.conftest import replace, tiny_autoencoder_config, tiny_config, with_shares
from tfusion import checkpoint, config
from tfusion.checkpoint import Checkpoints, changes, check_identity, check_same
from tfusion.diffusion.sampler import SamplingConfig
from tfusion.errors import UserError

FREE = {  # what a resumed run may change; everything else it may not
    "model.remat", "model.compute_dtype", "loss_weight", "autoencoder.kl_weight",
    "data.prepared", "data.tokenizer", "data.image_first_fraction", "data.image_first_max_t",
    *(f"optimizer.{f.name}" for f in dataclasses.fields(config.OptimizerConfig)),
    *(f"train.{f.name}" for f in dataclasses.fields(config.TrainConfig)),
    *(f"mesh.{f.name}" for f in dataclasses.fields(config.MeshConfig)),
    *(f"sampling.{f.name}" for f in dataclasses.fields(SamplingConfig))}
KINDS = {"transfusion": lambda: tiny_config("data"), "autoencoder": tiny_autoencoder_config,
         "toy": lambda: config.from_dict(toy.get_config())}
LEAVES = [(kind, key) for kind, make in KINDS.items() for key in flatten_dict(make().to_dict(), sep=".")]


def changed(value):
    """Another value of the same type."""
    return value + "x" if isinstance(value, str) else value + 1


@pytest.mark.parametrize("kind, key", LEAVES)
def test_what_a_resumed_run_may_change(kind, key):
    """Entry by entry: a field that forgets to say so is missed here. Of a source its share must stay."""
    cfg = KINDS[kind]()
    tree = flatten_dict(cfg.to_dict(), sep=".")
    tree[key] = changed(tree[key])
    tree = unflatten_dict(tree, sep=".")
    assert set(changes(tree, cfg)) == {key}
    free = not key.endswith(".share") if key.startswith("data.sources.") else key in FREE
    assert (key in config.may_change(cfg)) == free
    if free:
        check_same(tree, cfg, "run")
    else:
        with pytest.raises(UserError, match=rf"^run was saved with {key} = .*, the config has .*"):
            check_same(tree, cfg, "run")


def test_sources_neither_come_nor_go(cfg):
    fewer = with_shares(cfg, scenes=0.66, glosses=0.12)
    for saved, now, what in ((cfg, fewer, ".*the config has None"), (fewer, cfg, ".share = None")):
        with pytest.raises(UserError, match=rf"run was saved with data.sources.stories{what}"):
            check_same(saved.to_dict(), now, "run")


def test_a_source_without_a_share_may_come(cfg):
    """Nothing of it is read. It gets no share later, either."""
    fewer, without = with_shares(cfg, scenes=0.66), with_shares(cfg, scenes=0.66, stories=0.0)
    check_same(fewer.to_dict(), without, "run")
    for saved, now in ((without, fewer), (without, with_shares(cfg, scenes=0.66, stories=0.22))):
        with pytest.raises(UserError, match=r"run was saved with data\.sources\.stories\..*"):
            check_same(saved.to_dict(), now, "run")


def test_a_schedule_of_shares_is_compared_as_it_was_saved(cfg):
    """As JSON has it, which knows no tuples."""
    one, other = (with_shares(cfg, scenes=((0, 1.0), (row, 0.5)), stories=1.0) for row in (64, 65))
    saved = json.loads(json.dumps(one.to_dict()))
    assert config.from_dict(saved) == one and changes(saved, one) == {}
    with pytest.raises(UserError, match=r"scenes\.share = \[\[0, 1.0\], \[64, 0.5\]\], the config has"):
        check_same(saved, other, "run")


@pytest.mark.parametrize("old, new", [(0.0, 0.9), (0.9, 0.0)])
def test_the_moving_average_is_not_switched_on_the_way(cfg, old, new):
    tree = cfg.to_dict()
    tree["optimizer"]["ema_decay"] = old
    cfg = replace(cfg, "optimizer", ema_decay=new)
    with pytest.raises(UserError, match=f"optimizer.ema_decay = {old}, the config has {new}"):
        check_same(tree, cfg, "run")


@pytest.mark.parametrize("now", [{"tokenizer": "a", "sizes.scenes": "c"}, {"tokenizer": "b"}, {"codec": "x"},
                                 {}])
def test_other_data_are_refused_and_named(now):
    saved = {"tokenizer": "a", "sizes.scenes": "b"}
    check_identity(saved, dict(saved), "run", "data")
    different = [k for k in sorted({*saved, *now}) if saved.get(k) != now.get(k)]
    with pytest.raises(UserError, match=rf"run was .* than data now holds \(changed: {', '.join(different)}\)"):
        check_identity(saved, now, "run", "data")


# ---------------------------------------------------------------- on disk

ITEMS = {"params": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)},
         "optimizer": {"m": np.ones(4, np.float32)}}


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jnp.zeros(()).sharding), tree)


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, writing=True)
    for step in (2, 4):
        checkpoints.save(step, jax.tree.map(jnp.asarray, ITEMS), {"next_row": step})
    checkpoints.close()
    return tmp_path


def test_an_item_alone_is_read_without_the_others(saved):
    """With the optimizer's files gone, the parameters are there."""
    folder = saved / "checkpoints" / "4"
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["meta", "optimizer", "params"]
    for path in sorted((folder / "optimizer").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    checkpoints = Checkpoints(saved)
    assert checkpoints.steps() == [2, 4] and checkpoints.meta(4)["next_row"] == 4
    got = checkpoints.restore(4, {"params": shapes(ITEMS["params"])})
    np.testing.assert_array_equal(got["params"]["w"], ITEMS["params"]["w"])


@pytest.mark.parametrize("version, by", [(1, "revision feb2e22 of tfusion reads it"),
                                         (2, "revision 4cbf5a4 of tfusion reads it"),
                                         (99, "use the code that wrote it")])
def test_another_format_is_one_line_that_names_what_reads_it(saved, version, by):
    path = saved / "checkpoints" / "4" / "meta" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": version}))
    with pytest.raises(UserError, match=f"has format version {version}, this code reads .*: {by}"):
        Checkpoints(saved).meta(4)


def test_numbers_that_training_never_makes_are_found(tmp_path):
    """What bytes changed on disk turn into: 3e38 is finite, and garbage."""
    for step, value in enumerate((np.nan, np.inf, 3e38)):
        checkpoints = Checkpoints(tmp_path, writing=True)
        bad = {"params": {"good": jnp.ones(3), "w": jnp.asarray([1.0, value], jnp.float32)}}
        checkpoints.save(step, bad, {})
        with pytest.raises(UserError, match=rf"{step}/params is damaged: \['w'\] holds numbers beyond"):
            checkpoints.restore(step, shapes(bad))
        checkpoints.close()


def test_what_a_killed_save_left_is_cleared_by_the_next_writer_alone(saved):
    left = saved / "checkpoints" / "6.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "half").write_text("x")
    (saved / "checkpoints" / "notes").mkdir()  # the user's
    assert Checkpoints(saved).steps() == [2, 4] and left.exists()  # it may be under way
    Checkpoints(saved, writing=True).close()
    assert not left.exists() and (saved / "checkpoints" / "notes").exists()


def test_a_save_that_fails_is_one_line(saved, monkeypatch):
    checkpoints = Checkpoints(saved, writing=True)

    def fail(*_, **__):
        raise ValueError(f"RESOURCE_EXHAUSTED: {os.strerror(28)}\nand a hundred lines more")

    monkeypatch.setattr(checkpoints._manager, "save", fail)
    text = r"cannot be written to .*\(ValueError: RESOURCE_EXHAUSTED: No space left on device\); those listed"
    with pytest.raises(UserError, match=text) as e:
        checkpoints.save(6, ITEMS, {})
    assert "\n" not in str(e.value)
    monkeypatch.undo()
    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
    with pytest.raises(UserError, match="cannot be written"):
        checkpoints.close()
    assert Checkpoints(saved).steps() == [2, 4]


def test_two_are_kept(saved):
    checkpoints = Checkpoints(saved, writing=True)
    checkpoints.save(6, jax.tree.map(jnp.asarray, ITEMS), {})
    checkpoints.close()
    assert Checkpoints(saved).steps() == [4, 6] and checkpoint.KEPT == 2
