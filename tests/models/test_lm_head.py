"""The LM head's loss against its formula in float64: any rows, any mesh, and no more work than is scored.

B batch, T positions, D d_model, V padded vocabulary, C positions of a chunk.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.planning import plans
from tfusion import config, sharding
from tfusion.config import MeshConfig
from tfusion.models import lm_head
from tfusion.models.adapters.linear import TIME_FEATURES
from tfusion.planning import compile

B, T, D, V = 4, 32, 8, 64
VOCAB = V - 11
MESHES = {  # data, fsdp, tensor, sequence
    "one": (1, 1, 1, 1), "data2-fsdp2-tensor2": (2, 2, 2, 1), "fsdp4": (1, 4, 1, 1), "tensor8": (1, 1, 8, 1),
    "fsdp8 for 4 rows": (1, 8, 1, 1), "data4-tensor2": (4, 1, 2, 1), "fsdp2-tensor2-sequence2": (1, 2, 2, 2),
    "sequence4": (1, 1, 1, 4), "data2-sequence4": (2, 1, 1, 4), "sequence8": (1, 1, 1, 8)}


pytestmark = pytest.mark.usefixtures("quick_compiles")


def random_mask(seed: int):
    """Rows with very unequal numbers of scored positions: some, none, all but the last, one."""
    mask = np.random.default_rng(seed).random((B, T)) < np.array([[0.4], [0.0], [1.0], [0.0]])
    mask[3, T // 2 - 1] = True  # the last of a device's part
    mask[:, -1] = False
    return mask


MASKS = {"unequal": random_mask(0), "none": np.zeros((B, T), bool),
         "one row": np.arange(B)[:, None] * np.ones(T) == 2, "all": np.ones((B, T), bool)}
for whole in ("one row", "all"):
    MASKS[whole][:, -1] = False


def random_inputs(seed: int, scale: float = 1.0, dtype=np.float32):
    """(h_BTD, head_DV, tokens_BT); the head's padding is not zero."""
    rng = np.random.default_rng(seed)
    h, head = rng.standard_normal((B, T, D)), scale * rng.standard_normal((D, V))
    return h.astype(dtype), head.astype(np.float32), rng.integers(0, VOCAB, (B, T))


def dense(h, head, tokens, mask):
    """(loss, gradient of h, gradient of the head) of -log softmax(h[p] @ head)[tokens[p + 1]] in float64."""
    h, head = np.float64(h), np.float64(head)[:, :VOCAB]
    z = h @ head
    e = np.exp(z - z.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    hit = np.eye(VOCAB)[np.roll(tokens, -1, axis=1)]
    dz = mask[..., None] * (p - hit)
    nll = np.log(e.sum(-1)) + z.max(-1) - (z * hit).sum(-1)
    return (mask * nll).sum(), dz @ head.T, np.pad(np.einsum("btd,btv->dv", h, dz), ((0, 0), (0, V - VOCAB)))


def loss_and_gradients():
    """A jitted step: h, head, tokens, mask, weight -> ((weight * sum, count), gradients)."""
    def loss(h, head, tokens, mask, weight=1.0):
        total, count = lm_head.next_token_loss(h, head, tokens, mask, VOCAB)
        return weight * total, count

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def on_mesh(sizes):
    return jax.set_mesh(sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)]))


def small_chunks(monkeypatch, chunk: int = 3):
    monkeypatch.setattr(lm_head, "chunk_size", lambda num_positions, vocab: min(chunk, num_positions))


def assert_near(got, want, rtol):
    assert np.linalg.norm(np.float64(got) - want) <= rtol * np.linalg.norm(want)


# ---------------------------------------------------------------- the numbers

@pytest.mark.parametrize("chunk", [3, 32, 128])
def test_loss_and_gradients_are_the_dense_ones(monkeypatch, chunk):
    """Whatever is scored; the vocabulary's padding and what is not scored get exactly no gradient."""
    small_chunks(monkeypatch, chunk)
    inputs, step = random_inputs(1), loss_and_gradients()
    plain = jax.jit(lambda *x: lm_head.next_token_loss(*x, VOCAB))  # no gradient asked for
    for name, mask in MASKS.items():
        (total, count), (dh, dhead) = step(*inputs, mask, 0.25)
        want, want_dh, want_dhead = dense(*inputs, mask)
        assert (int(count), float(total)) == (mask.sum(), pytest.approx(want / 4, rel=1e-5)), name
        assert_near(dh, want_dh / 4, 1e-5)
        assert_near(dhead, want_dhead / 4, 1e-5)
        np.testing.assert_array_equal(np.abs(dh).sum(-1) > 0, mask)
        assert not np.asarray(dhead)[:, VOCAB:].any()
        total, count = plain(*inputs, mask)
        assert (int(count), float(total)) == (mask.sum(), pytest.approx(want, rel=1e-5)), name


