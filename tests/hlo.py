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
    calls: list[str]  # computations that it runs

    @property
    def size(self) -> int:
        """Elements of the largest result."""
        return max((_elements(shape) for _, shape in self.arrays), default=0)


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
            found[name].append(Instruction(match[1], match[3], arrays, operands, calls))
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


def whole_at_once(text: str, least: int) -> dict[str, int]:
    """{computation: the most elements of gathered arrays that are live at one time}, of a scheduled program.

    Gathered: results of all-gathers, and of fusions around them, of at least so many elements, and what is only
    another form of them.
    """
    entry, computations = parse(text)
    fused = {name for name, found in computations.items() if any(x.op.startswith("all-gather") for x in found)}
    most = {}
    for name in reached(computations, entry):
        origin, size, last = {}, {}, {}
        for time, x in enumerate(computations[name]):
            for operand in x.operands:
                if operand in origin:
                    last[origin[operand]] = time
            gathers = x.op in ("all-gather", "all-gather-start") or (x.op == "fusion" and fused & set(x.calls))
            if gathers and x.size >= least:
                origin[x.name], size[x.name], last[x.name] = x.name, x.size, time
            elif x.op in SAME and x.operands and x.operands[0] in origin:
                origin[x.name] = origin[x.operands[0]]
        starts = {x.name: time for time, x in enumerate(computations[name]) if x.name in size}
        most[name] = max((sum(size[g] for g in size if starts[g] <= time <= last[g])
                          for time in starts.values()), default=0)
    return most


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
