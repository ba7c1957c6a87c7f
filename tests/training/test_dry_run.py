"""`train --dry_run`: prints what a run would build, compiles it, trains nothing and writes nothing."""

import re
from types import SimpleNamespace

import jax
import pytest
from flax import linen as nn

from tests.conftest import tiny_dict
from tfusion import config, train
from tfusion.objectives import make_objective
from tfusion.training import step as steps

LINE = re.compile(r"(\S+) +(\([\d, ]*\)) +([\d,]+) +(\S*) +P(?:artitionSpec)?\((.*)\)$")


@pytest.fixture
def quick_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_dry_run(prepared_root, tmp_path, monkeypatch, capsys, quick_compile):
    tree = tiny_dict(prepared_root)
    tree.model.num_layers = 3  # nothing else has this size
    tree.mesh.update(data=1, fsdp=4, tensor=2)
    for name, value in (("CONFIG", tree), ("WORKDIR", str(tmp_path / "run")), ("DRY_RUN", True)):
        monkeypatch.setattr(train, name, SimpleNamespace(value=value))
    ran, make = [], steps.make_train_step

    def make_watched(*args):
        step = make(*args)

        def watched(state, frozen, batch):
            jax.debug.callback(lambda: ran.append(1))
            return step(state, frozen, batch)

        return watched

    monkeypatch.setattr(steps, "make_train_step", make_watched)
    monkeypatch.chdir(tmp_path)
    train.main()
    jax.effects_barrier()
    assert not ran
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["run"]  # an empty folder

    lines = capsys.readouterr().out.splitlines()
    assert "'fsdp': 4" in lines[0] and "'tensor': 2" in lines[0] and "8 x" in lines[0]
    check_parameters(lines, config.from_dict(tree))
    check_batch(lines, tree)
    assert re.fullmatch(r"the training step compiles in [\d.]+ s", lines[-7])
    assert lines[-6] == ("memory as this machine's compiler lays it out for cpu; for a TPU slice: "
                         "python -m tfusion.plan")
    assert re.fullmatch(r"memory.temp +[\d.]+ MiB per cpu", lines[-2])


def check_parameters(lines, cfg):
    """Every parameter has its line: name, shape, size, logical axes, and the mesh axes they give."""
    table = {m[1]: m.groups()[1:] for m in map(LINE.match, lines) if m}
    params = nn.meta.unbox(jax.eval_shape(make_objective(cfg).init, jax.random.key(0)))
    shapes = {"/".join(key.key for key in path): leaf
              for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert {name: row[0] for name, row in table.items()} == {n: str(x.shape) for n, x in shapes.items()}
    assert {n: row[1] for n, row in table.items()} == {n: f"{x.size:,d}" for n, x in shapes.items()}
    assert table["token_embedding"][2:] == ("vocab,embed", "'tensor', 'fsdp'")
    assert table["decoder/blocks/mlp/down_kernel"] == (
        "(3, 64, 32)", "6,144", "layers,mlp,embed", "None, 'tensor', 'fsdp'")
    assert table["decoder/final_norm_scale"][2:] == ("norm", "None,")
    (total,) = [line.split()[1] for line in lines if line.startswith("total ")]
    assert total == f"{sum(x.size for x in shapes.values()):,d}"


def check_batch(lines, tree):
    batch = {m[1]: m[2] for m in (re.match(r"batch\.(\w+) +(\(.*?\)) ", line) for line in lines) if m}
    rows, T, slots = tree.train.batch_size, tree.data.seq_len, config.from_dict(tree).rows.image_slots
    assert batch == {
        "row_ids_B": f"({rows},)", "latents_BIhwc": str((rows, slots, 4, 4, 4)),
        **{name: str((rows, T)) for name in (
            "tokens_BT", "segment_ids_BT", "image_ids_BT", "positions_BT", "loss_mask_BT")},
        **{name: str((rows, slots)) for name in ("image_start_BI", "max_t_BI")},
        "noise_ids_BI2": str((rows, slots, 2))}
    (tokens,) = [line for line in lines if line.startswith("batch.tokens_BT")]
    assert re.search(r"int32 +\[ *1 ", tokens)  # the first row opens with <bos>
