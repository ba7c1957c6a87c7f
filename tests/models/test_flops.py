"""Model FLOPs by part against hand counts, and against a walk over the matrix products of the traced step."""

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest
from flax import linen as nn

from experiments import transfusion
from tfusion import config
from tfusion.models import flops, lm_head
from tfusion.models.adapters.linear import TIME_FEATURES
from tfusion.objectives import kind_of, make_objective, packed
from tfusion.objectives import transfusion as objective
from tfusion.objectives.base import Aux
from tfusion.planning import walk
from tfusion.planning.compile import abstract_batch
from tfusion.training.step import gradients, noise_key
from tfusion.types import Batch


def small_config(remat="none"):
    """Every size a different number, so that a product's part is told by its shape."""
    tree = transfusion.get_config("0.16b")
    tree.model.update(num_layers=3, d_model=48, num_heads=4, num_kv_heads=2, d_ff=160, text_vocab_size=600,
                      remat=remat, compute_dtype="float32")
    tree.model.adapter.update(latent_size=8, latent_channels=5)
    tree.data.update(seq_len=72, image_share=0.4)
    tree.train.update(batch_size=2)
    return config.from_dict(tree)


def traced_products(cfg):
    """[(FLOPs, shapes of operands and result)] of every matrix product in the gradient, times included; with as
    many chunks of the LM head as all positions fill."""
    made, positions = make_objective(cfg), cfg.train.batch_size * cfg.data.seq_len
    chunks = positions / lm_head.chunk_size(positions, cfg.model.padded_vocab_size)
    batch = abstract_batch(cfg, jax.sharding.get_mesh())
    jaxpr = jax.make_jaxpr(lambda p, b: gradients(made, p, Aux(0, {}, {}), b, noise_key(0, 0), 1)[0])(
        unboxed(made), batch)
    found = walk.equations(jaxpr.jaxpr, "cpu", chunks)
    return [(times * walk.product_flops(eqn), [v.aval.shape for v in (*eqn.invars, *eqn.outvars)])
            for eqn, times, _ in found if eqn.primitive.name == "dot_general"]


def unboxed(made):
    """Shapes of the parameters."""
    return nn.meta.unbox(jax.eval_shape(made.init, jax.random.key(0)))


def by_part(cfg):
    """{part: FLOPs}, told by shapes."""
    m, T = cfg.model, cfg.data.seq_len
    parts = Counter()
    for n, shapes in traced_products(cfg):
        sizes = {size for shape in shapes for size in shape}
        if m.padded_vocab_size in sizes:
            parts["lm head"] += n
        elif sum(len(shape) >= 3 and shape[-1] % T == 0 and shape[-2] % T == 0 for shape in shapes):
            parts["attention"] += n
        elif m.adapter.patch_values in sizes or TIME_FEATURES in sizes:
            parts["image adapter"] += n
        elif all(set(s) <= {m.d_model, cfg.train.batch_size, cfg.rows.image_slots,
                            cfg.train.batch_size * cfg.rows.image_slots} for s in shapes):
            parts["image adapter"] += n  # the timestep MLP's second matrix
        else:
            parts["blocks"] += n
    return parts


def dense_counts(cfg):
    """What a program without any skipping does: every position, every slot, T x T pairs."""
    rows, T, slots = cfg.train.batch_size, cfg.data.seq_len, cfg.rows.image_slots
    return flops.Counts(text=rows * T, patches=rows * slots * cfg.model.num_patches, scored=rows * T,
                        images=rows * slots, pairs=rows * T * T)


def formula(cfg):
    """The formula at dense_counts. Two differences to a program, itemised: every position goes through the
    blocks once (patches replace tokens), and the head's columns are padded to a multiple of 128."""
    parts = objective.model_flops(cfg, dense_counts(cfg))
    parts["blocks"] = parts.pop("text matmuls")
    parts.pop("patch matmuls")
    parts["lm head"] *= cfg.model.padded_vocab_size / cfg.model.vocab_size
    return parts


