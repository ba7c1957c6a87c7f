"""Puts a plan together: one dict of plain values, the same that --json prints and text.py renders."""

import platform
from typing import NamedTuple

import jax

from tfusion.accelerators import GIB, PRICES_AS_OF, Accelerator
from tfusion.config import RunConfig
from tfusion.models import flops
from tfusion.objectives import kind_of
from tfusion.planning import roofline, topology
from tfusion.planning.compile import Compiled, host_memory_bytes
from tfusion.planning.memory import Memory
from tfusion.planning.search import Candidate, Planner, nearest_that_fits, search


def make_plan(cfg: RunConfig, accelerator: Accelerator, experiment: str, tokens: float | None = None,
              total_flops: float | None = None, search_too: bool = False) -> dict:
    """Compiles where libtpu knows the accelerator; else by formula only. Raises UserError on what cannot be."""
    topology.mesh_shape(cfg.mesh, accelerator)  # raises, before any work
    by_formula = topology.why_by_formula(accelerator)
    planner = Planner(cfg, accelerator, compiles=not by_formula)
    candidate = planner.candidate(cfg)
    compiled = planner.compile(candidate) if planner.compiles else None
    fits = compiled.fits if compiled else candidate.memory.total <= accelerator.chip.hbm_bytes
    found = None if fits else nearest_that_fits(planner, candidate)
    params = flops.num_params(planner.state.params)
    run = roofline.run(cfg, accelerator, candidate.step, params, tokens, total_flops)
    expected, trunk = kind_of(cfg).expected(cfg), kind_of(cfg).trunk(cfg)
    return {
        "experiment": experiment, "accelerator": accelerator_facts(accelerator),
        "mesh": dict(candidate.mesh.shape), "remat": trunk and trunk.model.remat,
        "seq_len": trunk and trunk.seq_len, "batch_size": cfg.train.batch_size,
        "num_microbatches": cfg.train.num_microbatches, "parameters": params,
        "notes": notes(candidate, accelerator, by_formula), "fits": fits,
        "memory": {**candidate.memory._asdict(), "total": candidate.memory.total},
        "hbm": [part._asdict() for part in hbm_parts(candidate.memory, compiled)],
        "compiler": compiled._asdict() if compiled else None,
        "verdict": verdict(candidate, compiled, accelerator),
        "suggestion": "" if fits else suggestion(found),
        "exchange": candidate.exchange._asdict(), "step": candidate.step._asdict(),
        "flops": {"parts": expected.flops, "six_n_d": flops.six_n_d(params, expected.positions)},
        "assumptions": f"{roofline.ASSUMPTIONS}; {expected.about}".rstrip("; "),
        "run": run._asdict(), "prices_as_of": PRICES_AS_OF,
        "search": _search(planner) if search_too else None,
        "host": {"machine": f"{platform.machine()}, {platform.system()}", "python": platform.python_version(),
                 "jax": jax.__version__, "libtpu": topology.libtpu_version(),
                 "peak_memory_bytes": host_memory_bytes()},
    }


class Part(NamedTuple):
    """A line of the table of HBM."""

    name: str
    bytes: float
    source: str


def hbm_parts(held: Memory, compiled: Compiled | None) -> list[Part]:
    """What a chip's HBM holds. Where it was compiled the parts add up to the compiler's figure: the last is
    what our estimates miss, or, negative, what they count although it is not live at the same time."""
    exact = [Part(name, getattr(held, name), "exact") for name in ("parameters", "optimizer", "ema", "batch")]
    guessed = [Part(name, getattr(held, name), "estimate") for name in ("gradients", "residuals", "working")]
    if compiled is None or not compiled.fits:
        return exact + guessed
    known = [*exact, Part("padding", compiled.argument_bytes - held.arguments, "exact"),
             Part("program", compiled.code_bytes, "exact"), *guessed]
    return [*known, Part("not attributed", compiled.hbm_bytes - sum(part.bytes for part in known),
                         "the compiler's figure less the lines above")]


def notes(candidate: Candidate, accelerator: Accelerator, by_formula: str) -> list[str]:
    """What a user should know before believing the figures."""
    said = []
    if accelerator.num_hosts > 1:
        said.append(f"{accelerator.num_hosts} hosts: the same command runs on each, one process a host, and "
                    "all must reach --workdir")
    if by_formula:
        said.append(f"{by_formula}: by formula only, nothing was compiled")
    if accelerator.num_devices > accelerator.num_chips:
        said.append(f"{accelerator.num_devices} devices, {accelerator.chip.devices_per_chip} a chip: the mesh "
                    "is of these")
    if candidate.work.kernels:
        said.append(f"FLOPs of {candidate.work.kernels} attention kernels, which the compiler cannot count, "
                    "are by formula: of the pairs of positions that the mask shows")
    return said


def verdict(candidate: Candidate, compiled: Compiled | None, accelerator: Accelerator) -> str:
    limit = f"{accelerator.chip.hbm_bytes / GIB:.2f} GiB"
    m = candidate.memory
    if compiled is None:
        word = "fits" if m.total <= accelerator.chip.hbm_bytes else "does not fit"
        return f"{word}: about {m.total / GIB:.1f} of {limit} by formula (untested)"
    if compiled.fits:
        return f"fits: {compiled.hbm_bytes / GIB:.2f} of {limit}, compiled in {compiled.seconds:.0f} s"
    largest = max(m._fields, key=lambda name: getattr(m, name))
    return (f"does not fit: {compiled.needed_bytes / GIB:.2f} of {compiled.available_bytes / GIB:.2f} GiB "
            f"({compiled.what}), largest: {largest}, about {getattr(m, largest) / GIB:.1f} GiB")


def suggestion(found: tuple | None) -> str:
    if found is None:
        return "nothing smaller was found to fit: take more chips, or a smaller batch or model"
    candidate, compiled = found
    flags = " ".join(f"--config.{key}={value}" for key, value in candidate.settings.items())
    how = "untested" if compiled is None else (
        f"compiled: {compiled.hbm_bytes / GIB:.2f} GiB, step {candidate.step.seconds:.2f} s by estimate")
    return f"would fit ({how}): {flags}"


def accelerator_facts(a: Accelerator) -> dict:
    return {"name": a.name, "chip": a.chip.name, "chips": a.num_chips, "devices": a.num_devices,
            "topology": a.topology, "num_slices": a.num_slices, "hbm_bytes": a.chip.hbm_bytes,
            "dollars_per_chip_hour": a.chip.dollars_per_hour}


def _search(planner: Planner) -> dict:
    before = len(planner.compiled)
    best, looked = search(planner)
    return {"looked_at": looked, "compiles": len(planner.compiled) - before, "best": [
        {"settings": c.settings, "seconds": c.step.seconds, "mfu": c.step.mfu,
         "hbm_bytes": compiled.hbm_bytes if compiled else c.memory.total} for c, compiled in best]}
