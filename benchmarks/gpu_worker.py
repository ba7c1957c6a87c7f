"""The workers of `gpu.py`: processes that own the device. One JSON list names the work; answers go to stdout.

  ["device"]                                  what jax sees
  ["numerics"]                                a line per check
  ["attention", CONTENDER]                    compiles one of ATTENTIONS for every case, then `worker.serve`
  ["launch", CASE]                            the same for our three kernels under other tile sizes
  ["step", SIZE, REMAT, BATCH SIZE]           times a training step

On a CPU, a rehearsal, everything is tiny, kernels are interpreted and XLA stands in for the libraries.

B batch, T positions, H heads, K key/value heads, E head dimension.
"""

import json
import math
import os
import statistics
import sys
import time
import types
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from attention import packed_intervals
from worker import serve

from experiments.transfusion import get_config
from tfusion import accelerators, config, distributed, sharding
from tfusion.data import packing
from tfusion.data.layout import image, text
from tfusion.kernels import interval_attention
from tfusion.kernels import interval_attention_gpu as gpu
from tfusion.models import flops
from tfusion.models.masks import key_intervals
from tfusion.objectives import kind_of, make_objective
from tfusion.training import state as states
from tfusion.training import step as steps
from tfusion.training.optimizer import make_optimizer
from tfusion.types import Document


class Case(NamedTuple):
    name: str
    B: int
    T: int
    H: int
    K: int
    E: int


CASES = (Case("4k", 4, 4096, 16, 16, 128), Case("4k grouped", 4, 4096, 16, 4, 128),
         Case("4k heads of 64", 4, 4096, 24, 24, 64), Case("16k", 2, 16384, 16, 16, 128))
TINY = (Case("tiny", 1, 160, 2, 1, 16),)
DOCUMENT = 1024  # of the causal bound that has about our pairs

# The definition is float32 on the CPU. A float32 kernel lands near 1e-6, one that rounded to TF32 near 3e-4;
# bfloat16 operands near 3e-3; a wrong mask or an unwritten block above 5e-2.
LIMITS = {"float32": 1e-4, "bfloat16": 1e-2}
CHECKS = [("random", T, H, K, E, dtype) for E in (64, 128) for dtype in LIMITS
          for T, H, K in ((777, 4, 2), (1000, 4, 4))] + [
    ("random", 777, 4, 1, 128, "bfloat16"), ("packed", 4000, 2, 1, 128, "bfloat16")]
TINY_CHECKS = [("random", 150, 4, 2, 16, "float32"), ("random", 150, 2, 2, 16, "bfloat16")]

# Block sizes, warps, stages that Triton compiles for these head dimensions without many spills.
FORWARD_LAUNCHES = ((128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 128, 4, 2))
BACKWARD_LAUNCHES = ((64, 64, 4, 3), (64, 64, 8, 2), (128, 64, 8, 2), (128, 128, 8, 2), (64, 32, 4, 2))
KERNELS = ("forward", "dq", "dkv")
STEP_SECONDS = 5.0  # of timing, of at most MAX_STEPS, of which the first WARM do not count
WARM, MAX_STEPS = 2, 30


def one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def rehearsing() -> bool:
    return os.environ["JAX_PLATFORMS"] == "cpu"


def cases():
    return TINY if rehearsing() else CASES


def intervals(case: Case):
    """(k_start_BT, k_end_BT): every row its own documents."""
    rows = zip(*(packed_intervals(case.T, seed=b) for b in range(case.B)))
    return tuple(np.concatenate(list(map(np.asarray, x))) for x in rows)


def interpret_kernels() -> None:
    """What a CPU is given instead of its own form: the GPU's kernels, interpreted."""
    interval_attention.cpu = types.SimpleNamespace(
        forward=partial(gpu.forward, interpret=True), backward=partial(gpu.backward, interpret=True))


def about_device(say) -> None:
    device = jax.devices()[0]
    say(device_kind=device.device_kind, platform=device.platform, jax=jax.__version__,
        jaxlib=version("jaxlib"), flax=version("flax"))


