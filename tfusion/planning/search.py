"""Other meshes, remat policies and micro-batches: ranked by the estimate, the best of them compiled."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from jax.sharding import AbstractMesh

from tfusion.accelerators import Accelerator
from tfusion.config import RunConfig, choices
from tfusion.errors import UserError
from tfusion.models.transformer import TransformerConfig
from tfusion.objectives import check_mesh, kind_of
from tfusion.planning import memory, roofline, topology
from tfusion.planning.collectives import Collectives, collectives
from tfusion.planning.compile import Compiled, abstract_state, compile_step, progress, trace
from tfusion.planning.memory import Memory
from tfusion.planning.roofline import Step
from tfusion.planning.walk import Work, work

REMATS = choices(TransformerConfig, "remat")
TENSOR_SIZES = (1, 2, 4, 8)
MICROBATCHES = (1, 2, 4, 8, 16)
# Our estimate is within 5 % at 7B (benchmarks/results/plan_7b.json), but was made with those figures in view.
SLACK = 1.2


class Candidate(NamedTuple):
    """A configuration, and what we work out about it without compiling."""

    cfg: RunConfig
    mesh: AbstractMesh
    work: Work
    memory: Memory
    exchange: Collectives
    step: Step

    @property
    def settings(self) -> dict:
        """The flags that make it."""
        remat = {"model.remat": remat_of(self.cfg)} if remat_of(self.cfg) else {}
        return {**{f"mesh.{axis}": n for axis, n in self.mesh.shape.items()}, **remat,
                "train.num_microbatches": self.cfg.train.num_microbatches}


def remat_of(cfg: RunConfig) -> str | None:
    """None without a transformer."""
    trunk = kind_of(cfg).trunk(cfg)
    return trunk and trunk.model.remat


class Planner:
    """Works out candidates for one config and slice; keeps what they share."""

    def __init__(self, cfg: RunConfig, accelerator: Accelerator, compiles: bool = True):
        self.cfg, self.accelerator = cfg, accelerator
        self.compiles = compiles and accelerator.chip.is_tpu
        self.state = abstract_state(cfg)
        self._works: dict[tuple, Work] = {}
        self._compiled: dict[tuple, Compiled] = {}

    def work(self, cfg: RunConfig, mesh: AbstractMesh) -> Work:
        """Global FLOPs and bytes: the same on every mesh, but that kept keys and values are whole on each
        part of a row's length (and the size of the LM head's chunks, of which bytes depend a little)."""
        trunk = kind_of(cfg).trunk(cfg)
        key = remat_of(cfg), cfg.train.num_microbatches, mesh.shape["sequence"]
        if key not in self._works:
            platform = "tpu" if self.accelerator.chip.is_tpu else "cuda"
            self._works[key] = work(trace(cfg, self.state, mesh).jaxpr.jaxpr, self.state.params,
                                    trunk.model.num_layers if trunk else 0, platform,
                                    roofline.expected_chunks(cfg, mesh.shape))
        return self._works[key]

    def candidate(self, cfg: RunConfig) -> Candidate:
        """Raises UserError where the mesh does not fit the chips, the batch or the model."""
        mesh = topology.abstract_mesh(cfg.mesh, self.accelerator)
        check_mesh(cfg, mesh)
        done = self.work(cfg, mesh)
        held = memory.estimate(cfg, self.state, mesh, done)
        exchange = collectives(cfg, self.state.params, mesh.shape)
        step = roofline.estimate(cfg, self.accelerator, mesh.shape, done, held, exchange)
        return Candidate(cfg, mesh, done, held, exchange, step)

    @property
    def traces(self) -> int:
        return len(self._works)

    @property
    def compiled(self) -> list[Compiled]:
        """What has been compiled so far."""
        return list(self._compiled.values())

    def compile(self, candidate: Candidate, more: int = 0) -> Compiled:
        """Compiles once; the progress line counts on `more` compiles after this one."""
        key = tuple(candidate.settings.values())
        if key not in self._compiled:
            seconds = [c.seconds for c in self.compiled if c.fits]
            usual = sum(seconds) / len(seconds) if seconds else None
            self._compiled[key] = compile_step(
                candidate.cfg, self.state, topology.make_mesh(candidate.cfg.mesh, self.accelerator),
                self.label(candidate) + (f", at most {more} more to compile" if more else ""),
                lambda elapsed: max(usual - elapsed, 0) + usual * more if usual else None)
        return self._compiled[key]

    def label(self, candidate: Candidate) -> str:
        shape = " x ".join(f"{axis} {n}" for axis, n in candidate.mesh.shape.items())
        return (f"compiling for {self.accelerator.name}, {shape}, remat {remat_of(candidate.cfg)}, "
                f"{candidate.cfg.train.num_microbatches} micro-batch(es)")

    def may_fit(self, candidate: Candidate) -> bool:
        return candidate.memory.total <= SLACK * self.accelerator.chip.hbm_bytes


def change(cfg: RunConfig, **groups) -> RunConfig:
    """change(cfg, mesh={'fsdp': 8}) replaces single values."""
    return dataclasses.replace(
        cfg, **{name: dataclasses.replace(getattr(cfg, name), **values) for name, values in groups.items()})


def smaller(cfg: RunConfig, shape: dict[str, int], slices: int = 1) -> Iterator[RunConfig]:
    """Changes that need less HBM, the nearest first: full remat, more micro-batches, more fsdp, more tensor."""
    cfg = change(cfg, mesh=dict(shape))  # none is left to take what is left
    if remat_of(cfg) not in ("full", None):
        cfg = change(cfg, model={"remat": "full"})
        yield cfg
    rows = cfg.train.batch_size // (shape["data"] * shape["fsdp"])
    micros = cfg.train.num_microbatches
    for n in range(micros + 1, rows + 1):
        if rows % n == 0 and n % micros == 0:
            yield change(cfg, train={"num_microbatches": n})
    chips = shape["data"] * shape["fsdp"] * shape["tensor"] // slices  # of one slice and one part of the length
    if shape["data"] > slices:
        wide = {"data": slices, "fsdp": chips // shape["tensor"]}
        yield change(cfg, mesh=wide)
        yield change(cfg, mesh=wide, train={"num_microbatches": max(rows, 1)})
    for tensor in TENSOR_SIZES:
        if tensor > shape["tensor"] and chips % tensor == 0:
            fsdp = chips // tensor
            yield change(cfg, mesh={"data": slices, "fsdp": fsdp, "tensor": tensor},
                         train={"num_microbatches": max(cfg.train.batch_size // (slices * fsdp), 1)})


def nearest_that_fits(planner: Planner, candidate: Candidate, max_compiles: int = 3):
    """(candidate, Compiled or None where untested) of the nearest smaller configuration, or None."""
    untested = None
    for cfg in smaller(candidate.cfg, candidate.mesh.shape, planner.accelerator.num_slices):
        try:
            other = planner.candidate(cfg)
        except UserError:
            continue
        if not planner.may_fit(other):
            continue
        if not planner.compiles or max_compiles == 0:
            untested = untested or other
            break
        max_compiles -= 1
        compiled = planner.compile(other)
        if compiled.fits:
            return other, compiled
    return (untested, None) if untested else None


def settings(cfg: RunConfig, accelerator: Accelerator) -> Iterator[list[RunConfig]]:
    """Every mesh and remat policy that the search looks at, each with ever more micro-batches.

    mesh.sequence stays as given: it is for rows too long for one chip, which only the user knows to want.
    """
    sequence = topology.mesh_shape(cfg.mesh, accelerator)["sequence"]
    devices = accelerator.num_devices // sequence
    for tensor in TENSOR_SIZES:
        if devices % tensor or tensor > accelerator.chip.devices_of_host:
            continue
        rest = devices // tensor
        for fsdp in (n for n in range(1, rest + 1) if rest % (n * accelerator.num_slices) == 0):
            for remat in REMATS if remat_of(cfg) else (None,):
                mesh = {"data": rest // fsdp, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}
                base = change(cfg, mesh=mesh, **({"model": {"remat": remat}} if remat else {}))
                yield [change(base, train={"num_microbatches": n}) for n in MICROBATCHES]


def first_that_may_fit(planner: Planner, configs: list[RunConfig]) -> list:
    """[the first candidate that may fit, the configs after it]; [] where none may or the mesh suits nothing."""
    for i, cfg in enumerate(configs):
        try:
            candidate = planner.candidate(cfg)
        except UserError:  # does not divide the batch or the model: nor will more micro-batches
            return []
        if planner.may_fit(candidate):
            return [candidate, configs[i + 1:]]
    return []


def ranked(planner: Planner, groups: list[list[RunConfig]]) -> list[list]:
    """The groups that may fit, as first_that_may_fit gives them: the fastest by estimate first, then those that
    need least. One of each remat policy and 'tensor': other splits between 'data' and 'fsdp' are left out, so
    that the few compiles go to what differs more."""
    before, traces = planner.traces, len(REMATS) * len(MICROBATCHES)

    def left(elapsed: float) -> float | None:  # all but the traces takes next to no time
        done = planner.traces - before
        return elapsed / done * max(traces - planner.traces, 0) if done else None

    with progress(f"ranking {len(groups)} meshes and remat policies by formula", left):
        found = [group for configs in groups if (group := first_that_may_fit(planner, configs))]
    found.sort(key=lambda group: (float(f"{group[0].step.seconds:.3g}"), group[0].memory.total))
    first = {}
    for group in found:
        first.setdefault((remat_of(group[0].cfg), group[0].mesh.shape["tensor"]), group)
    return list(first.values())


def search(planner: Planner, wanted: int = 3, max_compiles: int = 6) -> tuple[list, int]:
    """([(candidate, Compiled or None)], how many were looked at): the best by estimated time that fit.

    At most max_compiles compiles, for each takes minutes at 7B; all else is by formula.
    """
    groups = list(settings(planner.cfg, planner.accelerator))
    found = ranked(planner, groups)
    if not planner.compiles:
        return [(group[0], None) for group in found[:wanted]], len(groups)
    fitting, limit = [], len(planner.compiled) + max_compiles
    while found and len(planner.compiled) < limit and len(fitting) < wanted:
        candidate, more = found.pop(0)
        compiled = planner.compile(candidate, limit - len(planner.compiled) - 1)
        if compiled.fits:
            fitting.append((candidate, compiled))
        elif group := first_that_may_fit(planner, more):
            found.insert(0, group)
    return fitting, len(groups)