def test_dense_step_equals_the_walk():
    cfg = small_config()
    walked, counted, m = by_part(cfg), formula(cfg), cfg.model
    # Gradients by latents and by the time's features are written down as well; the compiler leaves them out.
    patch_size, channels = m.adapter.patch_size, m.adapter.latent_channels
    per_slot = m.num_patches * patch_size**2 * channels + TIME_FEATURES
    counted["image adapter"] += 2.0 * m.d_model * per_slot * cfg.train.batch_size * cfg.rows.image_slots
    for part in ("blocks", "image adapter", "lm head"):
        assert walked[part] == pytest.approx(counted[part], rel=1e-12), part
    # Attention makes q k^T anew in its backward pass, from the logsumexp: seven products instead of six.
    assert walked["attention"] == pytest.approx(counted["attention"] * 7 / 6, rel=1e-12)


def test_full_remat_adds_a_forward_pass():
    """Recomputed: a layer's forward products but the last, the down matrix, whose result nothing needs."""
    cfg = small_config("full")
    m, walked, counted = cfg.model, by_part(cfg), formula(cfg)
    rows = cfg.train.batch_size * cfg.data.seq_len
    recomputed = 2.0 * rows * m.num_layers * (flops.block_params(m) - m.d_ff * m.d_model)
    assert walked["blocks"] == pytest.approx(counted["blocks"] + recomputed, rel=1e-12)
    assert walked["attention"] == pytest.approx(counted["attention"] * 9 / 6, rel=1e-12)


def test_parts_by_hand():
    cfg = small_config()
    parts = objective.model_flops(cfg, flops.Counts(text=10, patches=32, scored=7, images=2, pairs=100))
    block = 48 * 12 * (2 * 4 + 2 * 2) + 3 * 48 * 160
    assert parts == {
        "text matmuls": 6 * 3 * block * 10, "patch matmuls": 6 * 3 * block * 32, "lm head": 6 * 48 * 602 * 7,
        "image adapter": 10 * 20 * 48 * 32 + (4 * 256 * 48 + 6 * 48 * 48) * 2,
        "attention": 12 * 3 * 4 * 12 * 100}


def batch_of(segments, images, scored, starts, T):
    zeros = np.zeros((1, T), np.int32)
    return Batch(zeros[:, 0], zeros, np.array([segments]), np.array([images]), zeros,
                 np.array([scored], bool), np.zeros((1, 2, 8, 8, 5), np.float32), np.array([starts]),
                 np.zeros((1, 2), np.float32), np.zeros((1, 2, 2), np.uint32))


def test_counts_of_a_batch():
    cfg = small_config()
    segments, images = [1] * 6 + [2] * 3 + [0], [0, 0, 1, 1, 1, 0, 0, 0, 0, 0]
    batch = batch_of(segments, images, [1, 0, 0, 0, 0, 0, 1, 1, 0, 0], [2, 10], 10)
    counted = jax.device_get(packed.count(cfg.model, batch))
    assert counted == flops.Counts(text=6, patches=3, scored=3, images=1, pairs=21 + 3 + 6)
    causal = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, image_attention="causal"))
    assert packed.count(causal.model, batch).pairs == 21 + 6
    exact = flops.Counts(*(float(x) for x in counted))
    totals = jax.device_get(jax.jit(lambda batch: kind_of(cfg).totals(cfg, batch))(batch))
    assert totals == {"tokens": 9, "patches": 3, "images": 1, "flops": pytest.approx(
        sum(objective.model_flops(cfg, exact).values()), rel=1e-6)}  # summed in float32
    assert all(totals[name].dtype == np.int32 for name in ("tokens", "patches", "images"))


def test_pairs_beyond_int32():
    """A row of 70,000 positions has more than int32 counts, let alone a batch of them."""
    T, rows = 70_000, 2
    starts, ends = np.zeros((rows, T), np.int32), np.arange(1, T + 1, dtype=np.int32) + np.zeros((rows, 1), int)
    pairs = flops.visible_pairs(starts, ends, np.ones((rows, T), np.int32))
    assert float(pairs) == pytest.approx(rows * T * (T + 1) / 2, rel=1e-6)


def test_the_papers_sizes():
    """6 N D at N = all parameters; the paper's 7B is 6.74 B and the adapter, 0.3 % of it."""
    cfg = config.from_dict(transfusion.get_config("7b"))
    n = flops.num_params(unboxed(make_objective(cfg)))
    assert n == pytest.approx(6738.4e6 * 1.003, rel=1e-3)
    assert flops.six_n_d(n, 0.5e12) == pytest.approx(2.03e22, rel=5e-3)
