"""A run's folder as training leaves it, without training: weights drawn by numpy, so that no norm is 1, no bias
0, and the moving average is another than the raw weights."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import linen as nn

from tests.conftest import import_verb, tiny_config
from tests.inference.test_trained import make_codec
from tfusion import config, sharding
from tfusion.checkpoint import Checkpoints, save_frozen
from tfusion.data.tokenizers import load_tokenizer
from tfusion.objectives import make_objective

STEP = 7


def draw(shapes, seed: int):
    """Weights as after training: matrices keep the size of what goes through them."""
    rng = np.random.default_rng(seed)

    def one(path, x):
        noise, name = rng.standard_normal(x.shape), jax.tree_util.keystr(path)
        drawn = np.float32(1 + 0.2 * noise if "scale" in name else noise * (x.shape or (1, 1))[-2:][0] ** -0.5)
        drawn.flags.writeable = False  # the tests share them
        return drawn

    return jax.tree_util.tree_map_with_path(one, shapes)


def write_run(cfg, folder, tokenizer: str = "byte") -> dict:
    """{"params", "ema"}: the weights in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save(cfg, folder)
    objective = make_objective(cfg)
    with jax.set_mesh(sharding.parse_mesh(None)):
        shapes = nn.unbox(jax.eval_shape(objective.init, jax.random.key(0)))
        buffers, frozen = objective.init_buffers(jax.random.key(0)), objective.frozen()
    items = {"params": draw(shapes, 1), "ema": draw(shapes, 2)}
    identity = {}
    if hasattr(cfg, "vocabulary"):
        codec, own = make_codec(0), load_tokenizer(tokenizer)
        codec.save(folder / "codec.npz")
        own.save(folder)
        identity = {"tokenizer": own.fingerprint, "codec": codec.fingerprint}
    save_frozen(folder, frozen)
    saved = Checkpoints(folder, writing=True)
    saved.save(STEP, items | ({"buffers": buffers} if buffers else {}), {
        "next_row": 0, "totals": {}, "identity": identity, "config": cfg.to_dict()}, frozen=frozen)
    saved.close()
    return items


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """(folder, its weights) of a Transfusion with tokenizer and codec; its data are nowhere."""
    folder = tmp_path_factory.mktemp("run") / "run"
    return folder, write_run(tiny_config("/gone"), folder)


def call_verb(**given) -> None:
    """The verb, with flags given by their names in lower case."""
    module = import_verb("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.distributed, "start_process", lambda: None)
        for name, value in given.items():
            assert isinstance(getattr(module, name.upper()), SimpleNamespace)
            patch.setattr(module, name.upper(), SimpleNamespace(value=value))
        module.main()


@pytest.fixture(scope="session")
def orbax_export(run, tmp_path_factory):
    """Of the raw weights in bfloat16, written from eight devices."""
    out = tmp_path_factory.mktemp("exports") / "orbax"
    call_verb(workdir=run[0], out=out, weights="raw", dtype="bfloat16", mesh="fsdp=4,tensor=2")
    return out


@pytest.fixture(scope="session")
def llama_export(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "llama"
    call_verb(workdir=run[0], out=out, format="llama")
    return out
