"""The Transfusion objective: noise, the two losses and their counts.

B batch, T tokens, V vocabulary, I image slots, h w c latent.
"""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments import quickstart
from tests.conftest import replace, with_shares
from tfusion import config
from tfusion.data import packing, pipeline
from tfusion.data.layout import image, text
from tfusion.diffusion import losses as diffusion_losses
from tfusion.diffusion.process import ddpm
from tfusion.models.transfusion import Transfusion
from tfusion.objectives import kind_of, make_objective, packed
from tfusion.objectives.base import Aux
from tfusion.types import BOS, EOS, PAD, Batch, Document

NO_AUX = Aux(0, {}, {})


pytestmark = pytest.mark.usefixtures("quick_compiles")


@functools.partial(jax.jit, static_argnums=0)
def draw_jitted(process, seed, ids, max_t):
    return diffusion_losses.draw_noise(process, jax.random.key(seed), ids, max_t, (2, 2, 3))


def draw(rows, max_t, seed: int = 0, num_timesteps: int = 1000):
    """(t, eps) of rows with these limits; max_t of shape (rows, slots), or one limit for 3 slots."""
    max_t = np.broadcast_to(max_t, (len(rows), 3) if np.ndim(max_t) < 2 else np.shape(max_t))
    ids = packing.noise_ids(rows, max_t.shape[1])
    out = draw_jitted(ddpm("eps", num_timesteps), seed, ids, max_t.astype(np.float32))
    return tuple(np.asarray(x) for x in out)


def test_noise_is_keyed_by_global_row_and_slot():
    """Permuted, regrouped or with fewer slots, a row gets the same t and the same noise, bit for bit."""
    rows = np.array([7, 1000, 3, 250_000])
    t, eps = draw(rows, 1.0)
    backwards_t, backwards_eps = draw(rows[::-1], 1.0)
    np.testing.assert_array_equal(backwards_t, t[::-1])
    np.testing.assert_array_equal(backwards_eps, eps[::-1])
    for pair in ([0, 1], [3, 1], [2, 0]):
        part_t, part_eps = draw(rows[pair], np.ones((2, 2)))
        np.testing.assert_array_equal(part_t, t[pair, :2])
        np.testing.assert_array_equal(part_eps, eps[pair, :2])


ROWS = np.arange(3000)


def test_noise_differs_between_rows_slots_and_keys():
    """No two of (row, slot, key) share a draw, and their elements do not correlate."""
    (t, eps), (other_t, other_eps) = (draw(ROWS, 1.0, seed) for seed in (0, 1))
    streams = np.concatenate([eps, other_eps], axis=1).reshape(len(ROWS), 6, 12)
    assert len(np.unique(streams.reshape(-1, 12), axis=0)) == 6 * len(ROWS)
    correlation = np.corrcoef(streams.transpose(1, 2, 0).reshape(72, -1))
    np.testing.assert_allclose(correlation, np.eye(72), atol=0.1)
    correlation = np.corrcoef(np.concatenate([t, other_t], axis=1).T)
    np.testing.assert_allclose(correlation, np.eye(6), atol=0.1)