def awkward_rows(B: int, T: int):
    """Short runs of text and patches, images side by side and across blocks; the end of a row is padding."""
    rng, segments, images = np.random.default_rng(0), *np.zeros((2, B, T), np.int32)
    for b in range(B):
        at = image = 0
        for number in range(1, T):
            for _ in range(rng.integers(1, 6)):
                run, patches = int(rng.integers(1, 100)), rng.integers(2)
                image += patches
                segments[b, at : at + run], images[b, at : at + run] = number, image * patches
                at += run
        segments[b, T - T // 9 :] = images[b, T - T // 9 :] = 0
    return key_intervals(segments, images)


def with_gradients(attend, q, k, v, dout, *bounds):
    """(out, dq, dk, dv)."""
    out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, *bounds), q, k, v)
    return out, *pullback(dout)


def relative_error(actual, expected) -> float | None:
    """Norm of the difference over the norm; None where it is not finite."""
    a, b = actual.astype(np.float32), expected.astype(np.float32)
    error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
    return error if math.isfinite(error) else None


def check(rows, T, H, K, E, dtype) -> dict:
    """Relative norm of the difference to the definition, which is computed on the CPU from the same inputs."""
    bounds = awkward_rows(2, T) if rows == "random" else packed_intervals(T)
    rng, B = np.random.default_rng(T), len(bounds[0])
    arrays = [rng.standard_normal((B, T, heads, E), np.float32).astype(jnp.dtype(dtype))
              for heads in (H, K, K, H)]
    actual = jax.jit(partial(with_gradients, interval_attention.attention))(
        *arrays, *bounds)
    exact = jax.device_put([x.astype(np.float32) for x in arrays] + list(bounds), jax.devices("cpu")[0])
    expected = jax.jit(partial(with_gradients, interval_attention.reference))(*exact)
    return {name: relative_error(np.asarray(a), np.asarray(b))
            for name, a, b in zip(("out", "dq", "dk", "dv"), actual, expected)}


def check_all(say) -> None:
    if rehearsing():
        interpret_kernels()
    for settings in TINY_CHECKS if rehearsing() else CHECKS:
        about = dict(zip(("rows", "T", "H", "K", "E", "dtype"), settings))
        try:
            errors = check(*settings)
            limit = LIMITS[about["dtype"]]
            say(**about, **errors, ok=all(e is not None and e <= limit for e in errors.values()))
        except Exception as e:  # the other cases go on
            say(**about, error=one_line(e), ok=False)


def dense(implementation: str, q, k, v, k_start_BT, k_end_BT):
    keys = jnp.arange(q.shape[1])
    mask_BTS = (k_start_BT[..., None] <= keys) & (keys < k_end_BT[..., None])
    return jax.nn.dot_product_attention(q, k, v, mask=mask_BTS[:, None],
                                        implementation="xla" if rehearsing() else implementation)


def causal(document: int | None, q, k, v, *_):
    """Another mask: causal over the whole row, or over equal documents."""
    parts = [x.reshape(-1, min(document or x.shape[1], x.shape[1]), *x.shape[2:]) for x in (q, k, v)]
    out = jax.nn.dot_product_attention(*parts, is_causal=True,
                                       implementation="xla" if rehearsing() else "cudnn")
    return out.reshape(q.shape)


def tokamax(implementation: str, q, k, v, k_start_BT, k_end_BT):
    """tokamax 0.0.12 takes intervals through a class of its own only."""
    from tokamax._src.ops.attention import api, base

    mask = base.Mask(k_start=k_start_BT[:, None], k_end=k_end_BT[:, None])
    return api.IMPLEMENTATIONS["xla_chunked" if rehearsing() else implementation](q, k, v, mask=mask)


ATTENTIONS = {
    "ours": interval_attention.attention, "xla_dense": partial(dense, "xla"),
    "cudnn_dense": partial(dense, "cudnn"), "cudnn_causal": partial(causal, None),
    "cudnn_documents": partial(causal, DOCUMENT), "tokamax_triton": partial(tokamax, "triton"),
    "tokamax_mosaic": partial(tokamax, "mosaic_gpu")}