@pytest.mark.parametrize("name", MESHES)
def test_the_same_on_any_mesh(monkeypatch, name):
    """Rows, positions and vocabulary split, each device with another number of chunks; a head split by fsdp."""
    small_chunks(monkeypatch)
    inputs, mask = random_inputs(2), MASKS["unequal"]
    want, want_dh, want_dhead = dense(*inputs, mask)
    with on_mesh(MESHES[name]):
        h, head, tokens = inputs
        split = jax.NamedSharding(jax.sharding.get_mesh(), sharding.spec("embed", "vocab"))
        head = jax.device_put(head, split)
        (total, count), (dh, dhead) = loss_and_gradients()(h, head, tokens, mask, 3.0)
        alone, _ = jax.jit(lambda *x: lm_head.next_token_loss(*x, VOCAB))(h, head, tokens, mask)
    assert (int(count), float(total)) == (mask.sum(), pytest.approx(3 * want, rel=1e-5))
    assert float(alone) == pytest.approx(want, rel=1e-5)
    assert_near(dh, 3 * want_dh, 1e-5)
    assert_near(dhead, 3 * want_dhead, 1e-5)


def test_large_logits_stay_finite(monkeypatch):
    """Logits beyond +-1000, of which float32 has no exponential, wherever the largest lies."""
    small_chunks(monkeypatch)
    inputs, mask = random_inputs(0, scale=400.0), MASKS["all"]
    want, want_dh, _ = dense(*inputs, mask)
    assert np.abs(np.float64(inputs[0]) @ np.float64(inputs[1])).max() > 1000
    for name in ("one", "tensor8"):
        with on_mesh(MESHES[name]):
            (total, _), (dh, dhead) = loss_and_gradients()(*inputs, mask)
        assert float(total) == pytest.approx(want, rel=1e-5)
        assert np.isfinite(dhead).all()
        assert_near(dh, want_dh, 1e-3)


def test_bfloat16_loses_what_rounding_its_inputs_loses(monkeypatch):
    """The sum over chunks and the logits are float32: the loss is the float64 one of the rounded inputs."""
    small_chunks(monkeypatch)
    h, head, tokens = random_inputs(5, dtype=jnp.bfloat16)
    (total, _), (dh, dhead) = loss_and_gradients()(h, head, tokens, MASKS["all"])
    want, want_dh, want_dhead = dense(h, head.astype(jnp.bfloat16), tokens, MASKS["all"])
    assert float(total) == pytest.approx(want, rel=1e-5)
    assert (dh.dtype, dhead.dtype) == (jnp.bfloat16, jnp.float32)
    assert_near(dh, want_dh, 2**-7)
    assert_near(dhead, want_dhead, 2**-7)


# ---------------------------------------------------------------- codes, and z-loss

FIRST_CODE, Z = 20, 0.05
SCORING = lm_head.Scoring(VOCAB, Z, FIRST_CODE)


def dense_parts(h, head, tokens, mask):
    """({name: (sum, count)}, gradients of token_loss), float64."""
    z = np.float64(h) @ np.float64(head)[:, :VOCAB]
    log_z = np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1)) + z.max(-1)
    target = np.roll(tokens, -1, axis=1)
    nll, code = log_z - np.take_along_axis(z, target[..., None], -1)[..., 0], target >= FIRST_CODE
    p, hit = np.exp(z - log_z[..., None]), np.eye(VOCAB)[target]
    dz = mask[..., None] * (p - hit + 2 * Z * log_z[..., None] * p)
    dhead = np.pad(np.einsum("btd,btv->dv", np.float64(h), dz), ((0, 0), (0, V - VOCAB)))
    parts = {"token_loss": (nll + Z * log_z**2, mask), "lm_loss": (nll, mask & ~code),
             "code_loss": (nll, mask & code), "z_loss": (log_z**2, mask)}
    return ({name: ((x * m).sum(), m.sum()) for name, (x, m) in parts.items()},
            (dz @ np.float64(head)[:, :VOCAB].T, dhead))


