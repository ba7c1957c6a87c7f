"""What a kind of training decides. The loop, the step, the planner and the verbs never ask which one they run.

To add one: a config (a subclass of config.RunConfig), the functions below, and `register(name, Kind(...))`, in
one file of this folder; and, to use what it has trained, a decoder in inference/.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from tfusion import config
from tfusion.models.transformer import TransformerConfig


class Aux(NamedTuple):
    """What a loss may read beside parameters and batch. None of it has a gradient."""

    step: Any  # int32 (): optimizer steps done
    frozen: Any  # trees that training never changes, such as a perceptual network
    buffers: Any  # what `after_update` keeps from step to step


class Objective(NamedTuple):
    """Pure functions. Losses are (sum, count), so that they add exactly over hosts, micro-batches and rows."""

    init: Callable  # (key) -> params, boxed with logical axis names
    loss: Callable  # (params, aux, batch, key) -> {name: (sum, count)}; counts depend on the data only
    counts: Callable  # (batch) -> {name: count} for the names in `weights`
    weights: dict  # {name: weight in the total}; other names are reported only
    reported: tuple = ()  # those of them that stand beside the weighted ones in an evaluation
    init_buffers: Callable = lambda key: {}  # (key) -> buffers, boxed likewise: no optimizer, decay or average
    after_update: Callable = lambda params, buffers, batch, key: buffers  # -> buffers, of the step's new params
    frozen: Callable = lambda: {}  # () -> dict of arrays, dicts, lists, where a run begins


class Expected(NamedTuple):
    """What an average global batch holds, for plans."""

    positions: int  # of rows: tokens and patches
    scored: float  # positions with an LM loss
    pairs: float  # visible (query, key) pairs
    flops: dict[str, float]  # {part: model FLOPs of a step}
    about: str  # what was assumed, in a few words


class Trunk(NamedTuple):
    """A kind's transformer, for checks and plans."""

    model: TransformerConfig  # the config's group `model`
    seq_len: int  # T
    vocab_size: int  # columns of its LM head
    image_attention: str = "causal"  # inside an image; or "bidirectional"


class Kind(NamedTuple):
    config: type  # its frozen dataclass, a subclass of config.RunConfig
    make: Callable  # (cfg) -> Objective
    # (cfg) -> Rows of training: read(numbers), from 0 on, check(batch), stats(row); identity (fingerprints of
    # the data), where (their name in messages), assets (files of theirs that a run copies)
    open_rows: Callable
    # (cfg, documents=None) -> {source: held-out rows}: read(rows), len, check(batch), batches(size,
    # local_rows), of the first so many records
    open_heldout: Callable
    abstract_batch: Callable  # (cfg) -> the global batch's shapes (jax.ShapeDtypeStruct); needs no data
    totals: Callable  # (cfg, batch) -> {"tokens", "images", "flops", ...} of a batch, summed where it lives
    expected: Callable  # (cfg) -> Expected
    row_format: Callable = lambda cfg: None  # (cfg) -> data.config.RowFormat that `prepare` writes for
    trunk: Callable = lambda cfg: None  # (cfg) -> Trunk, or None without a transformer
    llama: Callable = lambda cfg: None  # (cfg) -> models.llama.Form, or None where it has none


KINDS: dict[str, Kind] = {}


def register(name: str, kind: Kind) -> None:
    """Makes a kind of training known by the name that configs have in `objective`."""
    config.register("objective", name)(kind.config)
    KINDS[name] = kind
