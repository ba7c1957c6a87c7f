"""Plans that are read instead of made: never where they would say something else."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from ml_collections import ConfigDict

from tests import toy
from tests.conftest import import_verb
from tests.planning.plans import small_config
from tfusion import accelerators, config
from tfusion.accelerators import parse_accelerator
from tfusion.planning import cache, plan, search, topology, walk
from tfusion.planning.compile import abstract_state, trace

SLICE = parse_accelerator("h100-8")


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """The folder; and make_plan notes its calls in the list `made`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made, make_plan = [], plan.make_plan
    monkeypatch.setattr(plan, "make_plan", lambda *args: made.append(args) or make_plan(*args))
    return tmp_path / "tfusion" / "plans", made


def test_the_second_time_it_is_read(kept):
    folder, made = kept
    cfg = small_config()
    first = cache.planned(cfg, SLICE, "toy", 1e6)
    [file] = folder.iterdir()
    second = cache.planned(cfg, SLICE, "toy", 1e6)
    assert len(made) == 1
    assert second == first | {"notes": [*first["notes"], f"from {file}, as it was made before"]}


def test_what_only_scales_is_worked_out_anew(kept, monkeypatch):
    _, made = kept
    cfg = small_config()
    first = cache.planned(cfg, SLICE, "toy")
    monkeypatch.setitem(accelerators.DOLLARS_PER_CHIP_HOUR, "h100", 1.0)
    longer = search.change(cfg, train={"num_steps": 2 * cfg.train.num_steps},
                           optimizer={"learning_rate": 1e-3})
    second = cache.planned(longer, SLICE, "other")
    assert len(made) == 1 and second["experiment"] == "other"
    assert second["run"]["chip_hours"] == pytest.approx(2 * first["run"]["chip_hours"])
    assert second["run"]["dollars"] == pytest.approx(second["run"]["chip_hours"])
    assert second["accelerator"]["dollars_per_chip_hour"] == 1.0


def test_a_broken_file_and_a_folder_that_cannot_be_written(kept, monkeypatch):
    folder, made = kept
    cfg = small_config()
    first = cache.planned(cfg, SLICE, "toy")
    [file] = folder.iterdir()
    for broken in ("{}", '{"step": {}}', json.dumps(json.loads(file.read_text()) | {"step": {"seconds": 1}})):
        file.write_text(broken)
        assert cache.read(file.stem) is None
    file.write_text('{"fits": tr')
    assert cache.planned(cfg, SLICE, "toy")["run"] == first["run"] and len(made) == 2
    assert json.loads(file.read_text())["fits"] is True
    file.unlink()
    monkeypatch.setattr(cache, "folder", lambda: None)
    assert cache.planned(cfg, SLICE, "toy")["run"] == first["run"] and len(made) == 3


def test_the_key_is_of_all_that_decides(monkeypatch):
    cfg = small_config()
    keys = [cache.key(cfg, SLICE)]
    keys += [cache.key(other, SLICE) for other in (
        small_config(d_model=128), small_config(batch_size=16), search.change(cfg, mesh={"tensor": 2}),
        search.change(cfg, train={"nonfinite": "stop"}), search.change(cfg, optimizer={"ema_decay": 0.0}))]
    keys += [cache.key(cfg, parse_accelerator(name)) for name in ("h100-16", "h200-8", "v5p-16", "2xv5p-8")]
    monkeypatch.setattr(topology, "libtpu_version", lambda: "0.0.99")
    assert cache.key(cfg, SLICE) == keys[0]  # a GPU's plan asks no libtpu
    keys.append(cache.key(cfg, parse_accelerator("v5p-16")))
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_x=true")
    keys.append(cache.key(cfg, SLICE))
    try:
        jax.config.update("jax_enable_x64", True)
        keys.append(cache.key(cfg, SLICE))
    finally:
        jax.config.update("jax_enable_x64", False)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "own_source", lambda cfg: "of a kind elsewhere")
        keys.append(cache.key(cfg, SLICE))
    monkeypatch.setattr(cache, "source_digest", lambda: "another")
    keys.append(cache.key(cfg, SLICE))
    assert len(set(keys)) == len(keys)