def test_noise_is_standard_normal_and_independent_of_t():
    t, eps = draw(ROWS, 1.0)
    assert abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02
    assert abs(np.corrcoef(t.ravel(), eps[..., 0, 0, 0].ravel())[0, 1]) < 0.05
    np.testing.assert_allclose(np.quantile(t, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.02)


@pytest.mark.parametrize("num_timesteps", [10, 1000])
@pytest.mark.parametrize("max_t", [1.0, 0.5, 0.2, 0.0])
def test_t_stays_within_its_limit_and_on_the_grid(max_t, num_timesteps):
    """0 < t <= max_t on the grid n / num_timesteps, reaching both ends; max_t = 0 stays clean."""
    t = draw(ROWS, max_t, num_timesteps=num_timesteps)[0]
    n = t * num_timesteps
    np.testing.assert_allclose(n, np.round(n), atol=1e-3)
    assert t.max() <= max_t + 1e-6 and (t > 0).all() == (max_t > 0)
    if max_t:
        assert n.min() < 1.5 + 0.01 * num_timesteps and t.max() > 0.97 * max_t


@pytest.mark.parametrize("u, expected", [(0.0, 0.5), (1 - 2**-24, 0.001)])
def test_t_is_never_zero_at_the_ends_of_u(monkeypatch, u, expected):
    """u is in [0, 1): its 0 must become the largest t, not the clean t = 0 of a slot without loss."""
    monkeypatch.setattr(jax.random, "uniform", lambda key: jnp.float32(u))
    limit = np.full((2, 1), 0.5, np.float32)
    ids = packing.noise_ids(np.arange(2), 1)
    t, _ = diffusion_losses.draw_noise(ddpm("eps", 1000), jax.random.key(0), ids, limit, (1,))
    np.testing.assert_allclose(t, expected, rtol=1e-5)


def test_max_t_belongs_to_its_slot():
    t = draw(ROWS, np.tile([1.0, 0.0, 0.25], (len(ROWS), 1)))[0]
    assert t[:, 0].max() > 0.9 and (t[:, 1] == 0).all() and 0.2 < t[:, 2].max() <= 0.25


def random_images(seed: int, rows: int = 6, slots: int = 4):
    rng = np.random.default_rng(seed)
    prediction, target = (rng.standard_normal((rows, slots, 2, 2, 3)).astype(np.float32) for _ in range(2))
    max_t = np.where(rng.random((rows, slots)) < 0.3, 0, rng.choice([0.5, 1.0], (rows, slots)))
    t = np.ceil(1000 * max_t * (1 - rng.random((rows, slots)))) / 1000
    return prediction, target, t.astype(np.float32), max_t.astype(np.float32)


def test_diffusion_loss_is_squared_error_per_element_of_scored_slots():
    prediction, target, t, max_t = random_images(0)
    losses = diffusion_losses.diffusion_losses(*map(jnp.asarray, (prediction, target, t, max_t)))
    total, count = losses["diffusion_loss"]
    errors = [((prediction[b, i] - target[b, i]).astype(np.float64) ** 2).sum()
              for b, i in np.ndindex(*t.shape) if max_t[b, i] > 0]
    assert float(total) == pytest.approx(sum(errors), rel=1e-5)
    assert float(count) == len(errors) * 12


@pytest.mark.parametrize("seed", range(3))
def test_bins_add_up_to_the_whole(seed):
    losses = diffusion_losses.diffusion_losses(*map(jnp.asarray, random_images(seed)))
    bins = [losses[f"diffusion_loss_bin{i}"] for i in range(diffusion_losses.NUM_BINS)]
    for whole, parts in zip(losses["diffusion_loss"], zip(*bins)):
        assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-5)


def test_each_bin_holds_its_fifth_of_t():
    """Bin i holds i/5 < t <= (i + 1)/5; the borders n/1000 on float32 included."""
    t = np.float32([0.001, 0.2, 0.201, 0.4, 0.401, 0.6, 0.601, 0.8, 0.801, 1.0])[None]
    prediction, target = np.zeros((1, 10, 1, 1, 1), np.float32), np.ones((1, 10, 1, 1, 1), np.float32)
    losses = diffusion_losses.diffusion_losses(*map(jnp.asarray, (prediction, target, t, np.ones_like(t))))
    assert [float(losses[f"diffusion_loss_bin{i}"][1]) for i in range(5)] == [2.0] * 5


def row_format(cfg, seq_len: int, slots: int):
    """cfg's, of so many positions and image slots."""
    data = SimpleNamespace(seq_len=seq_len, image_slots=lambda num_patches: slots)
    return cfg.rows._replace(data=data)


def small_batch(cfg):
    """Three documents on two rows: pictures with one free slot each, one clean picture (max_t = 0)."""
    rng = np.random.default_rng(0)
    pictures = [image(rng.standard_normal(cfg.model.latent_shape).astype(np.float32)) for _ in range(3)]
    documents = [Document((text([5, 6]), pictures[0])), Document((pictures[1],), score_text=False),
                 Document((text([9]), pictures[2]._replace(max_t=0.5)))]
    form = row_format(cfg, 24, 3)
    examples = [form.layout.lay(document) for document in documents]
    batch = packing.stack_rows([packing.pack_row(row, these, form)
                                for row, these in enumerate((examples[:2], examples[2:]))])
    max_t = batch.max_t_BI.copy()
    max_t[0, 1] = 0
    return batch._replace(max_t_BI=max_t)


def jitted_loss(objective):
    return jax.jit(lambda params, batch, key: objective.loss(params, NO_AUX, batch, key))


