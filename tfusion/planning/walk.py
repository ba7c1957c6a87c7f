"""What a traced step executes: matrix FLOPs, the bytes they move, and what is kept for the backward pass.

Read off the jaxpr, so it is right for any remat policy and any attention; XLA's own cost analysis counts a
loop's body once and a Pallas kernel as nothing. Elementwise work is left out: taken to be fused.
Shapes in a jaxpr are global; inside shard_map they are one shard's, and are multiplied by the number of shards.
How often a `while` runs only the data tell: on accelerators there is one, the LM head's over chunks of scored
positions, and how many are expected is asked for.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.extend import core


class Work(NamedTuple):
    """Totals over all chips, of one step."""

    flops: float
    weight_bytes: float  # operands and results of matrices that have a parameter's shape
    activation_bytes: float  # the others, and all inside shard_map
    residual_bytes: float  # kept by the layers' scan from forward to backward, of one micro-batch
    largest_bytes: float  # the largest result of a matrix product (dense attention's or the head's logits)
    kernels: int  # Pallas calls that state no cost: their FLOPs and bytes are missing


def _bytes(aval) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize


def _inner(eqn) -> list:
    """The jaxprs an equation runs."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found


def _branch(eqn, platform: str):
    """What a cond runs: the platform's branch where it chooses by platform, else the dearest."""
    branches, platforms = _inner(eqn), eqn.params.get("branches_platforms")
    if platforms:
        return next(b for b, names in zip(branches, platforms) if names is None or platform in names)
    return max(branches, key=lambda j: sum(product_flops(e) * n for e, n, _ in equations(j, platform)))


def equations(jaxpr, platform: str, loops: float = 1.0, times: float = 1.0, shards: int = 0) -> Iterator[tuple]:
    """(equation, how often it runs on all shards together, of how many: 0 outside shard_map) over everything
    that a jaxpr runs on a platform ('tpu', 'cuda', 'cpu'). loops: how often a `while` runs."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        yield eqn, times, shards
        if name == "pallas_call":
            continue
        inner, often, parts = _inner(eqn), times, shards
        if name == "scan":
            often = times * eqn.params["length"]
        elif name == "while":
            often = times * loops
        elif name == "shard_map":
            mesh = eqn.params["mesh"]
            axes = eqn.params.get("manual_axes") or mesh.axis_names
            parts = math.prod(mesh.shape[axis] for axis in axes)
            often = times * parts
        elif name == "cond":
            inner = [_branch(eqn, platform)]
        elif name == "custom_vjp_call":
            inner = inner[:1]
        for body in inner:
            yield from equations(body, platform, loops, often, parts)


def product_flops(eqn) -> float:
    """2 x multiply-adds of a matrix product or a convolution; 0 for any other equation."""
    out, operands = math.prod(eqn.outvars[0].aval.shape), [v.aval.shape for v in eqn.invars]
    if eqn.primitive.name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * out * math.prod(operands[0][i] for i in contract)
    if eqn.primitive.name == "conv_general_dilated":
        features = operands[1][eqn.params["dimension_numbers"].rhs_spec[0]]  # of the output
        return 2.0 * out * math.prod(operands[1]) / features
    return 0.0


def residual_bytes(jaxpr, num_layers: int, platform: str) -> float:
    """Bytes stacked by the forward scan over the layers: what remat keeps.

    That scan is the one of length num_layers, not reversed, with the largest stacked output.
    """
    kept = 0.0
    for eqn, *_ in equations(jaxpr, platform):
        if eqn.primitive.name == "scan" and eqn.params["length"] == num_layers and not eqn.params["reverse"]:
            kept = max(kept, sum(_bytes(v.aval) for v in eqn.outvars[eqn.params["num_carry"]:]))
    return kept


def parameter_shapes(params, num_layers: int) -> set[tuple[int, ...]]:
    """The shapes a weight or its gradient has inside a layer, and transposed."""
    shapes = set()
    for leaf in jax.tree.leaves(params):
        shape = leaf.shape[1:] if leaf.shape[:1] == (num_layers,) and len(leaf.shape) > 1 else leaf.shape
        shapes |= {shape, shape[::-1]}
    return shapes


def work(jaxpr, params, num_layers: int, platform: str = "tpu", loops: float = 1.0) -> Work:
    """Walks a step's jaxpr; `params` tells weights from activations."""
    shapes = parameter_shapes(params, num_layers)
    flops = weights = activations = largest = 0.0
    kernels = 0
    for eqn, times, shards in equations(jaxpr, platform, loops):
        if eqn.primitive.name == "pallas_call":
            cost = eqn.params.get("cost_estimate")
            kernels += cost is None
            flops += times * (cost.flops if cost else 0)
            activations += times * (cost.bytes_accessed if cost else 0)
        elif eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            flops += times * product_flops(eqn)
            largest = max(largest, _bytes(eqn.outvars[0].aval) * max(shards, 1))
            for v in (*eqn.invars, *eqn.outvars):
                if v.aval.shape in shapes and not shards:
                    weights += times * _bytes(v.aval)
                else:
                    activations += times * _bytes(v.aval)
    return Work(flops, weights, activations, residual_bytes(jaxpr, num_layers, platform), largest, kernels)
