"""A run, opened for use: everything needed stands in its folder, whatever became of its data."""

from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from tfusion import config, exported, paths, sharding
from tfusion.checkpoint import Checkpoints, check_identity, load_frozen, warn
from tfusion.data import store
from tfusion.data.tokenizers import Tokenizer, load_saved
from tfusion.errors import UserError
from tfusion.models import codecs
from tfusion.objectives import make_objective
from tfusion.objectives.base import Aux
from tfusion.workdir import CODEC


class Trained(NamedTuple):
    cfg: config.RunConfig
    params: Any  # float32: the moving average where the run kept one; of an export, in its dtype
    codec: codecs.Codec | None  # None where the run saw no pictures, or latents of a foreign encoder
    tokenizer: Tokenizer | None  # None where the run saw no text (an autoencoder)
    step: int  # of the checkpoint
    identity: dict  # {what: fingerprint} of the data it was trained on
    aux: Aux  # what the objective's loss reads beside the parameters
    next_row: int | None = None  # how many rows of its data it was given; None of an export


def load(path, step: int | None = None, mesh: Mesh | None = None, weights: str | None = None) -> Trained:
    """Opens a run's checkpoint (the latest, unless a step is named), or an export, on a mesh (one device,
    unless given).

    weights: "ema" or "raw"; unless given, those to sample with. Nothing else of the checkpoint is read. Raises
    UserError where there is none, where it has no such weights, or where tokenizer or codec are not those that
    the run was trained with.
    """
    workdir, mesh = paths.path(path), mesh or sharding.parse_mesh(None)
    export = exported.about(workdir)
    if export.get("format") == "llama":
        raise UserError(f"{workdir} is an export in Llama's layout, which a run can be started from "
                        "(train.init_from): for this use, export with --format=orbax")
    checkpoints = Checkpoints(workdir) if (workdir / "checkpoints").is_dir() else None
    found = checkpoints.steps() if checkpoints else []
    there = bool(found) and step in (None, *found)
    step = max(found) if there and step is None else step
    meta = checkpoints.meta(step) if there else {}
    identity = meta.get("identity", {})
    cfg = config.load(path)  # after the checkpoint's format, which an older config would hide
    if not there:
        what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        have = f"there are {', '.join(map(str, found))}" if found else (
            f"run `python -m tfusion.train --config=experiments/FILE.py --workdir={workdir}` first")
        raise UserError(f"{what} in {workdir / 'checkpoints'}: {have}")
    tokenizer = load_saved(workdir) if identity.get("tokenizer") else None
    codec = codecs.load(workdir / CODEC) if identity.get("codec") and (workdir / CODEC).exists() else None
    for name, part in (("tokenizer", tokenizer), ("codec", codec)):
        if part and part.fingerprint != identity[name]:
            raise UserError(f"{workdir} holds another {name} than the one it was trained with: copy it anew "
                            "from the run, or resume the run with its data to have it copied")
    weights = check_weights(cfg, export, weights, workdir)
    item, objective = "ema" if weights == "ema" and not export else "params", make_objective(cfg)
    with jax.set_mesh(mesh):  # models name logical axes, which mean nothing outside one
        targets = {item: exported.as_saved(_target(objective.init, mesh), export)}
        buffers = _target(objective.init_buffers, mesh)
        if jax.tree.leaves(buffers):
            targets["buffers"] = buffers
        items = checkpoints.restore(step, targets)
        frozen = load_frozen(workdir, meta, sharding.replicated(mesh))
    checkpoints.close()
    aux = Aux(np.int32(step), frozen, items.get("buffers", {}))
    return Trained(cfg, items[item], codec, tokenizer, step, identity, aux, meta.get("next_row"))


def check_weights(cfg: config.RunConfig, export: dict, asked: str | None, where) -> str:
    """"ema" or "raw": those asked for, else those to sample with. Raises UserError where they are not there.

    export: what an export says of itself; {} of a run.
    """
    has = (export["weights"],) if export else ("ema", "raw") if cfg.optimizer.ema_decay > 0 else ("raw",)
    if asked and asked not in has:
        raise UserError(f"{where} has no {asked} weights: --weights={has[0]} is there")
    return asked or has[0]


def fingerprint(run: Trained) -> str:
    """sha256 (hex) of what it has learnt."""
    learnt = {"params": run.params, "buffers": run.aux.buffers}
    return codecs.fingerprint(flatten_dict(learnt, sep="/"))


def check_data(run: Trained, root) -> None:
    """Raises UserError where prepared data are of another tokenizer or codec than the run's; a warning where
    their records are others: what is held out may then be what the run has seen."""
    now = store.identity(store.read_meta(root))
    check_identity({name: run.identity.get(name) for name in now}, now, "the run", root)
    trained_on = {name.removeprefix("sizes."): digest for name, digest in run.identity.items()
                  if name.startswith("sizes.")}
    there = {name for name in trained_on if store.split_folder(root, name, "train").is_dir()}
    if other := sorted(name for name in there if store.Split(root, name, "train").digest != trained_on[name]):
        warn(f"{root} holds other records of {', '.join(other)} than the run was trained on: what is held out "
             "of them may be what it has seen")


def _target(init, mesh: Mesh):
    """Shapes and shardings of what `init` makes."""
    return sharding.placed(jax.eval_shape(init, jax.random.key(0)), mesh)
