"""What is compared at resume, key by key; what a checkpoint holds, and what is done with one that is broken."""

import collections
import dataclasses
import errno
import itertools
import json
import os
import re
import resource

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments import quickstart
from tests import toy
from tests.conftest import replace, tiny_autoencoder_config, tiny_config, with_shares
from tfusion import checkpoint, config, meeting
from tfusion.checkpoint import Checkpoints, Damaged, Keep, changes, check_identity, check_same
from tfusion.diffusion.sampler import SamplingConfig
from tfusion.errors import Unreachable, UserError

FREE = {  # what a resumed run may change; everything else it may not
    "model.remat", "model.compute_dtype", "loss_weight", "autoencoder.kl_weight",
    "autoencoder.commitment_weight",
    "data.prepared", "data.tokenizer", "data.image_first_fraction", "data.image_first_max_t",
    *(f"optimizer.{f.name}" for f in dataclasses.fields(config.OptimizerConfig)),
    *(f"train.{f.name}" for f in dataclasses.fields(config.TrainConfig)),
    *(f"mesh.{f.name}" for f in dataclasses.fields(config.MeshConfig)),
    *(f"sampling.{f.name}" for f in dataclasses.fields(SamplingConfig))}
KINDS = {"transfusion": lambda: tiny_config("data"), "autoencoder": tiny_autoencoder_config,
         "vq_autoencoder": lambda: config.from_dict(quickstart.get_config("vq")),
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


def saved_steps(workdir) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())


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


@pytest.mark.parametrize("silent", [2, 3])
def test_storage_that_does_not_answer_is_asked_three_times(saved, monkeypatch, capsys, silent):
    """And says nothing against the checkpoint: no older one is taken, and launchers start the run again."""
    checkpoints, answers = Checkpoints(saved), itertools.count()
    real = checkpoints._manager.restore

    def restore(*args, **more):
        if next(answers) < silent:
            raise ValueError("read failed") from OSError(errno.EIO, "Input/output error")
        return real(*args, **more)

    monkeypatch.setattr(checkpoint, "PAUSES_S", (0, 0))
    monkeypatch.setattr(checkpoints._manager, "restore", restore)
    if silent == 2:
        assert checkpoints.meta(4)["next_row"] == 4
    else:
        with pytest.raises(Unreachable, match=r"/4 cannot be read now \(ValueError: read failed\)") as e:
            checkpoints.meta(4)
        assert e.value.status == 134 and not isinstance(e.value, Damaged)
    assert capsys.readouterr().err.count("cannot be read now") == 2 and next(answers) == 3


def test_where_one_process_waits_for_one_that_gave_up(monkeypatch):
    """A save begins and ends together. Process 1 passes what process 0 passes, but for the last place: it has
    gone to the end."""
    places = collections.Counter()
    monkeypatch.setattr(meeting.jax, "process_count", lambda: 2)
    monkeypatch.setattr(meeting.distributed, "arrive", lambda place: places.update([place]))
    monkeypatch.setattr(meeting.distributed, "arrived", lambda place: places[place])
    meet = meeting.Meeting()
    for key in (meet.ENDS, "write.7"):
        places.update([f"{meet._name}/1/1/{key}"])
        meet(key=key, timeout_ms=100)
    with pytest.raises(TimeoutError):
        meet(key="commit.7", timeout_ms=10)
    places.update([f"{meet._name}/2/1/{meet.ENDS}"])
    with pytest.raises(meeting.Left):
        meet(key="commit.8", timeout_ms=10_000)
    meet(key=meet.ENDS, timeout_ms=100)  # there they meet again


@pytest.mark.parametrize("version, by", [(1, "revision feb2e22 of tfusion reads it"),
                                         (3, "revision 722f903 of tfusion reads it"),
                                         (4, "revision fa48100 of tfusion reads it"),
                                         (99, "use the code that wrote it")])
def test_another_format_is_one_line_that_names_what_reads_it(saved, version, by):
    path = saved / "checkpoints" / "4" / "meta" / "metadata"
    meta = json.loads(path.read_text()) | {"format_version": version}
    path.write_text(json.dumps(meta | {"sum": checkpoint._sum(meta)} if version > 3 else meta))
    with pytest.raises(UserError, match=f"has format version {version}, this code reads .*: {by}") as e:
        Checkpoints(saved).meta(4)
    assert e.type is UserError  # no older one is taken in its place


def flip(path, byte: int, bit: int = 0):
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def uncompressed(folder, value: bytes):
    """The file of an item that holds these bytes, and where."""
    return next((path, at) for path in sorted(folder.rglob("*")) if path.is_file()
                and (at := path.read_bytes().find(value)) >= 0)


