"""How long a step takes: an ESTIMATE from our own counts of FLOPs and bytes, until someone measures.

Matmuls, HBM traffic and the exchange of weights overlap, the slowest counts; tensor- and context-parallel
exchanges come on top. The efficiencies below are assumptions, chosen from what well-tuned dense models are said
to reach on TPUs; they are printed with every estimate.
"""

from typing import NamedTuple

from tfusion.accelerators import Accelerator
from tfusion.config import RunConfig
from tfusion.errors import UserError
from tfusion.models import flops, lm_head
from tfusion.objectives import kind_of
from tfusion.planning.collectives import Collectives
from tfusion.planning.memory import Memory
from tfusion.planning.walk import Work

MATMUL_EFFICIENCY = 0.65  # of the bf16 peak
HBM_EFFICIENCY = 0.80
ICI_EFFICIENCY = 0.80
DCN_EFFICIENCY = 0.50
KERNEL_MATMULS = {2: 7, 3: 9, 4: 11}  # Pallas calls of attention -> T x T products (the model needs 6)

ASSUMPTIONS = (
    f"matmuls at {MATMUL_EFFICIENCY:.0%} of peak, HBM at {HBM_EFFICIENCY:.0%}, ICI at {ICI_EFFICIENCY:.0%}, "
    f"DCN at {DCN_EFFICIENCY:.0%} of the data sheet; weights are exchanged behind the matmuls, tensor- and "
    "context-parallel exchange is not; nothing lost to data, checkpoints or restarts")


class Step(NamedTuple):
    """Seconds per step, by what bounds it, and rates."""

    matmul: float
    hbm: float
    weights: float  # fsdp and data exchange over ICI, and what 'sequence' sums of weights' gradients
    tensor: float  # tensor-parallel exchange
    sequence: float  # context-parallel exchange of keys and values
    dcn: float  # between slices
    executed_flops: float  # per step, all chips: recomputation and masked-out attention included
    model_flops: float  # per step, all chips
    seconds: float
    tokens_per_sec: float  # positions: tokens and patches
    mfu: float


def expected_chunks(cfg: RunConfig, shape: dict[str, int]) -> float:
    """How many chunks of scored positions the LM head runs on a chip and micro-batch, as if the last were only
    as long as it has to be."""
    trunk = kind_of(cfg).trunk(cfg)
    if trunk is None:
        return 1.0
    parts = shape["data"] * shape["fsdp"] * shape["sequence"] * cfg.train.num_microbatches
    positions = cfg.train.batch_size * trunk.seq_len // parts
    chunk = lm_head.chunk_size(positions, trunk.vocab_size // shape["tensor"])
    return kind_of(cfg).expected(cfg).scored / parts / chunk


def kernel_work(cfg: RunConfig, work: Work, pairs: float) -> Work:
    """Adds what attention kernels do, counted by visible pairs; their bytes are q, k, v, out and back."""
    trunk = kind_of(cfg).trunk(cfg)
    if not work.kernels or trunk is None:
        return work
    m = trunk.model
    products = KERNEL_MATMULS.get(work.kernels, 9)
    values = (2 * m.num_heads + 2 * m.num_kv_heads) * m.head_dim * cfg.train.batch_size * trunk.seq_len
    return work._replace(
        flops=work.flops + 2.0 * products * m.num_layers * m.num_heads * m.head_dim * pairs,
        activation_bytes=work.activation_bytes + work.kernels * m.num_layers * values * 2)


def estimate(cfg: RunConfig, accelerator: Accelerator, shape: dict[str, int], work: Work, memory: Memory,
             exchange: Collectives) -> Step:
    chip, devices = accelerator.chip, accelerator.num_devices
    expected = kind_of(cfg).expected(cfg)
    work = kernel_work(cfg, work, expected.pairs)
    matmul = work.flops / devices / (chip.peak_flops * MATMUL_EFFICIENCY)
    state = 2 * (memory.parameters + memory.optimizer + memory.ema) + memory.gradients
    moved = work.activation_bytes / devices + work.weight_bytes / shape["tensor"] + state
    hbm = moved / (chip.hbm_bandwidth * HBM_EFFICIENCY)
    ici = chip.ici_bandwidth * ICI_EFFICIENCY * (1.0 if accelerator.torus else 0.5)
    axes = len(accelerator.shape)
    axis_ici = ici / axes  # a tensor group lies along one axis of the torus, a sequence group too
    taken = min((shape["tensor"] > 1) + (shape["sequence"] > 1), axes - 1)
    weights_ici = ici * (axes - taken) / axes
    over_ici, over_dcn = split_dcn(exchange, accelerator, shape)
    weights = over_ici / weights_ici
    tensor, sequence = exchange.tensor_reduce / axis_ici, exchange.sequence_keys / axis_ici
    dcn = over_dcn / (chip.dcn_bandwidth * DCN_EFFICIENCY)
    seconds = max(matmul, hbm, weights, dcn) + tensor + sequence
    useful = sum(expected.flops.values())
    return Step(matmul, hbm, weights, tensor, sequence, dcn, work.flops, useful, seconds,
                expected.positions / seconds,
                useful / seconds / (devices * chip.peak_flops))


def split_dcn(exchange: Collectives, accelerator: Accelerator, shape: dict[str, int]) -> tuple[float, float]:
    """(bytes of weights over ICI, bytes over the slow network), per chip.

    Slices, and a GPU's hosts, meet over the slow network: the data axis crosses it where it is a multiple of
    their number, else fsdp does, each chip fetching its part of what its group lacks.
    """
    groups = accelerator.num_slices
    if not accelerator.chip.is_tpu:
        groups = max(1, accelerator.num_devices // accelerator.chip.devices_of_host)
    fsdp, inside = exchange.fsdp_gather + exchange.fsdp_scatter, exchange.sequence_reduce
    if groups == 1:
        return fsdp + exchange.data_reduce + inside, 0.0
    if shape["data"] % groups == 0:
        return fsdp + inside, exchange.data_reduce
    return fsdp + exchange.data_reduce + inside, fsdp * (groups - 1) / accelerator.num_devices


class Run(NamedTuple):
    """A whole training run."""

    tokens: float  # positions
    steps: int
    days: float
    chip_hours: float
    dollars: float | None


def run(cfg: RunConfig, accelerator: Accelerator, step: Step, params: int, tokens: float | None = None,
        total_flops: float | None = None) -> Run:
    """Time and price of `tokens` positions, or of a budget by the paper's 6 N D; else of train.num_steps."""
    per_step = kind_of(cfg).expected(cfg).positions
    if (tokens or total_flops) and not per_step:
        raise UserError(f"--tokens and --flops count positions of rows, objective = '{cfg.objective}' has "
                        "none: set --config.train.num_steps")
    if total_flops:
        tokens = total_flops / flops.six_n_d(params, 1)
    steps = max(1, round(tokens / per_step)) if tokens else cfg.train.num_steps
    hours = steps * step.seconds / 3600
    price = accelerator.chip.dollars_per_hour
    chip_hours = hours * accelerator.num_chips
    return Run(steps * per_step, steps, hours / 24, chip_hours, chip_hours * price if price else None)