def test_a_kind_from_elsewhere_is_in_the_key_with_its_file():
    assert cache.own_source(small_config()) == ""
    assert cache.own_source(config.from_dict(toy.get_config())) == Path(toy.__file__).read_text()


def outline(cfg) -> list:
    """The traced step without its constants: what is computed, and of which shapes."""
    mesh = topology.abstract_mesh(cfg.mesh, SLICE)
    jaxpr = trace(cfg, abstract_state(cfg), mesh).jaxpr.jaxpr
    return [(eqn.primitive.name, [str(v.aval) for v in (*eqn.invars, *eqn.outvars)])
            for eqn, *_ in walk.equations(jaxpr, "cuda")]


def test_what_is_left_out_of_the_key_changes_no_program():
    cfg = small_config()
    other = search.change(cfg, optimizer={"learning_rate": 1.7e-3}, data={"prepared": "elsewhere"},
                          train={"num_steps": 77, "branch_from": "runs/a/checkpoints/7", "init_from": "x"})
    other = dataclasses.replace(other, seed=cfg.seed + 1)
    assert {key.split(".")[-1] for key in cache.ASIDE} == {
        "seed", "prepared", "learning_rate", "num_steps", "branch_from", "init_from"}
    assert cache.key(cfg, SLICE) == cache.key(other, SLICE)
    assert outline(cfg) == outline(other)
    assert outline(cfg) != outline(search.change(cfg, optimizer={"ema_decay": 0.0}))  # it would be seen


def test_the_digest_is_of_all_source_that_a_plan_imports():
    """But for what decides neither shapes nor the program: where a module is added to a plan, it is added to
    cache.SOURCES, or here."""
    code = ("import sys, tfusion.planning.plan\n"
            "print(*(m.__file__ for name, m in sys.modules.items() if name.split('.')[0] == 'tfusion'))")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    root = Path(cache.__file__).parents[1]
    files = {str(Path(file).relative_to(root)) for file in run.stdout.split()}
    assert len(files) > 40 and "models/transformer.py" in files
    others = {"__init__.py", "training/__init__.py", "errors.py", "paths.py", "accelerators.py"}
    assert {file for file in files if not any(file == name or file.startswith(f"{name}/")
                                              for name in cache.SOURCES)} <= others


def test_the_digest_sees_an_edit(monkeypatch, tmp_path):
    for name in ("planning/cache.py", "models/x.py", "training/loop.py", "sweep.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "planning/cache.py"))

    def digest():
        cache.source_digest.cache_clear()
        return cache.source_digest()

    first = digest()
    (tmp_path / "sweep.py").write_text("2")
    (tmp_path / "training/loop.py").write_text("2")
    assert digest() == first
    (tmp_path / "models/x.py").write_text("2")
    assert digest() != first
    cache.source_digest.cache_clear()


def test_plan_reads_what_was_planned_and_a_search_looks_anew(kept, monkeypatch, capsys):
    _, made = kept
    verb, searched = import_verb("plan"), []
    monkeypatch.setattr(verb.topology, "use_host_only", lambda: None)
    monkeypatch.setattr(verb, "make_plan", lambda *args, search_too: searched.append(args) or made[0])
    given = {"CONFIG": ConfigDict(small_config().to_dict()), "TOPOLOGY": "h100-8", "JSON": True}
    for name, value in given.items():
        monkeypatch.setattr(verb, name, SimpleNamespace(value=value))
    verb.main()
    verb.main()
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(made) == 1 and first["run"] == second["run"]
    monkeypatch.setattr(verb, "SEARCH", SimpleNamespace(value=True))
    monkeypatch.setattr(verb, "JSON", SimpleNamespace(value=False))
    monkeypatch.setattr(verb.text, "render", lambda made: "searched")
    verb.main()
    assert len(made) == 1 and len(searched) == 1 and capsys.readouterr().out == "searched\n"
