"""A tiny Chameleon through every verb, each as it is for any kind: prepare, train, sample, evaluate, report,
plan, export. The codec is tests/codes.py's."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.codes import ColourCodec, tiny_dict
from tests.conftest import import_verb
from tests.conftest import tiny_dict as tiny_transfusion
from tests.test_kinds import verb
from tfusion import config
from tfusion.accelerators import parse_accelerator
from tfusion.errors import UserError
from tfusion.inference import trained
from tfusion.planning.plan import make_plan

pytestmark = pytest.mark.usefixtures("quick_compiles")


def tree(folder):
    made = tiny_dict(folder / "data", tiny_transfusion(folder / "data"))
    made.data.sources.scenes.num_records = made.data.sources.stories.num_records = 60
    made.data.sources.glosses.share = 0.0
    made.data.update(window_rows=16)
    made.train.update(num_steps=4, batch_size=8, eval_every=4, eval_documents=4, checkpoint_every=4,
                      log_every=1, diagnostics_every=0)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data, and a run on them."""
    folder = tmp_path_factory.mktemp("chameleon")
    with pytest.MonkeyPatch.context() as patch:
        prepare = import_verb("prepare")
        codec = prepare.Unfitted(32, "colours", ColourCodec)
        patch.setattr(prepare, "open_codec", lambda workdir, format: codec)
        verb("prepare", patch, CONFIG=tree(folder), CODEC_RUN="a run")
        verb("train", patch, CONFIG=tree(folder), WORKDIR=str(folder / "run"))
    return folder


def test_prepares_and_trains(folder):
    meta = json.loads((folder / "data" / "meta.json").read_text())
    assert (meta["image_shape"], meta["image_dtype"], meta["num_codes"]) == ([4, 4], "int32", 27)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {key: value for line in lines for key, value in line.items()}
    names = ("lm_loss", "code_loss", "token_loss")
    assert {f"{where}/{name}" for where in ("train", "eval", "eval/scenes") for name in names} <= found.keys()
    assert {"train/z_loss", "eval/z_loss"} <= found.keys()
    assert found["total/images"] > 0
    run = trained.load(folder / "run")
    assert run.codec.fingerprint == "colours" and run.identity["codec"] == "colours"


def test_another_codebook_is_refused_by_prepare(folder, monkeypatch):
    other = tree(folder)
    other.model.num_codes = 512
    prepare = import_verb("prepare")
    monkeypatch.setattr(prepare.trained, "load", lambda *a, **k: None)
    monkeypatch.setattr(prepare.trained, "fingerprint", lambda run: "")
    monkeypatch.setattr(prepare, "decoder", lambda run: ColourDecoder)
    says = r"makes codes of shape \(4, 4\) from 27, the model expects .* from 512: change model.num_codes"
    with pytest.raises(UserError, match=says):
        prepare.open_codec("a run", config.from_dict(other).rows).fit()


class ColourDecoder:
    image_size, make_codec = 32, staticmethod(lambda run, read: ColourCodec())


def test_samples(folder, monkeypatch):
    verb("sample", monkeypatch, WORKDIR=str(folder / "run"), PROMPTS=["a"], DRAW=True, MAX_IMAGES=1,
         OUT=str(folder / "samples"))
    line, = (folder / "samples" / "documents.jsonl").read_text().splitlines()
    assert json.loads(line)["parts"][0] == {"image": "000_0.png"}
    assert (folder / "samples" / "000_0.png").exists()
    with pytest.raises(UserError, match=r"sampling\.sampler"):  # which draws no codes
        verb("sample", monkeypatch, WORKDIR=str(folder / "run"), PROMPTS=["a"], SAMPLER="ddpm")


@pytest.mark.slow
def test_is_evaluated_and_reported(folder, monkeypatch):
    verb("evaluate", monkeypatch, WORKDIR=str(folder / "run"), NUMBER=2)
    found = json.loads((folder / "run" / "evaluation" / "metrics.json").read_text())["metrics"]
    wanted = {"scenes_lm_loss", "scenes_bits_per_byte", "token_loss", "code_loss", "code_loss/scenes"}
    assert wanted <= found.keys()
    assert "diffusion_loss" not in found and "scenes_vs_bigram" in found
    report = import_verb("report")
    monkeypatch.setattr(report.WORKDIR, "value", str(folder / "run"))
    report.main([])
    page = (folder / "run" / "report.html").read_text()
    assert "Code loss" in page and "Held-out losses" in page
    verb("prepare", monkeypatch, CONFIG=tree(folder), INSPECT=str(folder / "data.html"))
    assert "codes of an image" in (folder / "data.html").read_text()


@pytest.mark.parametrize(("micros", "chips"), [(1, 8), (2, 4)])
def test_plans(micros, chips):
    """The step that it traces splits latents of no size as well."""
    made = tree(Path("unused"))
    made.train.num_microbatches = micros
    plan = make_plan(config.from_dict(made), parse_accelerator(f"h100-{chips}"), "tiny", search_too=False)
    assert plan["flops"]["parts"].keys() == {"text matmuls", "patch matmuls", "lm head", "attention"}


def test_is_exported(folder, monkeypatch):
    """Whole for this package; not as a Llama, which it is not."""
    verb("export", monkeypatch, WORKDIR=str(folder / "run"), OUT=str(folder / "export"))
    run, opened = trained.load(folder / "run"), trained.load(folder / "export")
    for name in ("q_norm_scale", "k_norm_bias"):
        mine, theirs = (x.params["decoder"]["blocks"]["attention"][name] for x in (run, opened))
        np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(UserError, match=r"Llama has no model\.qk_norm = 'layernorm' and no model\.norm_order"):
        verb("export", monkeypatch, WORKDIR=str(folder / "run"), OUT=str(folder / "llama"), FORMAT="llama")
    assert not (folder / "llama").exists()
