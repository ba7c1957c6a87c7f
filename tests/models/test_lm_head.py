"""The LM head's loss against its formula in numpy, in one piece and in chunks of the vocabulary.

B batch, T positions, D d_model, S scored positions, V padded vocabulary.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfusion import sharding
from tfusion.config import MeshConfig
from tfusion.models import lm_head

B, T, D, V = 3, 16, 8, 64


def random_inputs(seed: int, vocab: int, scale: float = 1.0):
    """(h_BTD, head_DV, tokens_BT, mask_BT): rows with unequal numbers of scored positions, one with none."""
    rng = np.random.default_rng(seed)
    h, head = rng.standard_normal((B, T, D)), scale * rng.standard_normal((D, V))
    mask = rng.random((B, T)) < np.array([[0.3], [0.0], [0.8]])
    mask[:, -1] = False
    return h.astype(np.float32), head.astype(np.float32), rng.integers(0, vocab, (B, T)), mask


def dense(h, head, targets, vocab: int):
    """-log softmax(h @ head)[target] over the real vocabulary."""
    z = (h @ head)[..., :vocab]
    return -jnp.take_along_axis(jax.nn.log_softmax(z), targets[..., None], -1)[..., 0]


CHUNKS = {"1": (V, 1), "2": (32, 2), "2 by a limit that does not divide": (40, 2), "4": (16, 4), "64": (1, 64)}


@pytest.mark.parametrize("vocab", [V, V - 3, 21])
@pytest.mark.parametrize("name", CHUNKS)
def test_cross_entropy_in_chunks_is_the_dense_one(name, vocab):
    """Value and gradients; the vocabulary's padding gets exactly none, also where a chunk is nothing else."""
    chunk, number = CHUNKS[name]
    h, head, tokens, _ = random_inputs(vocab, vocab)
    tokens[0, : min(T, vocab)] = np.arange(vocab)[-min(T, vocab):]  # the last ids too
    weights = np.random.default_rng(1).standard_normal((B, T))

    def total(fn):
        return jax.value_and_grad(lambda h, head: (weights * fn(h, head)).sum(), argnums=(0, 1))

    chunked = total(lambda h, head: lm_head.cross_entropy(h, head, tokens, vocab, chunk))
    value, grads = chunked(h, head)
    want, want_grads = total(lambda h, head: dense(h, head, tokens, vocab))(h, head)
    assert float(value) == pytest.approx(float(want), rel=1e-5)
    for got, wanted in zip(grads, want_grads):
        assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted)
    assert not np.asarray(grads[1])[:, vocab:].any()
    scans = [e.params["length"] for e in equations(jax.make_jaxpr(chunked)(h, head).jaxpr)
             if e.primitive.name == "scan"]
    assert scans == ([number] * 2 if number > 1 else [])  # forward and backward


@pytest.mark.parametrize("sizes, whole", [
    ((1, 1, 1, 1), 12 * V), ((1, 3, 1, 1), 4 * V), ((1, 3, 2, 1), 2 * V), ((1, 1, 1, 4), 3 * V)])
def test_logits_are_cut_by_their_size_on_one_device(monkeypatch, sizes, whole):
    """In one piece up to KEPT_LOGITS: rows are spread over fsdp, a row over sequence, ids over tensor."""
    targets, head = np.zeros((3, 4), np.int32), jax.ShapeDtypeStruct((D, V), jnp.float32)
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    with jax.set_mesh(mesh):
        monkeypatch.setattr(lm_head, "KEPT_LOGITS", whole)
        assert lm_head.chunk_size(targets, head) == V
        monkeypatch.setattr(lm_head, "KEPT_LOGITS", whole - 1)
        assert lm_head.chunk_size(targets, head) == lm_head.CHUNK