def test_a_flipped_bit_in_an_array_is_named(tmp_path):
    """Random numbers, which are stored as they are: Orbax loads another one without a word."""
    w = np.random.default_rng(0).integers(0, 2**32, (64, 64), np.uint32)
    items = {"params": {"block": {"good": np.ones(3, np.float32), "w": w}}}
    write(tmp_path, [3, 5], items)
    path, at = uncompressed(tmp_path / "checkpoints" / "5" / "params", w[7].tobytes())
    flip(path, at + 5, bit=3)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(Damaged, match=r"5 is damaged, not as it was saved: params/block/w; train with "
                                      "--resume=latest_good to go on from step 3, or move that folder away$"):
        checkpoints.restore(5, shapes(items))
    np.testing.assert_array_equal(checkpoints.restore(3, shapes(items))["params"]["block"]["w"], w)
    with pytest.raises(Damaged, match="move that folder away to start again"):
        flip(*uncompressed(tmp_path / "checkpoints" / "3" / "params", w[7].tobytes()))
        checkpoints.restore(3, shapes(items))


@pytest.mark.parametrize("key", ["next_row", "leaves", "sum"])
def test_a_meta_that_is_not_as_it_was_saved_is_named(saved, key):
    """JSON that still parses, with one digit changed or one letter of a key."""
    path = saved / "checkpoints" / "4" / "meta" / "metadata"
    text = path.read_text()
    path.write_text(text.replace('"next_row": 4', '"next_row": 5') if key == "next_row" else
                    text.replace(f'"{key}"', f'"{key}x"'))
    assert path.read_text() != text
    with pytest.raises(Damaged, match="4/meta is damaged: it is not as it was saved; train with"):
        Checkpoints(saved).meta(4)


@pytest.mark.parametrize("marker", [None, "", "{}", '{"commit_timestamp_nsecs": null}'])
def test_a_checkpoint_without_its_commit_marker_is_named(saved, marker):
    """On local disks too: Orbax takes the folder's name for it."""
    path = saved / "checkpoints" / "4" / checkpoint.MARKER
    path.unlink() if marker is None else path.write_text(marker)
    with pytest.raises(Damaged, match=f"4 has no commit marker .*{checkpoint.MARKER}.*go on from step 2"):
        Checkpoints(saved).restore(4, shapes(ITEMS))


@pytest.mark.parametrize(("change", "said"), [
    ({"w": np.zeros((2, 4), np.float32)}, r"params/w is float32\[2,3\], not float32\[2,4\]"),
    ({"w": np.zeros((2, 3), np.int32)}, r"params/w is float32\[2,3\], not int32\[2,3\]"),
    ({"v": np.zeros(3, np.float32)}, "it lacks params/v; it has params/w besides"),
    ({f"v{i}": np.zeros(3) for i in range(6)},
     "it lacks params/v0, params/v1, params/v2, params/v3 and 2 more; it has params/w besides")])
def test_another_model_is_refused_and_its_leaves_are_named(saved, change, said):
    with pytest.raises(UserError, match=f"4 is of another model: {said}: use the code") as e:
        Checkpoints(saved).restore(4, {"params": shapes(change)})
    assert e.type is UserError


def test_part_of_an_item_is_read_where_that_is_asked_for(tmp_path):
    items = {"params": {"a": {"x": np.ones(2, np.float32), "y": np.zeros(3, np.float32)}}}
    write(tmp_path, [1], items)
    want = {"params": {"a": {"y": shapes(items["params"]["a"]["y"])}}}
    got = Checkpoints(tmp_path).restore(1, want, partly=True)
    assert jax.tree.map(np.shape, got) == {"params": {"a": {"y": (3,)}}}
    with pytest.raises(UserError, match="it has params/a/x besides"):
        Checkpoints(tmp_path).restore(1, want)


def test_what_a_killed_save_left_is_cleared_by_the_next_writer_alone(saved):
    left = saved / "checkpoints" / "6.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "half").write_text("x")
    (saved / "checkpoints" / "notes").mkdir()  # the user's
    assert Checkpoints(saved).steps() == [2, 4] and left.exists()  # it may be under way
    Checkpoints(saved, writing=True).close()
    assert not left.exists() and (saved / "checkpoints" / "notes").exists()


def test_what_a_killed_save_left_in_a_bucket_is_known(bucket):
    """There it has the step's own name from the beginning."""
    for step, marker in ((2, checkpoint.COMMITTED), (4, None), (6, None)):
        (bucket / str(step) / "params").mkdir(parents=True)
        (bucket / str(step) / "params" / "array").write_bytes(b"x")
        if marker:
            (bucket / str(step) / marker).write_bytes(b"x")
    (bucket / "6" / checkpoint.MARKER).write_text('{"commit_timestamp_nsecs": 7}')
    assert checkpoint.never_whole(bucket) == ["4"]


def test_what_a_killed_deletion_left_is_cleared_likewise(saved):
    left = saved / "checkpoints" / checkpoint.DELETING / "2"
    left.mkdir(parents=True)
    assert Checkpoints(saved).steps() == [2, 4] and left.exists()
    Checkpoints(saved, writing=True).close()
    assert not left.exists()


def failing(*_, **__):
    raise ValueError(f"RESOURCE_EXHAUSTED: {os.strerror(28)}\nand a hundred lines more")


