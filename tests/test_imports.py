"""DESIGN's layers, kept by reading the source: who may import whom, and how long things may be."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tfusion"
MODULES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))
SOURCES = MODULES + sorted(path.relative_to(ROOT) for path in (ROOT / "experiments").rglob("*.py"))

BASE = ("types", "config", "experiment", "errors", "sharding", "distributed", "accelerators", "workdir",
        "paths", "checksum", "meeting")
LAYERS = [  # DESIGN: each may import only from those before it or its own folder; siblings never each other
    {"base"}, {"diffusion", "models", "kernels", "data"}, {"objectives", "checkpoint"},
    {"training", "inference", "preparing"},
    {"evals", "scaling", "planning", "reporting", "exporting"}, {"verb"}]
TOGETHER = {"models", "kernels"}  # "diffusion | models, kernels | data": these two are one group


def unit(module: str) -> str:
    """'tfusion.models.masks' -> 'models'; a top-level module is of the base, or else a verb."""
    parts = module.split(".")
    if parts[1:2] in (["checkpoint"], ["exported"]):
        return "checkpoint"
    if len(parts) == 1 or parts[1] in BASE:
        return "base"
    return parts[1] if (PACKAGE / parts[1]).is_dir() else "verb"


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), str(path))


def imports_of(path: Path) -> set[str]:
    """Full names of what a file imports, wherever in the file: `from tfusion import config` is
    'tfusion.config'."""
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    return {name for name in imports_of(path) if name.split(".")[0] == "tfusion"}


def allowed(importer: str, imported: str) -> bool:
    """Both are units. A folder may import itself; a verb never another verb."""
    if importer == imported:
        return importer != "verb"
    return {importer, imported} == TOGETHER or layer(imported) < layer(importer)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_layers(path):
    importer = unit(module_name(path))
    bad = sorted(name for name in ours(path) if not allowed(importer, unit(name)))
    assert not bad, f"{path} ({importer}) imports {', '.join(bad)}"


def test_every_folder_has_a_layer():
    """A new folder must be given its place; a folder that is gone needs none."""
    folders = {path.parts[1] for path in MODULES if len(path.parts) > 2}
    assert folders <= set.union(*LAYERS)


def test_the_rule_itself():
    """What must be refused is refused, so that the test above cannot pass by being vague."""
    good = [("models", "base"), ("base", "base"), ("objectives", "diffusion"), ("evals", "inference"),
            ("training", "data"), ("verb", "training"), ("models", "kernels"), ("models", "models")]
    bad = [("diffusion", "models"), ("data", "diffusion"), ("models", "data"), ("inference", "training"),
           ("training", "inference"), ("evals", "reporting"), ("verb", "verb"), ("base", "models"),
           ("models", "objectives"), ("kernels", "diffusion"), ("objectives", "training"),
           ("checkpoint", "training"), ("data", "checkpoint")]
    assert all(allowed(*pair) for pair in good) and not any(allowed(*pair) for pair in bad)
    assert unit("tfusion.train") == unit("tfusion.sample.main") == "verb"
    assert unit("tfusion.models.masks.dense_mask") == "models" and unit("tfusion.config.load") == "base"


def top_level(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_the_package_never_imports_experiments(path):
    assert not {"experiments", "launch", "tests"} & top_level(path)


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parts[0] == "experiments"], ids=str)
def test_experiments_import_only_configdict_and_common(path):
    names = {name if name.startswith("experiments") else name.split(".")[0] for name in imports_of(path)}
    assert all(name == "ml_collections" or name.startswith("experiments.common.") for name in names), names


@pytest.mark.parametrize("folder, forbidden", [
    ("diffusion", {"flax"}),  # mathematics only
    ("data", {"jax", "jaxlib", "flax", "optax"}),  # never touches a device
    ("models", {"optax", "orbax", "grain"}),  # no mesh, no noise, no loss
])
def test_folder_keeps_out_of(folder, forbidden):
    paths = [path for path in MODULES if path.parts[1] == folder]
    assert paths
    assert not {(str(path), name) for path in paths for name in forbidden & top_level(path)}


@pytest.mark.parametrize("path", [p for p in MODULES if p.name != "sharding.py"], ids=str)
def test_only_sharding_makes_shardings(path):
    """Everything else names logical axes: no PartitionSpec or NamedSharding is made elsewhere."""
    made = {name for name in imports_of(path) if name.endswith((".PartitionSpec", ".NamedSharding", "jax.P"))}
    attributes = {node.attr for node in ast.walk(parse(path)) if isinstance(node, ast.Attribute)}
    assert not made and not attributes & {"PartitionSpec", "NamedSharding"}


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_files_are_short_and_named_for_what_they_do(path):
    """<= 500 lines; the loop <= 350; no utils.py, no helpers.py."""
    lines = len((ROOT / path).read_text().splitlines())
    assert lines <= (350 if path.as_posix() == "tfusion/training/loop.py" else 500)
    assert path.stem.strip("_") not in ("utils", "util", "helpers", "helper", "misc")


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_functions_are_short(path):
    """<= 60 lines, the loop too."""
    long = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(parse(path))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and node.end_lineno - node.lineno + 1 > 60}
    assert not long


def leaves(tree) -> int:
    return sum(leaves(value) if hasattr(value, "keys") else 1 for value in tree.values())


@pytest.mark.parametrize("experiment, variant, most", [
    ("quickstart", None, 60), ("quickstart", "autoencoder", 40), ("transfusion", "7b", 60),
    ("ablations", "patch4", 60), ("own_data", None, 60), ("scaling", None, 60)])
def test_an_experiment_has_few_leaves(experiment, variant, most):
    """data.sources, which are the user's, not counted."""
    tree = importlib.import_module(f"experiments.{experiment}").get_config(variant).to_dict()
    del tree["data"]["sources"]
    assert leaves(tree) <= most


def test_a_transformer_names_no_autoencoder_and_no_sprite():
    tree = importlib.import_module("experiments.transfusion").get_config().to_json()
    assert not any(word in tree for word in ("autoencoder", "sprite", "scene", "jitter", "downsample", "kl_"))


def test_the_core_stays_small():
    """models + diffusion + objectives + training. 3,000 before a run survived preemption, hangs and damage, and
    could begin with another's parameters or a Llama's."""
    core = [path for path in MODULES if path.parts[1] in ("models", "diffusion", "objectives", "training")]
    assert sum(len((ROOT / path).read_text().splitlines()) for path in core) <= 4300
