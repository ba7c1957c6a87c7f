"""A refactor computes what its parent commit computed: bit by bit, on this machine.

  make golden BASE=HEAD~1        (python -m tests.golden --base=HEAD~1)

Checks BASE out into a temporary worktree, runs the same tiny training with both trees, each in its own
process through the tree's own `tfusion.train`, and prints the first difference: of the losses and norms of
every step as metrics.jsonl holds them (7 digits), then of the last state bit by bit.

tests/testdata/golden_losses.json holds the same losses with a tolerance, for any machine
(tests/test_golden.py; `python -m tests.update_golden` writes it anew).
"""

import argparse
import contextlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOSSES = ROOT / "tests" / "testdata" / "golden_losses.json"
STEPS = 20
COMPARED = ("lm_loss", "diffusion_loss", "grad_norm", "param_norm")


def tiny_tree(root):
    """The ConfigDict of the tiny training, by the tree's own experiment file and its own keys."""
    from experiments import quickstart

    tree = quickstart.get_config("smoke")
    tree.model.update(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=64, text_vocab_size=260)
    latents = tree.model.adapter if "sources" in tree.data else tree.model  # BASE may be older
    latents.update(latent_size=4, latent_channels=4)
    tree.data.update(prepared=str(root), tokenizer="byte", seq_len=192, window_rows=32, image_share=0.12)
    if "sources" in tree.data:
        tree.data.sources.scenes.num_records, tree.data.sources.stories.num_records = 200, 50
    else:
        tree.data.num_scenes = 200
    tree.train.update(num_steps=STEPS, batch_size=8, num_microbatches=2, log_every=1, eval_every=0,
                      diagnostics_every=0, checkpoint_every=STEPS)
    tree.optimizer.update(warmup_steps=2)
    return tree


def encode(images):
    """Pictures (n, 32, 32, 3) -> (n, 4, 4, 4) latents without an autoencoder, as tests/conftest.py."""
    import numpy as np

    x = images.astype(np.float32).reshape(len(images), 4, 8, 4, 8, 3) / 127.5 - 1
    return np.concatenate([x.mean((2, 4)), x.std((2, 4, 5))[..., None]], axis=-1)


def open_source(cfg, name: str, split: str):
    if hasattr(cfg.data, "sources"):
        return cfg.data.sources[name].open(split, 32)
    from tfusion.data.sources import make_source  # BASE may be older

    return make_source(name, cfg.data, split)


