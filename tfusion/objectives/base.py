"""What an objective is. The loop and the step never ask which one they run."""

from collections.abc import Callable
from typing import NamedTuple


class Objective(NamedTuple):
    """Pure functions. Losses are (sum, count), so that they add exactly over hosts, micro-batches and rows."""

    init: Callable  # (key) -> params, boxed with logical axis names
    loss: Callable  # (params, batch, key) -> {name: (sum, count)}; counts depend on the data only
    counts: Callable  # (batch) -> {name: count} for the names in `weights`
    weights: dict  # {name: weight in the total}; other names are reported only
    length: Callable  # (text_tokens, images) -> positions of a document (arrays too)
    layout: Callable  # (Document) -> Example