def token_losses(h, head, tokens, mask):
    losses = lm_head.token_losses(h, head, tokens, mask, SCORING)
    return 0.25 * losses["token_loss"][0] + sum(losses[name][0] for name in list(losses)[1:]), losses


@pytest.mark.parametrize("name", ["one", "tensor8", "fsdp2-tensor2-sequence2", "sequence8"])
def test_losses_of_text_and_codes_are_the_dense_ones(monkeypatch, name):
    """token_loss alone has a gradient, of its z-loss too, though the others are asked for theirs."""
    small_chunks(monkeypatch)
    inputs = random_inputs(7)
    with on_mesh(MESHES[name]):
        step, plain = jax.jit(jax.value_and_grad(token_losses, (0, 1), has_aux=True)), jax.jit(token_losses)
        for mask in (MASKS["unequal"], MASKS["none"]):
            want, (dh, dhead) = dense_parts(*inputs, mask)
            (_, got), (got_dh, got_dhead) = step(*inputs, mask)
            for losses in (got, plain(*inputs, mask)[1]):
                assert losses.keys() == want.keys()
                for loss, (total, count) in want.items():
                    assert int(losses[loss][1]) == count
                    assert float(losses[loss][0]) == pytest.approx(total, rel=1e-5), loss
            assert_near(got_dh, dh / 4, 1e-5)
            assert_near(got_dhead, dhead / 4, 1e-5)
    assert 0 < dense_parts(*inputs, MASKS["unequal"])[0]["code_loss"][1] < MASKS["unequal"].sum()


# ---------------------------------------------------------------- the work