@functools.cache
def tiny():
    """(cfg, objective, jitted loss(params, batch, key), params without a zero matrix), compiled once."""
    tree = quickstart.get_config("smoke")
    tree.model.update(num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, d_ff=32)
    tree.model.adapter.update(latent_size=4, latent_channels=4)
    cfg = config.from_dict(tree)
    obj = make_objective(cfg)
    params = jax.tree.map(lambda x: x + 0.1, jax.jit(obj.init)(jax.random.key(0)))
    return cfg, obj, jitted_loss(obj), params


def test_loss_counts_are_the_objectives_counts():
    """The step divides by `counts`, summed before any micro-batch runs: the data alone decides them."""
    cfg, obj, loss, params = tiny()
    batch = small_batch(cfg)
    losses, counts = loss(params, batch, jax.random.key(1)), obj.counts(batch)
    assert set(counts) == set(obj.weights)
    for name, count in counts.items():
        assert float(losses[name][1]) == float(count) > 0
    assert counts["lm_loss"] == (batch.loss_mask_BT).sum()
    assert counts["diffusion_loss"] == 2 * 4 * 4 * 4  # two pictures of three have a loss


def test_counts_beyond_int32(cfg):
    """A large batch of many small patches has more latent elements than int32 counts."""
    row = np.ones((300_000, 1), np.float32)
    zeros = np.broadcast_to(np.float32(0), (*row.shape, 32, 32, 8))
    big = Batch(*[None] * len(Batch._fields))._replace(
        loss_mask_BT=row > 0, max_t_BI=row, latents_BIhwc=zeros)
    assert float(make_objective(cfg).counts(big)["diffusion_loss"]) == 300_000 * 8192


def test_loss_counts_are_the_objectives_counts_on_real_rows(cfg):
    obj = make_objective(cfg)
    batch = next(pipeline.batches(kind_of(cfg).open_rows(cfg), 0, 1, 8))
    counts = obj.counts(batch)
    assert counts["lm_loss"] == sum(row.sum() for row in batch.loss_mask_BT)
    assert counts["diffusion_loss"] == (batch.image_start_BI < cfg.data.seq_len).sum() * 64


def test_unused_and_clean_slots_contribute_nothing():
    """An unused slot may hold any latent; a clean picture (max_t = 0) has no loss of its own."""
    cfg, _, loss, params = tiny()
    batch = small_batch(cfg)
    unused = (batch.image_start_BI == 24)[..., None, None, None]
    assert 0 < unused.sum() < unused.size
    other = batch._replace(latents_BIhwc=np.where(unused, 3.0, batch.latents_BIhwc).astype(np.float32))
    for name, (total, count) in loss(params, batch, jax.random.key(1)).items():
        other_total, other_count = loss(params, other, jax.random.key(1))[name]
        assert float(other_total) == float(total) and float(other_count) == float(count)