def inputs(case: Case):
    """q, k, v, dout, k_start, k_end on the device."""
    dtype = jnp.float32 if rehearsing() else jnp.bfloat16
    arrays = [jax.random.normal(jax.random.key(n), (case.B, case.T, heads, case.E), dtype)
              for n, heads in enumerate((case.H, case.K, case.K, case.H))]
    return *arrays, *map(jnp.asarray, intervals(case))


def memory_limit() -> float:
    """Bytes; what gpu.py lets this process have of the device."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)


class Functions(dict):
    """Compiled functions by name, each run once; what cannot be had is in `errors`."""

    def __init__(self):
        super().__init__()
        self.errors, self.last = {}, None

    def add(self, name: str, function, arguments):
        """The result of the first run, or None."""
        try:
            compiled = jax.jit(function).lower(*arguments).compile()
            needed = getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)
            if needed > memory_limit():
                raise MemoryError(f"needs {needed / 2**30:.1f} GiB, has {memory_limit() / 2**30:.1f}")
            first = jax.block_until_ready(compiled(*arguments))
        except Exception as e:  # the other functions go on
            self.errors[name] = one_line(e)
            return None

        def again():
            self.last = compiled(*arguments)

        self[name] = again
        return first

    def serve(self, **about) -> None:
        serve({"functions": list(self), "errors": self.errors, **about}, self,
              finish=lambda: jax.block_until_ready(self.last))


def contend(name: str) -> None:
    """Be one of ATTENTIONS."""
    if rehearsing():
        interpret_kernels()
    functions, attend = Functions(), ATTENTIONS[name]
    for case in cases():
        q, k, v, dout, *bounds = inputs(case)
        scores = 4 * case.B * case.H * case.T**2
        if name == "xla_dense" and memory_limit() < 2 * scores:  # before the compiler tries them
            functions.errors[case.name] = f"left out: its scores are {scores / 2**30:.0f} GiB"
            continue
        functions.add(f"{case.name} forward", attend, (q, k, v, *bounds))
        functions.add(f"{case.name} forward_backward", partial(with_gradients, attend),
                      (q, k, v, dout, *bounds))
    functions.serve()


def kernel(name: str, sizes, *arguments):
    """One of KERNELS: what is not returned is not run."""
    if name == "forward":
        return gpu.forward(*arguments[:5], sizes=sizes, interpret=rehearsing())
    grads = gpu.backward(*arguments, sizes=sizes, interpret=rehearsing())
    return grads[:1] if name == "dq" else grads[1:]


def try_launches(index: int) -> None:
    """Serve every launch of the three kernels at one case's shapes."""
    case, functions, differs, defaults = cases()[index], Functions(), {}, {}
    q, k, v, dout, *bounds = inputs(case)
    arguments = (q, k, v, *bounds)
    for name in KERNELS:
        default = tuple(gpu.launch(case.T, case.T, case.E, q.dtype, gradient=name != "forward"))
        others = FORWARD_LAUNCHES if name == "forward" else BACKWARD_LAUNCHES
        expected = None
        for sizes in (default, *[x for x in others[: 1 if rehearsing() else None] if x != default]):
            label = f"{name} {'x'.join(map(str, sizes))}"
            defaults.setdefault(name, label)
            result = functions.add(label, partial(kernel, name, gpu.Launch(*sizes)), arguments)
            expected = result if expected is None else expected
            if result is not None:
                errors = [relative_error(a, b) for a, b in zip(result, expected)]
                differs[label] = None if None in errors else max(errors)
        if name == "forward" and expected is not None:
            arguments = (q, k, v, *bounds, *expected, dout)
    functions.serve(differs=differs, defaults=defaults)