def test_scored_positions_are_spread_where_rows_are():
    """Each of four devices that share the rows makes a quarter of the logits, and the loss is the same."""
    h, head, tokens, mask = random_inputs(3, V)

    def loss(h, head):
        return lm_head.next_token_loss(h, head, tokens, mask, 13, V)[0]

    want, want_grads = jax.value_and_grad(loss, (0, 1))(h, head)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1, tensor=1, sequence=4), jax.devices()[:4])
    with jax.set_mesh(mesh):
        h = jax.device_put(h, jax.NamedSharding(mesh, sharding.spec("batch", "length", "hidden")))
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(h, head).compile()
        got, grads = compiled(h, head)
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    for a, b in zip(grads, want_grads):
        np.testing.assert_allclose(a, b, atol=1e-5)
    products = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", compiled.as_text())
    logits = [shape for shape in products if shape.endswith(f",{V}") and not shape.startswith(f"{D},")]
    assert logits and all(np.prod(list(map(int, shape.split(",")))) == B * 16 // 4 * V for shape in logits)


def test_large_logits_stay_finite():
    """Logits of +-1000, with the largest in any chunk."""
    h, head, tokens, _ = random_inputs(0, V, scale=400.0)
    z = np.einsum("btd,dv->btv", h.astype(np.float64), head.astype(np.float64))
    top = z.max(-1)
    hit = np.take_along_axis(z, tokens[..., None], -1)[..., 0]
    want = np.log(np.exp(z - top[..., None]).sum(-1)) + top - hit
    for chunk in (V, 16):
        np.testing.assert_allclose(lm_head.cross_entropy(h, head, tokens, V, chunk), want, rtol=1e-5, atol=2e-3)
    assert np.abs(z).max() > 1000


@pytest.mark.parametrize("one_piece", [lm_head.KEPT_LOGITS, 0])
@pytest.mark.parametrize("num_scored", [13, T, 2 * T])
def test_next_token_loss_is_next_token_cross_entropy(monkeypatch, num_scored, one_piece):
    """-log softmax(h[p] @ head)[tokens[p + 1]] over the mask, in float64, with the vocabulary's padding out."""
    vocab = V - 11
    h, head, tokens, mask = random_inputs(3, vocab, scale=3.0)
    assert 0 == mask[1].sum() < mask[0].sum() < mask[2].sum() <= 13
    total = 0.0
    for b, p in np.argwhere(mask):
        z = (h[b, p].astype(np.float64) @ head)[:vocab]
        total += np.log(np.exp(z - z.max()).sum()) + z.max() - z[tokens[b, p + 1]]
    monkeypatch.setattr(lm_head, "KEPT_LOGITS", one_piece)
    monkeypatch.setattr(lm_head, "CHUNK", 16)
    got, count = lm_head.next_token_loss(h, head, tokens, mask, num_scored, vocab)
    assert float(got) == pytest.approx(total, rel=1e-5) and int(count) == mask.sum()


def test_positions_that_are_not_scored_get_no_gradient():
    h, head, tokens, mask = random_inputs(4, V)
    grad = jax.grad(lambda h: lm_head.next_token_loss(h, head, tokens, mask, T, V)[0])(h)
    np.testing.assert_array_equal(np.abs(grad).sum(-1) > 0, mask)


@pytest.mark.parametrize("num_scored", [6, 9, 20])
def test_scored_positions(num_scored):
    """In order, then zeros that are not used."""
    mask = np.zeros((3, 9), bool)
    mask[0, [0, 3, 4, 8]], mask[1, [2, 5, 6, 7, 8, 1]] = True, True
    positions, used = lm_head.scored_positions(mask, num_scored)
    width = min(num_scored, 9)
    assert positions.shape == used.shape == (3, width)
    for row, want in enumerate(([0, 3, 4, 8], [1, 2, 5, 6, 7, 8], [])):
        assert positions[row].tolist() == want + [0] * (width - len(want))
        assert used[row].tolist() == [True] * len(want) + [False] * (width - len(want))


def equations(jaxpr):
    """Every equation, those of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("chunk, one_piece", [(V, 4 * 30 * V), (16, 4 * 30 * V - 1)])
def test_no_array_of_positions_times_vocabulary(monkeypatch, chunk, one_piece):
    """Of the loss and its gradient nothing is larger than scored positions x one chunk, or the head itself."""
    rows, length, scored = 4, 200, 30
    monkeypatch.setattr(lm_head, "KEPT_LOGITS", one_piece)
    monkeypatch.setattr(lm_head, "CHUNK", 16)
    shapes = (jax.ShapeDtypeStruct(s, t) for s, t in (
        ((rows, length, D), jnp.float32), ((D, V), jnp.float32), ((rows, length), jnp.int32),
        ((rows, length), jnp.bool_)))
    loss = jax.value_and_grad(
        lambda h, head, tokens, mask: lm_head.next_token_loss(h, head, tokens, mask, scored, V)[0], (0, 1))
    sizes = {v.aval.shape: v.aval.size for e in equations(jax.make_jaxpr(loss)(*shapes).jaxpr)
             for v in e.outvars}
    assert (rows, scored, chunk) in sizes  # the logits are seen
    assert max(sizes.values()) <= max(rows * scored * chunk, rows * length * D, D * V)
    assert max(sizes.values()) < rows * length * V