def test_rows_add_up():
    """(sum, count) of two rows = those of each row alone: what micro-batches and hosts rely on."""
    cfg, _, loss, params = tiny()
    batch, key = small_batch(cfg), jax.random.key(2)
    both = loss(params, batch, key)
    alone = [loss(params, Batch(*(x[[i, i]] for x in batch)), key) for i in (0, 1)]  # twice: same shapes
    for name in both:
        for whole, first, second in zip(both[name], *(each[name] for each in alone)):
            assert float(whole) == pytest.approx((float(first) + float(second)) / 2, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_loss_noises_what_the_contract_says(cfg, prediction, monkeypatch):
    """The model is shown add_noise(latents, eps, alphabar(t)) and t; its output is held against the
    target. A fake model returns x_t itself, so the loss is known in closed form."""
    cfg = replace(cfg, "process", prediction=prediction)
    m = cfg.model

    def fake_apply(self, variables, batch=None, x_t=None, t=None, method=None):
        if method == "lm_head":
            return jnp.zeros((m.d_model, m.padded_vocab_size))
        return jnp.zeros((*batch.tokens_BT.shape, m.d_model)), x_t

    monkeypatch.setattr(Transfusion, "apply", fake_apply)
    batch, key = small_batch(cfg), jax.random.key(4)
    got = jitted_loss(make_objective(cfg))({}, batch, key)
    t, eps = jax.jit(diffusion_losses.draw_noise, static_argnums=(0, 4))(
        ddpm(prediction, cfg.process.num_timesteps), key, batch.noise_ids_BI2, batch.max_t_BI,
        cfg.model.latent_shape)
    t, eps = np.asarray(t, np.float64)[..., None, None, None], np.asarray(eps)
    a = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    x_t = np.sqrt(a) * batch.latents_BIhwc + np.sqrt(1 - a) * eps
    target = {"eps": eps, "v": np.sqrt(a) * eps - np.sqrt(1 - a) * batch.latents_BIhwc,
              "x0": batch.latents_BIhwc}[prediction]
    expected = ((x_t - target) ** 2)[batch.max_t_BI > 0].sum()
    assert float(got["diffusion_loss"][0]) == pytest.approx(expected, rel=1e-4)
    assert float(got["lm_loss"][0] / got["lm_loss"][1]) == pytest.approx(np.log(m.vocab_size), rel=1e-5)


@pytest.mark.parametrize("patch_size, image_share, slots", [
    (2, 0.5, 4), (2, 0.0, 0), *(pytest.param(*x, marks=pytest.mark.slow) for x in (
        (1, 0.5, 1), (4, 0.5, 10), (8, 0.5, 20)))])
def test_every_patch_size_trains(cfg, patch_size, image_share, slots):
    """Image slots follow from the patch size; every parameter that the row can reach gets a gradient. Text
    alone has no slot."""
    cfg = replace(replace(cfg, "model", num_layers=1), "model.adapter", latent_size=8, patch_size=patch_size)
    cfg = replace(cfg, "data", seq_len=96, image_share=image_share)
    assert cfg.rows.image_slots == slots
    made, picture = make_objective(cfg), image(np.ones(cfg.model.latent_shape, np.float32))
    parts = [text([5, 6]), picture, text([7])] if slots else [text([5, 6])]
    rows = [packing.pack_row(i, [cfg.rows.layout.lay(Document(tuple(parts)))], cfg.rows) for i in range(2)]
    batch = packing.stack_rows(rows)
    packing.check_batch(batch, cfg.vocabulary)

    def total(params):
        losses = made.loss(params, NO_AUX, batch, jax.random.key(0))
        return sum(losses[name][0] for name in made.weights)

    grads = jax.jit(jax.grad(total))(nn.meta.unbox(made.init(jax.random.key(1))))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    assert bool(grads["image_adapter"]["patch_out_kernel"].any()) == (slots > 0)
    assert grads["lm_head_kernel"].any()


def test_weights_are_one_and_lambda(cfg):
    cfg = dataclasses.replace(cfg, loss_weight=7.5)
    assert make_objective(cfg).weights == {"lm_loss": 1.0, "diffusion_loss": 7.5}


def test_the_layout_is_of_the_models_ids(cfg):
    """BOI and EOI stand above every text id, an image has the model's patches; EOS closes the document."""
    picture = image(np.zeros(cfg.model.latent_shape))
    example = cfg.rows.layout.lay(Document((text([5]), picture)))
    assert cfg.model.vocab_size == cfg.vocabulary.vocab_size == 262
    assert example.tokens_L.tolist() == [BOS, 5, 260, PAD, PAD, PAD, PAD, 261, EOS]


@pytest.mark.parametrize("shares", [dict(scenes=1.0), dict(scenes=0.5, glosses=0.5)], ids=["pictures", "mixed"])
def test_what_plans_expect_is_about_what_batches_hold(cfg, shares):
    """Of full rows, so a little more; where data.image_share is the data's own."""
    cfg = replace(with_shares(cfg, **shares), "data", caption_dropout=0.0)
    kind = kind_of(cfg)
    batches = list(pipeline.batches(kind.open_rows(cfg), 0, 8, 8))
    totals = [jax.device_get(kind.totals(cfg, batch)) for batch in batches]
    counts = [jax.device_get(packed.count(cfg.model, batch)) for batch in batches]
    expected = kind.expected(cfg)

    def mean(name, of):
        return np.mean([float(each[name] if isinstance(each, dict) else getattr(each, name)) for each in of])

    assert expected.positions == 8 * cfg.data.seq_len
    for name, value, real in (("tokens", expected.positions, mean("tokens", totals)),
                              ("scored", expected.scored, mean("scored", counts)),
                              ("pairs", expected.pairs, mean("pairs", counts)),
                              ("flops", sum(expected.flops.values()), mean("flops", totals))):
        assert 0.8 < real / value < 1.05, name