def step_config(size: str, remat: str, batch_size: int) -> config.RunConfig:
    tree = get_config(size)
    tree.model.remat, tree.train.batch_size = remat, batch_size
    if rehearsing():
        tree.model.update(num_layers=2, d_model=32, num_heads=4, num_kv_heads=4, d_ff=64, text_vocab_size=260)
        tree.model.adapter.update(latent_size=4, latent_channels=4)
        tree.data.seq_len = 128
    return config.from_dict(tree)


def mixed_rows(cfg: config.RunConfig):
    """Full rows of four documents with two images each; at the paper's sizes half of a row is patches."""
    rng, m, T = np.random.default_rng(0), cfg.model, cfg.data.seq_len
    tokens = T // 4 - 2 - 2 * (m.num_patches + 2)

    def document():
        ids = np.split(rng.integers(4, m.text_vocab_size, tokens, dtype=np.int32), [tokens // 3, tokens // 2])
        first, second = (image(rng.standard_normal(m.latent_shape, np.float32)) for _ in range(2))
        return cfg.rows.layout.lay(Document((text(ids[0]), first, text(ids[1]), second, text(ids[2]))))

    batch = packing.stack_rows([packing.pack_row(i, [document() for _ in range(4)], cfg.rows)
                                for i in range(cfg.train.batch_size)])
    packing.check_batch(batch, cfg.vocabulary)
    assert batch.segment_ids_BT.all()
    return batch


def train(say, size: str, remat: str, batch_size: int) -> None:
    """Times whole steps, compiled and called as `tfusion.training.loop` does, on rows already on the device."""
    distributed.start_process()
    cfg = step_config(size, remat, batch_size)
    objective, mesh = make_objective(cfg), sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    batch, tx = mixed_rows(cfg), make_optimizer(cfg.optimizer, cfg.train.num_steps)
    with jax.set_mesh(mesh):
        state = states.init_state(objective, tx, cfg.optimizer.ema_decay > 0, cfg.seed, mesh)
        placed, began = sharding.put_batch(batch, mesh, batch_size), time.perf_counter()
        step = steps.jit_train_step(objective, tx, cfg, state).lower(state, {}, placed).compile()
        compile_seconds, seconds, lm_loss = time.perf_counter() - began, [], []
        while len(seconds) < WARM + 3 or (sum(seconds) < STEP_SECONDS and len(seconds) < MAX_STEPS):
            began = time.perf_counter()
            state, losses = step(state, {}, placed)
            jax.block_until_ready((state, losses))
            seconds.append(time.perf_counter() - began)
            lm_loss.append(float(losses["lm_loss"][0] / losses["lm_loss"][1]))
    seconds = seconds[WARM:]
    device, median = jax.devices()[0], statistics.median(seconds)
    needed = float(kind_of(cfg).totals(cfg, batch)["flops"])
    peak, memory = accelerators.peak_flops_per_sec(device.device_kind), device.memory_stats() or {}
    say(params=flops.num_params(state.params), compile_s=compile_seconds, steps=len(seconds),
        step_ms={"median": 1e3 * median, "min": 1e3 * min(seconds)}, model_flops=needed,
        tokens_per_second=batch.tokens_BT.size / median, tflops=needed / median / 1e12,
        mfu=needed / median / peak if peak else None, peak_bytes=memory.get("peak_bytes_in_use"),
        limit_bytes=memory.get("bytes_limit"), first_lm_loss=lm_loss[0], last_lm_loss=lm_loss[-1])


WORK = {"device": about_device, "numerics": check_all, "attention": contend, "launch": try_launches,
        "step": train}


def main() -> None:
    name, *arguments = json.loads(sys.argv[1])
    if not rehearsing() and jax.default_backend() != "gpu":  # jax falls back to the CPU without a word
        raise SystemExit("jax sees no GPU")
    answers = os.fdopen(os.dup(1), "w")

    def say(**values):
        print(json.dumps(values), file=answers, flush=True)

    if name in ("attention", "launch"):
        WORK[name](*arguments)
        return
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    try:
        WORK[name](say, *arguments)
    except Exception as e:
        say(error=one_line(e))


if __name__ == "__main__":
    main()