def write_split(root: Path, name: str, split: str, records, encode_text, encode_images,
                shards: int = 1) -> None:
    """records: each a list of parts (str, or uint8 (H, W, 3)). encode_text: list[str] -> list of id lists.
    encode_images: uint8 (n, H, W, 3) -> (n, h, w, c)."""
    try:
        from tfusion.data import layout, store
    except ImportError:  # BASE may be older
        from tfusion.data import prepared

        return prepared.write_source(root / name / split, records, encode_text, encode_images)
    for shard in range(shards):
        with store.Writer(root, name, split, shard) as writer:
            for record in records[shard * len(records) // shards : (shard + 1) * len(records) // shards]:
                writer.add([layout.text(encode_text([part])[0]) if isinstance(part, str)
                            else layout.image(encode_images(part[None])[0]) for part in record])


def write_meta(root: Path, *about) -> None:
    try:
        from tfusion.data import store
    except ImportError:  # BASE may be older
        from tfusion.data import prepared as store
    store.write_meta(root, *about)


def write_data(root: Path) -> None:
    """The prepared data of the tiny training: byte tokenizer, 200 records of each source."""
    from tfusion import config, objectives  # noqa: F401 (registers the kinds)
    from tfusion.data.tokenizers import load_tokenizer

    tree, tokenizer = tiny_tree(root), load_tokenizer("byte")
    cfg = config.from_dict(tree)
    for name in tree.data.get("sources", tree.data.get("mixture")):
        for split in ("train", "heldout"):
            source = open_source(cfg, name, split)
            records = [source[i] for i in range(min(len(source), 200))]
            if name == "glosses":
                records = [[text[:60]] for (text,) in records]
            write_split(root, name, split, records, tokenizer.encode_batch, encode)
    write_meta(root, tokenizer, "none", cfg.model.latent_shape)


def read_metrics(workdir: Path) -> list[dict]:
    """One {'lm_loss': ..., ...} per step."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[f"train/{name}"] for name in COMPARED} for row in rows if "train/lm_loss" in row]


def read_state(workdir: Path) -> dict:
    """{name: array} of the last checkpoint, as it is on disk: one tree, or one per item (BASE may be older)."""
    import jax
    import orbax.checkpoint as ocp

    folder, tree = (workdir / "checkpoints" / str(STEPS)).absolute(), {}
    with ocp.PyTreeCheckpointer() as checkpointer, warnings.catch_warnings(action="ignore"):
        if (folder / "state").exists():
            tree = checkpointer.restore(folder / "state")
            del tree["step"]
        for item, name in (("params", "params"), ("optimizer", "opt_state"), ("ema", "ema_params")):
            if (folder / item).exists():
                tree[name] = checkpointer.restore(folder / item)
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def train_here(folder: Path) -> list[dict]:
    """The tiny training in this process and on one device: what golden_losses.json records."""
    import jax

    from tfusion import config, sharding
    from tfusion.training.loop import train

    write_data(folder / "data")
    cfg = config.from_dict(tiny_tree(folder / "data"))
    (folder / "run").mkdir()
    mesh = sharding.make_mesh(config.MeshConfig(1, 1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        train(cfg, folder / "run", mesh)
    return read_metrics(folder / "run")


def write_losses() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = train_here(Path(folder))
    LOSSES.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def worker(folder: Path) -> None:
    """Runs in a tree's own process: makes its data, then trains as a user would."""
    write_data(folder / "data")
    tree = json.dumps(tiny_tree(folder / "data").to_dict())
    (folder / "tiny.py").write_text("import json\nfrom ml_collections import ConfigDict\n\n\n"
                                    f"def get_config(arg=None):\n    return ConfigDict(json.loads({tree!r}))\n")
    sys.argv = ["train", f"--config={folder / 'tiny.py'}", f"--workdir={folder / 'run'}"]
    runpy.run_module("tfusion.train", run_name="__main__")


def run_tree(tree: Path, folder: Path) -> tuple[list[dict], dict]:
    folder.mkdir()
    env = {**os.environ, "PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, str(Path(__file__).absolute()), f"--worker={folder}"], cwd=tree,
                          env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: the training of {tree} failed:\n{done.stderr[-2000:]}")
    return read_metrics(folder / "run"), read_state(folder / "run")


def first_difference(base: tuple[list[dict], dict], here: tuple[list[dict], dict]) -> str | None:
    """One line, or None where losses and states are the same."""
    for step, (old, new) in enumerate(zip(base[0], here[0]), start=1):
        for name in COMPARED:
            if old[name] != new[name]:
                return f"step {step}: {name} was {old[name]!r}, is {new[name]!r}"
    if len(base[0]) != len(here[0]):
        return f"there were {len(base[0])} steps, there are {len(here[0])}"
    only = sorted(base[1].keys() ^ here[1].keys())
    if only:
        return f"only one of the last states has {only[0]} (and {len(only) - 1} more)"
    for name, old in base[1].items():
        new = here[1][name]
        if old.shape != new.shape or old.dtype != new.dtype or old.tobytes() != new.tobytes():
            return f"the last state differs in {name}, though no loss does in 7 digits"
    return None


@contextlib.contextmanager
def worktree(revision: str):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base"
        git = ["git", "-C", str(ROOT), "worktree"]
        added = subprocess.run([*git, "add", "--detach", str(path), revision], capture_output=True, text=True)
        if added.returncode:
            sys.exit(f"error: cannot check out '{revision}': {added.stderr.strip().splitlines()[-1]}")
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=False, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train this tree and a base revision, compare bit by bit.")
    parser.add_argument("--base", default="HEAD", help="the revision to compare with")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as folder, worktree(args.base) as base:
        print(f"[1/2] {args.base}: {STEPS} steps", flush=True)
        old = run_tree(base, Path(folder) / "base")
        print(f"[2/2] this tree: {STEPS} steps", flush=True)
        difference = first_difference(old, run_tree(ROOT, Path(folder) / "here"))
    if difference:
        sys.exit(f"DIFFERENT from {args.base}: {difference}")
    print(f"the same as {args.base}: {STEPS} steps of {', '.join(COMPARED)}, and every bit of the last state")


if __name__ == "__main__":
    main()