@pytest.mark.parametrize("where", ["save", "wait_until_finished"], ids=["at once", "later"])
def test_a_save_that_fails_is_said_and_the_next_is_tried(saved, monkeypatch, capsys, where):
    """What is whole stays; that the last one failed is an error at the end, that another did is none."""
    checkpoints, items = Checkpoints(saved, writing=True), jax.tree.map(jnp.asarray, ITEMS)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint._Manager, where, failing)
        checkpoints.save(6, items, {})
        checkpoints._settle()
    said = capsys.readouterr().err
    assert re.fullmatch(r"warning: the checkpoint of step 6 cannot be written to .*/checkpoints \(ValueError: "
                        r"RESOURCE_EXHAUSTED: No space left on device\); training goes on, the last one is of "
                        r"step \d: make room before the next is due\n", said)
    checkpoints.save(8, items, {})
    checkpoints.close()
    assert Checkpoints(saved).steps()[-1] == 8 and not capsys.readouterr().err
    checkpoints = Checkpoints(saved, writing=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint._Manager, where, failing)
        checkpoints.save(9, items, {})
        with pytest.raises(UserError, match=r"of step 9, cannot be written .*\(ValueError: RESOURCE_EXHAUSTED: "
                                            r"No space.*\); those listed there are whole"):
            checkpoints.close()


def test_a_disk_that_takes_no_more_costs_only_that_save(tmp_path, capsys, monkeypatch):
    """For real: while the system refuses more than 16 KiB a file, as a full disk would. What Orbax logs of it
    the verbs silence (errors.py); here its handler may write to a stream that an earlier test has closed."""
    monkeypatch.setattr(absl.logging.get_absl_logger(), "disabled", True)
    items = {"params": {"w": jax.random.normal(jax.random.key(0), (64, 1024))}}
    checkpoints, before = Checkpoints(tmp_path, writing=True), resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints.save(2, items, {})
    checkpoints._settle()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, before[1]))
        checkpoints.save(4, items, {})
        checkpoints._settle()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    checkpoints.save(6, items, {})
    checkpoints.close()
    said = capsys.readouterr().err
    assert "the checkpoint of step 4 cannot be written" in said and "the last one is of step 2" in said
    assert "File too large" in said and len(said.splitlines()) == 1
    assert Checkpoints(tmp_path).steps() == [2, 6]
    assert not list((tmp_path / "checkpoints").glob(checkpoint.UNFINISHED))  # its half, which fills the disk


def write(folder, steps, items=ITEMS, keep=checkpoint.KEEP, measured=()):
    checkpoints = Checkpoints(folder, writing=True, keep=keep)
    for step, seen in itertools.zip_longest(steps, measured):
        checkpoints.save(step, jax.tree.map(jnp.asarray, items), {"next_row": step}, measured=seen)
    checkpoints.close()


@pytest.mark.parametrize(("keep", "left"), [
    (checkpoint.KEEP, [5, 6]), (Keep(last=1), [6]), (Keep(last=3), [4, 5, 6]), (Keep(1, every=2), [2, 4, 6]),
    (Keep(1, best="eval/loss"), [3, 6]), (Keep(2, 4, "eval/loss"), [3, 4, 5, 6])])
def test_which_checkpoints_stay(tmp_path, keep, left):
    """The best is known to who opens them again; a figure that is missing or no number is none."""
    losses = [{"eval/loss": x} for x in (5.0, np.nan, 2.0, 3.0, None)]
    write(tmp_path, [1, 2, 3], ITEMS, keep, losses[:3])
    write(tmp_path, [4, 5, 6], ITEMS, keep, losses[3:])
    assert Checkpoints(tmp_path).steps() == left == saved_steps(tmp_path)
    assert not list((tmp_path / "checkpoints" / checkpoint.DELETING).iterdir())


def test_what_was_restored_stays_until_a_newer_one_is_whole(saved, monkeypatch):
    """Of two, one is kept: when the next save fails, and while it is under way, both are there."""
    checkpoints = Checkpoints(saved, writing=True, keep=Keep(last=1))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint._Manager, "_wait_for_checkpointers", failing)
        checkpoints.save(6, jax.tree.map(jnp.asarray, ITEMS), {})
        checkpoints._settle()
    assert saved_steps(saved)[:2] == [2, 4]
    checkpoints.save(8, jax.tree.map(jnp.asarray, ITEMS), {})
    checkpoints.close()
    assert saved_steps(saved) == [8]


def test_what_is_set_aside_is_kept_and_its_step_can_be_saved(saved, capsys):
    folder = saved / "checkpoints"
    for name in ("4.damaged", "4.damaged.2"):
        checkpoints = Checkpoints(saved, writing=True)
        checkpoints.set_aside([4])
        assert checkpoints.steps() == [2] and (folder / name / "params").is_dir()
        assert f"{folder / '4'} is now {name}" in capsys.readouterr().err
        checkpoints.save(4, jax.tree.map(jnp.asarray, ITEMS), {})
        checkpoints.close()
    assert Checkpoints(saved).steps() == [2, 4]