@pytest.mark.parametrize("positions, vocab, want", [
    (1, 64, 1), (63, 64, 63), (64, 1024, 64), (512, 1024, 64), (2048, 8320, 256), (2048 + 64 * 8, 8320, 320),
    (4096, 32128, 512), (4 * 4096, 32128, 1024), (4 * 4096, 32128 // 4, 2048), (2**20, 2**18, 128),
    (2**20, 2**26, 64)])
def test_chunk_size(positions, vocab, want):
    """An eighth of the positions, in tiles of 64, at most 2^25 logits; a tile at least, or all there are."""
    assert lm_head.chunk_size(positions, vocab) == want


@pytest.mark.parametrize("count, chunk, want", [(0, 8, 0), (1, 8, 1), (8, 8, 1), (9, 8, 2), (31 * 8, 8, 31)])
def test_num_chunks(count, chunk, want):
    assert lm_head.num_chunks(count, chunk) == want


@pytest.mark.parametrize("name", ["one", "fsdp4", "tensor8", "fsdp2-tensor2-sequence2"])
def test_chunks_run_as_many_as_are_scored(monkeypatch, name):
    """Each device runs the chunks that its own scored positions fill, whatever the others run."""
    small_chunks(monkeypatch)
    ran, chunk = [], lm_head._chunk

    def counted(*args):
        jax.debug.callback(lambda: ran.append(1))
        return chunk(*args)

    monkeypatch.setattr(lm_head, "_chunk", counted)
    data, fsdp, tensor, sequence = MESHES[name]
    step = loss_and_gradients()
    for mask in MASKS.values():
        ran.clear()
        with on_mesh(MESHES[name]):
            jax.block_until_ready(step(*random_inputs(3), mask))
            jax.effects_barrier()
        counts = mask.reshape(data * fsdp, -1, sequence, T // sequence).sum((1, 3))
        assert len(ran) == tensor * sum(-(-n // 3) for n in counts.ravel())


def equations(jaxpr):
    """Every equation, those of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def products(jaxpr):
    """[(dtypes of the operands, dtype of the result, shape of the result)] of every matrix product."""
    return [({v.aval.dtype.name for v in e.invars}, e.outvars[0].aval.dtype.name, e.outvars[0].aval.shape)
            for e in equations(jaxpr) if e.primitive.name == "dot_general"]


def traced(dtype, rows: int = 4, length: int = 256, gradients: bool = True, losses=None):
    shapes = [jax.ShapeDtypeStruct(s, t) for s, t in (
        ((rows, length, D), dtype), ((D, V), jnp.float32), ((rows, length), jnp.int32), ((rows, length), bool))]

    def loss(*x):
        return losses(*x)[0] if losses else lm_head.next_token_loss(*x, VOCAB)[0]

    return jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)) if gradients else loss)(*shapes).jaxpr


def test_three_products_a_chunk_and_one_without_gradients():
    """A logit is made once; nothing is larger than h, the head, or one chunk of logits."""
    C = lm_head.chunk_size(4 * 256, V)
    for losses in (None, token_losses):
        assert [shape for *_, shape in products(traced(jnp.float32, losses=losses))] == [(C, V), (C, D), (D, V)]
    assert [shape for *_, shape in products(traced(jnp.float32, gradients=False))] == [(C, V)]
    largest = max(v.aval.size for e in equations(traced(jnp.float32)) for v in e.outvars)
    assert largest == max(4 * 256 * D, D * V, C * V) < 4 * 256 * V


def test_bfloat16_products_are_of_bfloat16():
    """Logits leave their product in float32; their cotangent enters both backward products in bfloat16. The
    head's gradient is summed over chunks in float32."""
    bfloat16 = {"bfloat16"}
    C = lm_head.chunk_size(4 * 256, V)
    assert products(traced(jnp.bfloat16)) == [
        (bfloat16, "float32", (C, V)), (bfloat16, "bfloat16", (C, D)), (bfloat16, "float32", (D, V))]


def test_decoding_takes_logits_in_float32():
    shapes = jax.ShapeDtypeStruct((3, D), jnp.bfloat16), jax.ShapeDtypeStruct((D, V), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda h, head: lm_head.logits(h, head, VOCAB))(*shapes).jaxpr
    assert products(jaxpr) == [({"bfloat16"}, "float32", (3, V))]


def test_devices_that_share_rows_share_the_work():
    """Compiled for a row on four devices: each makes logits of its own positions, by chunks of their number."""
    h, head, tokens = random_inputs(3)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1, tensor=1, sequence=4), jax.devices()[:4])
    with jax.set_mesh(mesh):
        h = jax.device_put(h, jax.NamedSharding(mesh, sharding.spec("batch", "length", "hidden")))
        text = jax.jit(jax.grad(lambda *x: lm_head.next_token_loss(*x, VOCAB)[0], (0, 1))).lower(
            h, head, tokens, MASKS["all"]).compile().as_text()
    logits = {shape for shape in re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)
              if shape.endswith(f",{V}") and not shape.startswith(f"{D},")}
    assert logits == {f"{lm_head.chunk_size(B * T // 4, V)},{V}"} == {f"{B * T // 4},{V}"}


def test_no_product_of_a_bfloat16_step_mixes_types():
    """Lowered, forward and backward: float32 leaves the products that make logits, the image adapter's estimate
    and gradients of weights, and no others; none takes float32 and bfloat16."""
    cfg = plans.small_config(batch_size=2, d_model=96, text_vocab_size=700)
    cfg = config.changed(cfg, {"model.adapter.latent_channels": 5})
    with jax.set_mesh(sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])):
        step = compile.trace(cfg, compile.abstract_state(cfg), jax.sharding.get_mesh())
    found = re.findall(r"dot_general.*: \(tensor<\S+x(\w+)>, tensor<\S+x(\w+)>\) -> tensor<(\S+)x(\w+)>",
                       step.lower().as_text())
    assert len(found) > 20
    assert {(lhs, rhs) for lhs, rhs, *_ in found} == {("bf16", "bf16"), ("f32", "f32")}  # float32: attention's
    V, P = cfg.model.padded_vocab_size, cfg.model.adapter.patch_values
    C = lm_head.chunk_size(2 * cfg.data.seq_len, V)
    patches = f"2x{cfg.rows.image_slots}x{cfg.model.num_patches}"
    wide = {shape for lhs, _, shape, out in found if (lhs, out) == ("bf16", "f32")}
    F, D = cfg.model.d_ff, 96
    weights = {f"{D}x{n}" for n in (D, F, P, TIME_FEATURES)} | {f"{F}x{D}", f"{P}x{D}"}
    assert wide == {f"{C}x{V}", f"{D}x{V}", f"{patches}x{P}"} | weights
    low = {shape for lhs, _, shape, out in found if (lhs, out) == ("bf16", "bf16")}
    assert {f"{C}x{D}", f"{2 * cfg.data.seq_len}x{F}"} <= low
