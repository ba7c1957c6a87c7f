"""Reads a compiled program's text (HLO): its collectives, and how much of what they gather is whole at once.

    python -m tests.hlo        writes tests/collectives.txt anew: look at the difference
"""

import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

LISTED = Path(__file__).with_name("collectives.txt")
MESHES = {  # of eight devices: (data, fsdp, tensor, sequence)
    "data=2,fsdp=2,tensor=2": (2, 2, 2, 1),
    "fsdp=2,sequence=4": (1, 2, 1, 4),
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
               "ragged-all-to-all", "collective-broadcast")
SAME = ("bitcast", "copy", "convert", "transpose", "reshape", "all-gather-done", "get-tuple-element")


class Instruction(NamedTuple):
    name: str
    op: str
    arrays: list[tuple[str, tuple[int, ...]]]  # (dtype, shape) of each result
    operands: list[str]
    calls: list[str]  # computations that it runs; a loop's body last
    channel: str | None  # of a collective


def _elements(shape) -> int:
    return 1 if not shape else shape[0] * _elements(shape[1:])


def parse(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """(the entry's name, {computation: its instructions in their order})."""
    found, entry, name = {}, "", ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith("HloModule"):
            name = head[2]
            found[name], entry = [], name if head[1] else entry
            continue
        match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", line)
        if match:
            arrays = [(dtype, tuple(map(int, filter(None, shape.split(",")))))
                      for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[2])]
            inside, _, after = match[4].partition(")")
            calls = re.findall(r"(?:calls|to_apply|body|condition|branch_computations)=\{?%?([\w.\-]+)", after)
            operands = re.findall(r"%([\w.\-]+)", inside)
            channel = re.search(r"channel_id=(\d+)", after)
            found[name].append(Instruction(match[1], match[3], arrays, operands, calls, channel and channel[1]))
    return entry, found


def reached(computations: dict, start: str) -> set[str]:
    """A computation and all that it runs."""
    names, todo = set(), [start]
    while todo:
        if (name := todo.pop()) not in names:
            names.add(name)
            todo += [call for x in computations[name] for call in x.calls]
    return names


def collectives(text: str) -> Counter:
    """{(in a loop or 'once', operation, dtype, shape): how many}, scalars left out."""
    entry, computations = parse(text)
    bodies = [call for name in reached(computations, entry) for x in computations[name] if x.op == "while"
              for call in x.calls]
    looped = set().union(*(reached(computations, body) for body in bodies))
    return Counter((("loop" if name in looped else "once"), x.op.removesuffix("-start"), dtype, shape)
                   for name in reached(computations, entry) for x in computations[name]
                   if x.op.removesuffix("-start") in COLLECTIVES
                   for dtype, shape in (x.arrays[-1:] if x.op == "all-gather-start" else x.arrays) if shape)


def whole_at_once(text: str, weights: set[int]) -> dict[str, int]:
    """{entry or loop's body: the most elements of gathered weights that are live at one time}, of a scheduled
    program. weights: their numbers of elements, by which they are told from activations.

    A gather is known by its channel, for a TPU's is spread over a chain of fusions. It is live from the first
    instruction that has it inside to the last that reads its result, or what is only another form of it.
    """
    entry, computations = parse(text)
    sizes = {x.channel: _elements(x.arrays[-1][1]) for found in computations.values() for x in found
             if x.op.startswith("all-gather") and x.channel and _elements(x.arrays[-1][1]) in weights}
    loops = [x for name in reached(computations, entry) for x in computations[name] if x.op == "while"]
    bodies = [loop.calls[-1] for loop in loops]
    return {name: _most_live(computations, name, sizes) for name in (entry, *bodies)}


def _most_live(computations: dict, name: str, sizes: dict[str, int]) -> int:
    held, first, last = {}, {}, {}  # by instruction: channels; by channel: times
    for time, x in enumerate(computations[name]):
        for channel in set().union(*(held.get(operand, set()) for operand in x.operands)):
            last[channel] = time
        run = set().union(*(reached(computations, call) for call in x.calls)) if x.op == "fusion" else ()
        channels = {x.channel, *(y.channel for called in run for y in computations[called])} & sizes.keys()
        for channel in channels:
            first.setdefault(channel, time)
            last[channel] = time
        if x.op in SAME and x.operands:
            channels |= held.get(x.operands[0], set())
        results = {_elements(shape) for _, shape in x.arrays}
        held[x.name] = {channel for channel in channels if sizes[channel] in results}
    live = [[c for c in first if first[c] <= time <= last[c]] for time in first.values()]
    return max((sum(sizes[c] for c in channels) for channels in live), default=0)


def small_step(mesh_sizes):
    """(config, lowered step) of a bfloat16 model of three layers on fake devices."""
    import jax

    from tests.planning.plans import small_config
    from tfusion import sharding
    from tfusion.config import MeshConfig
    from tfusion.planning import compile

    cfg = small_config(batch_size=16, num_layers=3, d_ff=128, text_vocab_size=700)
    mesh = sharding.make_mesh(MeshConfig(*mesh_sizes), jax.devices())
    with jax.set_mesh(mesh):
        return cfg, compile.trace(cfg, compile.abstract_state(cfg), mesh).lower()


def compiled(lowered) -> tuple[str, str]:
    """(the program as partitioned, before a CPU's own passes, which know no bfloat16; as compiled)."""
    with tempfile.TemporaryDirectory() as dump:
        options = {"xla_dump_to": dump, "xla_dump_hlo_pass_re": "spmd-partitioning",
                   "xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        text = lowered.compile(compiler_options=options).as_text()
        partitioned, = Path(dump).glob("*after_spmd-partitioning*.txt")
        return partitioned.read_text(), text


def listed(counts: Counter) -> str:
    """One line each, sorted: where, operation, array, how many."""
    return "".join(f"{where:4} {op:15} {dtype}[{','.join(map(str, shape))}]{f' x {n}' if n > 1 else ''}\n"
                   for (where, op, dtype, shape), n in sorted(counts.items()))


def main() -> None:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"
    parts = [f"mesh {name}\n{listed(collectives(compiled(small_step(sizes)[1])[0]))}"
             for name, sizes in MESHES.items()]
    LISTED.write_text("\n".join(parts))


if __name__ == "__main__":
    sys.exit(main())
