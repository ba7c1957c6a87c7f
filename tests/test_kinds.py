"""A kind of training is one file and one registration (tests/toy.py): every verb takes it, nobody asks."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests import toy
from tests.conftest import import_verb
from tfusion import config
from tfusion.accelerators import parse_accelerator
from tfusion.inference import trained
from tfusion.objectives.base import KINDS
from tfusion.planning import text
from tfusion.planning.plan import make_plan

PACKAGE = Path(__file__).parents[1] / "tfusion"
# Where a kind may be named: config.py looks it up, and a study of scaling compares two by their names.
OWN = ("objectives", "inference", "config.py", "scaling", "scaling_plots.py")


def verb(name: str, monkeypatch, **given):
    """Runs a verb with flags given by name."""
    module = import_verb(name)
    monkeypatch.setattr(module.distributed, "start_process", lambda **given: None)
    for flag, value in given.items():
        monkeypatch.setattr(module, flag, SimpleNamespace(value=value))
    module.main()


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """The toy, trained by the verb."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        tree = ConfigDict(toy.get_config())
        tree.mesh.update(data=2, fsdp=4)
        verb("train", monkeypatch, CONFIG=tree, WORKDIR=str(folder))
    return folder


def test_trains(toy_run):
    lines = [json.loads(line) for line in (toy_run / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]
    assert last["eval/line/error"] < 0.01 < first["train/error"]
    assert last["total/points"] == 200 * 8 and last["data/row"] == 200 * 8 - 1
    assert last["total/flops"] == 4 * 8 * 8 * 200 and last["grad_norm/error"] > 0
    rates = {line["step"]: line["train/learning_rate"] for line in lines if "train/learning_rate" in line}
    warmup, steps, peak = 2, 200, 0.05
    for step in list(rates)[:3]:
        down = 0.5 * (1 + np.cos(np.pi * (step - warmup) / (steps - warmup)))
        np.testing.assert_allclose(rates[step], peak * (0.05 + 0.95 * down), rtol=1e-5)


def test_a_trained_one_is_opened_with_buffers_and_frozen_trees(toy_run):
    run = trained.load(toy_run)
    np.testing.assert_allclose(run.params["line_kernel"], 1.0, atol=0.1)
    assert int(run.aux.buffers["seen"]) == 200 * 8 and float(run.aux.frozen["offset"]) == toy.OFFSET


def test_resumes(toy_run, tmp_path, monkeypatch):
    """On 100 steps of twice the rows, from a copy: buffers go on, and the frozen tree is the saved one."""
    copy = shutil.copytree(toy_run, tmp_path / "copy")
    monkeypatch.setattr(toy, "OFFSET", 0.0)
    tree = ConfigDict(toy.get_config())
    tree.train.update(num_steps=300, batch_size=16)
    verb("train", monkeypatch, CONFIG=tree, WORKDIR=str(copy))
    run = trained.load(copy)
    rows = 200 * 8 + 100 * 16
    assert int(run.aux.buffers["seen"]) == run.next_row == rows and float(run.aux.frozen["offset"]) == 3.0
    assert json.loads((copy / "metrics.jsonl").read_text().splitlines()[-1])["data/row"] == rows - 1


def test_dry_runs(tmp_path, monkeypatch, capsys):
    verb("train", monkeypatch, CONFIG=ConfigDict(toy.get_config()), WORKDIR=str(tmp_path), DRY_RUN=True)
    out = capsys.readouterr().out
    assert "line_kernel" in out and "batch.x_BD" in out and "--dry_run stops here" in out


def test_plans():
    plan = make_plan(config.from_dict(toy.get_config()), parse_accelerator("h100-8"), "toy", search_too=True)
    assert plan["fits"] and plan["flops"]["parts"] == {"line": 256.0} and plan["parameters"] == 8
    assert plan["memory"]["parameters"] == 8 * 4 / 8 and "points as they come" in text.render(plan)


def test_every_kind_plans_its_real_batch(cfg, chameleon):
    """abstract_batch has the shapes and types of what open_rows gives."""
    for each in (cfg, chameleon, config.from_dict(toy.get_config())):
        kind, B = KINDS[each.objective], each.train.batch_size
        rows = kind.open_rows(each)
        real = jax.tree.map(lambda *x: np.stack(x), *rows.read(range(B)))
        shapes = jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), real)
        assert shapes == jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), kind.abstract_batch(each))


