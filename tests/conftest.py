"""Eight fake CPU devices for every test, a one-device mesh around each."""

import dataclasses
import importlib
import os
from types import SimpleNamespace

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest
from absl import flags
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from experiments import quickstart
from tests import codes
from tests.golden import write_split
from tfusion import config, objectives, sharding  # noqa: F401 (registers the kinds)
from tfusion.data import store
from tfusion.data.tokenizers import load_tokenizer


def import_verb(name: str):
    """The module tfusion.<name>. Verbs define flags of the same names, which absl takes once a process: those
    of other verbs step aside meanwhile, and its own become plain values, SimpleNamespace(value=default)."""
    def ours():
        """name -> (flag, the module that defines it)."""
        found = {flag: (flags.FLAGS[flag], flags.FLAGS.find_module_defining_flag(flag)) for flag in flags.FLAGS}
        return {flag: x for flag, x in found.items() if (x[1] or "").startswith("tfusion.")}

    others = ours()
    for flag in others:
        delattr(flags.FLAGS, flag)
    module = importlib.import_module(f"tfusion.{name}")
    for key, holder in list(vars(module).items()):
        if isinstance(holder, flags.FlagHolder):
            flag, owner = others.get(holder.name, (None, None))  # its own, where it was imported before
            default = flag.default if owner == module.__name__ else holder.default
            setattr(module, key, SimpleNamespace(value=default))
    for flag in ours():
        delattr(flags.FLAGS, flag)
    for flag, (value, owner) in others.items():
        flags.FLAGS[flag] = value
        flags.FLAGS.register_flag_by_module(owner, value)
    return module


@pytest.fixture(autouse=True)
def one_device_mesh():
    """Model code asks for a mesh; tests that want another enter it themselves."""
    mesh = sharding.make_mesh(config.MeshConfig(1, 1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


def fake_encode(images):
    """Pictures (n, 32, 32, 3) -> (n, 4, 4, 4) latents without an autoencoder: 8 x 8 block means and spread."""
    x = images.astype(np.float32).reshape(len(images), 4, 8, 4, 8, 3) / 127.5 - 1
    return np.concatenate([x.mean((2, 4)), x.std((2, 4, 5))[..., None]], axis=-1)


@pytest.fixture(scope="session")
def prepared_root(tmp_path_factory):
    """A small prepared data set (byte tokenizer, 4 x 4 x 4 latents), made once."""
    root = tmp_path_factory.mktemp("data") / "prepared"
    tokenizer = load_tokenizer("byte")
    cfg = tiny_config(root)
    for name, spec in cfg.data.sources.items():
        for split in ("train", "heldout"):
            records = spec.open(split, 32)
            records = [records[i] for i in range(min(len(records), 200))]
            if name == "glosses":
                records = [[text[:60]] for (text,) in records]
            write_split(root, name, split, records, tokenizer.encode_batch, fake_encode)
    store.write_meta(root, tokenizer, "none", cfg.model.latent_shape)
    return root


def tiny_dict(root):
    """A ConfigDict of a model that compiles in seconds: 2 layers, width 32, 4 patches per image."""
    tree = quickstart.get_config("smoke")
    tree.model.update(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=64, text_vocab_size=260)
    tree.model.adapter.update(latent_size=4, latent_channels=4)
    tree.data.update(prepared=str(root), tokenizer="byte", seq_len=192, image_share=0.12, window_rows=32)
    tree.data.sources.scenes.num_records, tree.data.sources.stories.num_records = 200, 50
    tree.train.update(num_steps=6, batch_size=8, log_every=2, eval_every=3, eval_documents=16,
                      diagnostics_every=3, checkpoint_every=2)
    tree.optimizer.update(warmup_steps=2)
    tree.sampling.num_inference_steps = 5
    return tree


def tiny_config(root):
    return config.from_dict(tiny_dict(root))


def tiny_autoencoder_config(**changes):
    """Of 4 x 4 latents, trained on the pictures of `tiny_dict`; changes are of its group `autoencoder`."""
    tree, other = quickstart.get_config("autoencoder,smoke"), tiny_dict("")
    tree.autoencoder.update(latent_channels=4, downsample=8, **changes)
    tree.data.sources, tree.train = other.data.sources, other.train
    return config.from_dict(tree)


def replace(cfg, group: str, **changes):
    """cfg with keys of a group changed, 'model.adapter' or 'data', and nothing checked."""
    first, _, rest = group.partition(".")
    old = getattr(cfg, first)
    return dataclasses.replace(cfg, **{
        first: replace(old, rest, **changes) if rest else dataclasses.replace(old, **changes)})


def with_shares(cfg, **shares):
    """cfg with these sources of its own, in this order."""
    return replace(cfg, "data", sources={
        name: dataclasses.replace(cfg.data.sources[name], share=share) for name, share in shares.items()})


@pytest.fixture(scope="module")
def quick_compiles():
    """Where compiling is nine tenths of the time: the slower code computes the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def cfg(prepared_root):
    return tiny_config(prepared_root)


@pytest.fixture(scope="session")
def prepared_codes(tmp_path_factory):
    """The like, its pictures codes."""
    root = tmp_path_factory.mktemp("data") / "codes"
    codes.write(root, tiny_chameleon(root))
    return root


def tiny_chameleon(root, **changes):
    return codes.tiny_config(root, tiny_dict(root), **changes)


@pytest.fixture
def chameleon(prepared_codes):
    return tiny_chameleon(prepared_codes)


class InMemory(MemoryFileSystem):
    """gs:// as gcsfs has it: what it lists has no scheme and no slash in front."""

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://"))

    def glob(self, path, **more):
        return [found.lstrip("/") for found in super().glob(path, **more)]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder in a bucket that is kept in memory."""
    memory = InMemory(skip_instance_cache=True)
    monkeypatch.setattr(epath.backend.fsspec_backend, "_get_filesystem", lambda name: memory)
    path = epath.Path(f"gs://bucket/{tmp_path.name}")
    path.mkdir(parents=True, exist_ok=True)
    return path
