"""A run stands alone: its folder, copied elsewhere, is all that its use needs."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.conftest import tiny_config
from tfusion import checkpoint, sharding
from tfusion.checkpoint import Checkpoints
from tfusion.data import layout, store
from tfusion.data.tokenizers import ByteTokenizer, load_tokenizer
from tfusion.errors import UserError
from tfusion.inference import trained, transfusion
from tfusion.models.codecs.kl import Autoencoder, AutoencoderConfig, KLCodec
from tfusion.training import loop

STEPS = 2


def make_codec(seed: int) -> KLCodec:
    """An untrained autoencoder of 32 x 32 pictures and 4 x 4 x 4 latents."""
    tiny = AutoencoderConfig(image_size=32, latent_channels=4, downsample=8, width=8, num_blocks=1,
                             kl_weight=1e-5)
    params = Autoencoder(tiny).init(jax.random.key(seed), np.zeros((1, 32, 32, 3)))
    return KLCodec(tiny, params["params"], np.zeros(4, np.float32), np.ones(4, np.float32))


@pytest.fixture(scope="module")
def trained_once(prepared_root, tmp_path_factory):
    """(workdir, state) of a run on data that have their codec."""
    root, workdir = tmp_path_factory.mktemp("data") / "prepared", tmp_path_factory.mktemp("run")
    shutil.copytree(prepared_root, root)
    cfg = tiny_config(root)
    codec = make_codec(0)
    codec.save(root / "codec.npz")
    store.write_meta(root, ByteTokenizer(), codec.fingerprint, cfg.model.latent_shape)
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(
        cfg.train, num_steps=STEPS, checkpoint_every=1, eval_every=0, diagnostics_every=0))
    mesh = sharding.parse_mesh(None)
    with jax.set_mesh(mesh):
        state = jax.device_get(loop.train(cfg, workdir, mesh))
    shutil.rmtree(root)  # nothing of the data is left
    return workdir, state


@pytest.fixture
def copied(trained_once, tmp_path):
    return shutil.copytree(trained_once[0], tmp_path / "elsewhere")


def test_a_copy_without_its_data_has_all_that_sampling_needs(trained_once, copied):
    run = trained.load(copied)
    for got, want in zip(jax.tree.leaves(run.params), jax.tree.leaves(trained_once[1].ema_params)):
        np.testing.assert_array_equal(got, want)
    assert run.tokenizer.fingerprint == load_tokenizer("byte").fingerprint
    assert run.codec.fingerprint == make_codec(0).fingerprint
    prompt = [[layout.text([run.cfg.vocabulary.boi])]]
    drawn = transfusion.generate(run.cfg, run.params, prompt, max_new_tokens=0, max_images=1)
    assert run.codec.decode(drawn[0][0].values[None]).shape == (1, 32, 32, 3)


@pytest.mark.parametrize("mesh", ["None", "sharding.parse_mesh('fsdp=2')"])
def test_no_mesh_need_be_entered(copied, mesh):
    """As a verb opens it, on a machine of two devices: this file's other tests run inside a mesh."""
    code = (f"from tfusion import sharding; from tfusion.inference import trained; "
            f"print(trained.load({str(copied)!r}, mesh={mesh}).step)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={
        **os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"})
    assert done.returncode == 0 and int(done.stdout) == STEPS, done.stderr


def test_nothing_else_of_the_checkpoint_is_read(trained_once, copied):
    """Neither the optimizer nor the raw parameters: their files may be gone. What is read is as large as
    the parameters, and little more."""
    folder = copied / "checkpoints" / str(STEPS)
    shutil.rmtree(folder / "optimizer")
    shutil.rmtree(folder / "params")
    run = trained.load(copied)
    size = sum(x.nbytes for x in jax.tree.leaves(run.params))
    on_disk = sum(p.stat().st_size for p in (folder / "ema").rglob("*") if p.is_file() and "/d/" in str(p))
    assert on_disk <= 1.1 * size


def test_what_only_training_needs_is_not_in_the_codec(copied):
    with np.load(copied / "codec.npz") as file:
        about = json.loads(bytes(file["about"]))
    assert "kl_weight" not in json.dumps(about)


def test_a_step_can_be_chosen(copied):
    old, new = (trained.load(copied, step) for step in (1, 2))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(old.params), jax.tree.leaves(new.params)))
    with pytest.raises(UserError, match=r"no checkpoint of step 7 in .*: there are 1, 2"):
        trained.load(copied, 7)