def test_is_evaluated(toy_run, monkeypatch):
    """What it has is measured; what packed rows alone have is left out, though it can go on with documents."""
    nothing = SimpleNamespace(data=SimpleNamespace(prepared=None, sources={}))
    verb("evaluate", monkeypatch, WORKDIR=str(toy_run), NUMBER=2, DATA=nothing)
    found = json.loads((toy_run / "evaluation" / "metrics.json").read_text())
    assert found["metrics"]["error"]["value"] < 0.01 and {"mask", "baselines"} <= found["left_out"].keys()


NEW = {  # a file that is dropped into the package, and what it makes known
    "models/adapters/unet.py": ("adapter", "unet"), "diffusion/flow.py": ("process", "flow"),
    "data/sources/web.py": ("source", "web")}


def test_a_component_is_one_file(tmp_path):
    """Dropped into its folder, it is there: no list elsewhere has to name it."""
    shutil.copytree(PACKAGE, tmp_path / "tfusion", ignore=shutil.ignore_patterns("__pycache__"))
    for file, (group, kind) in NEW.items():
        (tmp_path / "tfusion" / file).write_text(
            "import dataclasses\nfrom tfusion.config import register\n\n"
            f"@register({group!r}, {kind!r})\n@dataclasses.dataclass(frozen=True)\nclass New:\n    kind: str\n")
    (tmp_path / "tfusion/models/codecs/wavelets.py").write_text(
        "from tfusion.models.codecs import base\n\n@base.register('wavelets')\nclass Wavelets: pass\n")
    (tmp_path / "tfusion/inference/flows.py").write_text(
        "from tfusion.inference.base import register\n\nregister('flows', lambda run: None)\n")
    ask = ("from tfusion import config, inference, objectives; from tfusion.models.codecs.base import CODECS;"
           "print(inference.base.DECODERS.keys() >= {'flows'}, 'wavelets' in CODECS, "
           f"all(k in config.REGISTRY[g] for g, k in {list(NEW.values())!r}))")
    done = subprocess.run([sys.executable, "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 3


# ---------------------------------------------------------------- nothing else asks

def modules():
    return [path for path in sorted(PACKAGE.rglob("*.py"))
            if not {path.name, path.relative_to(PACKAGE).parts[0]} & {*OWN}]


def name_of(node) -> str:
    return getattr(node, "id", getattr(node, "attr", ""))


def asks(source: str) -> list[str]:
    """What in a module names a kind of training or asks for it: its name as a word, its module, the type of its
    batches, `.objective` outside a message."""
    tree, found = ast.parse(source), []
    said = {id(node) for text in ast.walk(tree) if isinstance(text, ast.JoinedStr) for node in ast.walk(text)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in KINDS:
            found.append(f"line {node.lineno}: {node.value!r}")
        elif isinstance(node, ast.Attribute) and node.attr == "objective" and id(node) not in said and not (
                isinstance(node.value, ast.Name) and node.value.id == "self"):
            found.append(f"line {node.lineno}: .objective")
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance" and any(
                name_of(x).endswith(("Batch", "Rows")) for x in ast.walk(node.args[1])):
            found.append(f"line {node.lineno}: isinstance of a batch")
        elif isinstance(node, ast.Compare) and any(
                name_of(x).endswith(("Batch", "Rows")) for x in node.comparators):
            found.append(f"line {node.lineno}: the type of a batch")
        elif isinstance(node, ast.Subscript) and getattr(node.slice, "value", "") == "objective" and id(
                node) not in said:
            found.append(f"line {node.lineno}: ['objective']")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tfusion.objectives"):
            names = [node.module.rsplit(".", 1)[-1], *(alias.name for alias in node.names)]
            found += [f"line {node.lineno}: imports {name}" for name in names if name in KINDS]
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_code_outside_objectives_and_inference_asks_for_the_kind(path):
    assert not asks(path.read_text())


@pytest.mark.parametrize("source", [
    "if cfg.objective == name: pass", "x = {'transfusion': 1}", "from tfusion.objectives import autoencoder",
    "from tfusion.objectives.transfusion import NUM_BINS", "isinstance(batch, types.Batch)",
    "isinstance(b, ImageBatch)", "type(b) is Batch", "x = cfg.to_dict()['objective']"])
def test_the_rule_itself(source):
    assert asks(source)
    assert not asks("raise UserError(f'a run with objective = {cfg.objective}')")
