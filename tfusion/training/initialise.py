"""A run that begins with a Llama's parameters, of a folder in Hugging Face's layout (train.init_from)."""

from pathlib import Path

import jax
import jax.numpy as jnp

from tfusion import config, exported
from tfusion.data.tokenizers import load_saved
from tfusion.errors import UserError
from tfusion.objectives import kind_of
from tfusion.training.state import TrainState

NAMED = 8  # leaves or tensors of a kind that are named, before they are counted


def from_llama(cfg: config.RunConfig, state: TrainState, folder: Path) -> TrainState:
    """A fresh state, given up, with the folder's parameters where they have a place, and an average that begins
    there. Says what was loaded, what is new and what is left over.

    Raises UserError where the kind of training has no such transformer, or it is of another size.
    """
    kind = kind_of(cfg)
    form = kind.llama(cfg)
    if form is None:
        raise UserError(f"train.init_from: {folder} holds a Llama, and a run with objective = "
                        f"'{cfg.objective}' has no transformer in that form")
    shift = load_saved(kind.row_format(cfg).data.prepared).shift
    begun = exported.start_from_llama(folder, form, state.params, shift)
    print(f"begins with the parameters of {folder}")
    for what in ("loaded", "new", "left_over"):
        names = getattr(begun, what)
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        print(f"  {what.replace('_', ' ')}: {', '.join(names[:NAMED]) or 'nothing'}{more}")
    ema = None if state.ema_params is None else jax.tree.map(jnp.copy, begun.params)
    return state._replace(params=begun.params, ema_params=ema)
