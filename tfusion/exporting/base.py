"""What is exported, and how its weights come to their dtype: leaf by leaf, where they lie."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from tfusion import distributed, exported
from tfusion.data.tokenizers import SAVED
from tfusion.inference.trained import Trained
from tfusion.workdir import CODEC, copy_in


class Export(NamedTuple):
    run: Trained  # its parameters in the dtype below
    source: Path  # the folder that the run was opened from
    weights: str  # "ema" or "raw"
    dtype: str
    rounding: float  # how far a parameter is from what it was, at most


def make(run: Trained, source: Path, weights: str, dtype: str) -> Export:
    """The run's own parameters are given up: each leaf is deleted when its successor is there."""
    leaves, tree = jax.tree.flatten(run.params)
    rounding = 0.0
    for i, x in enumerate(leaves):
        if x.dtype != (wanted := exported.cast(x.dtype, dtype)):
            leaves[i] = x.astype(wanted)
            rounding = max(rounding, difference(leaves[i], x))
            x.delete()
    run = run._replace(params=tree.unflatten(leaves))
    return Export(run, source, weights, dtype, distributed.largest(rounding))


def difference(a, b) -> float:
    """The largest, over the elements of two arrays that lie on the devices alike: part by part, on the host.
    Not 0 where a bit differs, however little, and infinity where one of the two is no number."""
    def apart(x, y):
        x, y = np.asarray(x.data), np.asarray(y.data)
        if x.dtype == y.dtype and x.tobytes() == y.tobytes():
            return 0.0
        by = np.abs(x.astype(np.float64) - y.astype(np.float64)).max(initial=np.finfo(np.float32).tiny)
        return float(np.nan_to_num(by, nan=np.inf))

    pairs = zip(a.addressable_shards, b.addressable_shards, strict=True)
    return max((apart(x, y) for x, y in pairs if not x.replica_id), default=0.0)


def copy_parts(export: Export, folder: Path) -> None:
    """The run's tokenizer and codec, as far as it has them."""
    names = (SAVED if export.run.tokenizer else ()) + ((CODEC,) if export.run.codec else ())
    copy_in([path for name in names if (path := export.source / name).exists()], folder)


def said(export: Export, round_trip: float) -> list[str]:
    """Lines on what was written, compared with what was to be."""
    rounded = f"rounded to {export.dtype} by at most {export.rounding:.3g}; " if export.rounding else ""
    return [f"{export.weights} weights of step {export.run.step}; {rounded}read back, the largest difference "
            f"is {round_trip:.3g}"]
