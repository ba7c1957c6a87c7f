"""An Orbax export stands alone, like a run; and stock Orbax reads it by the lines of its README."""

import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from tests import toy
from tests.exporting.conftest import STEP, call_verb, write_run
from tests.test_kinds import verb
from tfusion import config
from tfusion.errors import UserError
from tfusion.exporting import orbax
from tfusion.inference import trained


def test_is_opened_like_a_run(run, orbax_export, tmp_path):
    """From anywhere, on other devices: the weights asked for, rounded once; the run's tokenizer and codec."""
    opened = trained.load(shutil.copytree(orbax_export, tmp_path / "elsewhere"))
    want = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), run[1]["params"])
    jax.tree.map(np.testing.assert_array_equal, opened.params, want)
    assert jax.tree.leaves(opened.params)[0].dtype == ml_dtypes.bfloat16 and opened.step == STEP
    source = trained.load(run[0])
    assert opened.tokenizer.fingerprint == source.tokenizer.fingerprint and opened.cfg == source.cfg
    assert opened.codec.fingerprint == source.codec.fingerprint and opened.identity == source.identity


def test_holds_parameters_alone(orbax_export):
    items = {path.name for path in (orbax_export / "checkpoints" / str(STEP)).iterdir() if path.is_dir()}
    assert items == {"params", "meta"}


def test_says_what_was_rounded_and_how_it_is_read_back(run, tmp_path, capsys):
    """The average, where the run kept one, in float32."""
    call_verb(workdir=run[0], out=tmp_path / "a")
    assert f"ema weights of step {STEP}; read back, the largest difference is 0\n" in capsys.readouterr().out
    opened = trained.load(tmp_path / "a")
    jax.tree.map(np.testing.assert_array_equal, opened.params, run[1]["ema"])
    call_verb(workdir=tmp_path / "a", out=tmp_path / "b", dtype="bfloat16")  # of an export
    said = re.search(r"ema .* rounded to bfloat16 by at most (\S+); read back", capsys.readouterr().out)
    rounded = jax.tree.map(lambda x: np.abs(x - np.float32(x.astype(ml_dtypes.bfloat16))).max(), run[1]["ema"])
    assert float(said[1]) == pytest.approx(max(jax.tree.leaves(rounded)), rel=1e-2)


def test_what_is_read_back_otherwise_is_refused(run, tmp_path, monkeypatch):
    real = trained.load

    def load(folder, step=None, mesh=None, weights=None):
        back = real(folder, step, mesh, weights)
        off = ".unfinished" in str(folder)
        return back._replace(params=jax.tree.map(lambda x: x + 1e-3, back.params)) if off else back

    monkeypatch.setattr(orbax.trained, "load", load)
    with pytest.raises(UserError, match="was not read back as it was written"):
        call_verb(workdir=run[0], out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def toy_export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_run(config.from_dict(toy.get_config()), folder / "run")
    call_verb(workdir=folder / "run", out=folder / "out", weights="raw")
    return folder / "run", folder / "out"


def test_buffers_and_frozen_trees_come_along(toy_export):
    opened = trained.load(toy_export[1])
    assert int(opened.aux.buffers["seen"]) == 0 and float(opened.aux.frozen["offset"]) == toy.OFFSET


def test_is_evaluated(toy_export, monkeypatch, capsys):
    nothing = SimpleNamespace(data=SimpleNamespace(prepared=None, sources={}))
    verb("evaluate", monkeypatch, WORKDIR=str(toy_export[1]), NUMBER=2, DATA=nothing)
    assert (toy_export[1] / "evaluation" / "metrics.json").exists()


def test_a_kind_without_a_llama_form_is_named(toy_export, tmp_path):
    with pytest.raises(UserError, match="objective = 'toy', which has no transformer in Llama's form"):
        call_verb(workdir=toy_export[0], out=tmp_path / "out", format="llama")
    assert not list(tmp_path.iterdir())


def test_is_not_trained_further(toy_export, monkeypatch):
    with pytest.raises(UserError, match="is an export, which has no optimizer to go on with"):
        verb("train", monkeypatch, CONFIG=ConfigDict(toy.get_config()), WORKDIR=str(toy_export[1]))


@pytest.mark.parametrize("given, said", [
    (dict(step=3), r"no checkpoint of step 3 in .*: there are 7"),
    (dict(workdir="/nowhere"), r"config\.json not found"), (dict(workdir=None), "--workdir=DIR"),
    (dict(out=None), "--out=DIR, the folder to make, are needed")])
def test_nothing_there_is_one_line(run, tmp_path, given, said):
    with pytest.raises(UserError, match=said):
        call_verb(**(dict(workdir=run[0], out=tmp_path / "out") | given))
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_there_are_named(run, orbax_export, tmp_path):
    with pytest.raises(UserError, match="has no ema weights: --weights=raw is there"):
        call_verb(workdir=orbax_export, out=tmp_path / "out", weights="ema")


LINES = re.compile(r"```python\n(.*?)```", re.S)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_stock_orbax_reads_it_by_the_lines_of_its_readme(run, orbax_export, tmp_path, devices):
    """Written on eight devices; in a process that has no tfusion."""
    (code,) = LINES.findall((orbax_export / "README.md").read_text())
    assert len(code.splitlines()) <= 10
    code += f"""
import importlib.util, numpy
assert importlib.util.find_spec("tfusion") is None and jax.device_count() == {devices}
assert not {devices > 1} or len(params["token_embedding"].addressable_shards[0].data) * {devices} == 384
flat = {{jax.tree_util.keystr(k, simple=True, separator="/"): numpy.asarray(x, "float32")
        for k, x in jax.tree_util.tree_leaves_with_path(params)}}
numpy.savez({str(tmp_path / "read.npz")!r}, **flat)
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=orbax_export, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    want = flatten_dict(run[1]["params"], sep="/")
    with np.load(tmp_path / "read.npz") as read:
        assert read.keys() == want.keys()
        for name, x in want.items():
            np.testing.assert_array_equal(read[name], np.float32(x.astype(ml_dtypes.bfloat16)))


@pytest.mark.slow
def test_by_its_command_without_grain_and_then_sampled(run, tmp_path):
    def process(name, *given):
        code = ("import sys, importlib; sys.modules['grain'] = None; from tfusion.errors import run; "
                f"run(importlib.import_module('tfusion.{name}').main)")
        done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True,
                              env=os.environ | {"XLA_FLAGS": ""})
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = tmp_path / "out"
    assert process("export", f"--workdir={run[0]}", f"--out={out}").endswith(f"wrote {out}\n")
    process("sample", f"--workdir={out}", "--prompt=a cat", "--draw", "--max_images=1")
    assert (out / "samples" / "000_0.png").exists()