def test_on_any_mesh(copied):
    """Placed in shards at once, and drawing the same pictures."""
    whole, mesh = trained.load(copied), sharding.parse_mesh("fsdp=4,tensor=2")
    prompt = [[layout.text([whole.cfg.vocabulary.boi])]]
    want = transfusion.generate(whole.cfg, whole.params, prompt, max_new_tokens=0, max_images=1)[0][0].values
    run = trained.load(copied, mesh=mesh)
    table = run.params["token_embedding"]
    assert len(table.sharding.device_set) == 8 and table.addressable_shards[0].data.size * 8 == table.size
    with jax.set_mesh(mesh):
        got = transfusion.generate(run.cfg, run.params, prompt, max_new_tokens=0, max_images=1)[0][0].values
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["fsdp", "fsdp=x", "rows=2", "fsdp=0", "data=-2", "fsdp=4,,", "data=2,data=4"])
def test_a_mesh_that_is_none_is_one_line(text):
    with pytest.raises(UserError, match=f"--mesh={text} must name sizes of data, fsdp, sequence, tensor"):
        sharding.parse_mesh(text)


def replace_tokenizer(workdir):
    (workdir / "tokenizer.json").unlink()
    load_tokenizer("default").save(workdir)


def replace_codec(workdir):
    make_codec(1).save(workdir / "codec.npz")


@pytest.mark.parametrize("replace, name", [(replace_tokenizer, "tokenizer"), (replace_codec, "codec")])
def test_a_part_that_is_not_the_runs_is_refused(copied, replace, name):
    replace(copied)
    with pytest.raises(UserError, match=f"holds another {name} than the one it was trained with"):
        trained.load(copied)


def test_a_changed_tokenizer_file_is_refused(copied):
    load_tokenizer("default").save(copied)
    model = copied / "tokenizer.model"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="tokenizer"):
        trained.load(copied)


def test_data_of_another_codec_are_refused(copied, prepared_root):
    with pytest.raises(UserError, match=r"the run was trained on other data .*\(changed: codec\)"):
        trained.check_data(trained.load(copied), prepared_root)


def test_data_of_another_foreign_encoder_are_refused(copied, prepared_root, tmp_path, capsys):
    """There is no codec to look at: what the checkpoint says of its data is compared."""
    identity = {"tokenizer": ByteTokenizer.fingerprint, "codec": "mine"}
    run = trained.load(copied)._replace(codec=None, identity=identity)
    root = shutil.copytree(prepared_root, tmp_path / "data")
    store.write_meta(root, ByteTokenizer(), "mine", run.cfg.model.latent_shape)
    trained.check_data(run, root)
    assert "other records" not in capsys.readouterr().err
    sizes = run.identity | {"sizes.glosses": "of others"}
    trained.check_data(run._replace(identity=sizes), root)
    assert f"{root} holds other records of glosses than the run was trained on" in capsys.readouterr().err
    store.write_meta(root, ByteTokenizer(), "another", run.cfg.model.latent_shape)
    with pytest.raises(UserError, match=r"\(changed: codec\)"):
        trained.check_data(run, root)


def test_a_run_of_an_older_format_names_what_reads_it(copied):
    """Though its config has other keys, which would be the first to be missed."""
    path = copied / "checkpoints" / str(STEPS) / "meta" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 1}))
    tree = json.loads((copied / "config.json").read_text())
    tree["data"]["max_images"] = 5
    (copied / "config.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"format version 1, .*: revision feb2e22 of tfusion reads it"):
        trained.load(copied)


def test_a_codec_that_another_start_left_is_not_the_runs(copied):
    path = copied / "checkpoints" / str(STEPS) / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["identity"]["codec"] = ""  # text alone
    path.write_text(json.dumps(meta | {"sum": checkpoint._sum(meta)}))
    assert trained.load(copied).codec is None


def test_nothing_there_is_one_line(copied, tmp_path):
    with pytest.raises(UserError, match=r"config\.json not found"):
        trained.load(tmp_path)
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(UserError, match=r"no checkpoint in .*: run `.* --config=experiments/FILE\.py --w"):
        trained.load(copied)
    assert not (copied / "checkpoints").exists()  # looking makes nothing


def test_reading_leaves_the_folder_as_it_is(copied):
    before = sorted(str(p) for p in copied.rglob("*"))
    trained.load(copied)
    assert Checkpoints(copied).steps() == [1, 2]
    assert sorted(str(p) for p in copied.rglob("*")) == before
