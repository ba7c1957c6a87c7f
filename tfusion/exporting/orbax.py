"""A checkpoint of the parameters alone, with all that their use needs: a run's folder, less what only training
reads."""

from pathlib import Path

import jax

from tfusion import config, distributed
from tfusion.checkpoint import Checkpoints, save_frozen
from tfusion.errors import UserError
from tfusion.exporting import readme
from tfusion.exporting.base import Export, copy_parts, difference, said
from tfusion.inference import trained


def check(cfg: config.RunConfig, where) -> None:
    """Every kind of training has this form."""


def write(export: Export, folder: Path) -> list[str]:
    """Raises UserError where it cannot be written, or is not read back as it was."""
    run, aux = export.run, export.run.aux
    if distributed.is_writer():
        config.save(run.cfg, folder)
        copy_parts(export, folder)
        (folder / "README.md").write_text(readme.orbax(export))
    save_frozen(folder, aux.frozen)
    buffers = {"buffers": aux.buffers} if jax.tree.leaves(aux.buffers) else {}
    checkpoints = Checkpoints(folder, writing=True)
    checkpoints.save(run.step, {"params": run.params, **buffers}, {
        "identity": run.identity, "config": run.cfg.to_dict()}, frozen=aux.frozen)
    checkpoints.close()
    distributed.wait_for_all()
    mesh = jax.sharding.get_mesh()
    back = trained.load(folder, mesh=mesh)
    pairs = zip(*(jax.tree.leaves((each.params, each.aux.buffers, each.aux.frozen)) for each in (run, back)),
                strict=True)
    largest = distributed.largest(max(difference(*pair) for pair in pairs))
    if largest:
        raise UserError(f"{folder} was not read back as it was written (by up to {largest:.3g}): is the disk "
                        "sound?")
    return said(export, largest)
