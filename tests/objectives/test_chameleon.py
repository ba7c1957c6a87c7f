"""The Chameleon objective: what is scored, what is seen, the losses in float64, and its rows.

B rows, T positions, N codes per image.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.codes import K, N
from tests.conftest import replace, tiny_chameleon
from tests.models.test_transformer import assert_close, plain
from tfusion import config, sharding
from tfusion.config import MeshConfig
from tfusion.data import layout, packing, pipeline
from tfusion.errors import UserError
from tfusion.models.language import LanguageModel
from tfusion.models.masks import dense_mask, row_sight
from tfusion.objectives import chameleon as objective
from tfusion.objectives import kind_of, make_objective, packed
from tfusion.objectives.base import Aux
from tfusion.types import BOS, EOS, Document

NO_AUX = Aux(0, {}, {})
CFG = tiny_chameleon("unused", **{"z_loss_weight": 0.01})
V, CODE, T = CFG.model.text_vocab_size, CFG.vocabulary.first_code, CFG.data.seq_len
BOI, EOI = V, V + 1


pytestmark = pytest.mark.usefixtures("quick_compiles")


def picture(seed: int):
    return layout.image(np.random.default_rng(seed).integers(0, K, (4, 4), np.int32))


DOCUMENTS = [  # caption first; caption dropped; two pictures; text alone
    Document((layout.text([5, 6, 7]), picture(0))), Document((picture(1),), score_text=False),
    Document((picture(2), layout.text([8]), picture(3))), Document((layout.text([9, 10, 11, 12]),))]


def batch_of(*rows):
    """Rows of documents, packed."""
    lay = CFG.rows.layout.lay
    packed_rows = [packing.pack_row(k, list(map(lay, row)), CFG.rows) for k, row in enumerate(rows)]
    return packing.stack_rows(packed_rows)


BATCH = batch_of(DOCUMENTS, DOCUMENTS[::-1])


@functools.cache
def params():
    """Every parameter random, so large that log Z is far from 0."""
    shapes = nn.unbox(jax.eval_shape(make_objective(CFG).init, jax.random.key(0)))
    rng = np.random.default_rng(1)
    return jax.tree_util.tree_map_with_path(lambda path, x: np.float32(rng.standard_normal(x.shape) * (
        x.shape[-2] ** -0.5 if path[-1].key.endswith("kernel") else 1)), shapes)


def losses(batch):
    return jax.device_get(jax.jit(make_objective(CFG).loss)(params(), NO_AUX, batch, jax.random.key(0)))


def test_what_is_scored():
    """Targets: BOS, pad, BOI where a caption was dropped, and EOI are nobody's; every code is somebody's."""
    example = CFG.rows.layout.lay(DOCUMENTS[0])
    targets = example.tokens_L[1:][example.loss_mask_L[:-1]]
    codes = CODE + DOCUMENTS[0].parts[1].values.ravel()
    assert targets.tolist() == [5, 6, 7, BOI, *codes, EOS]
    dropped = CFG.rows.layout.lay(DOCUMENTS[1])
    assert dropped.tokens_L[:2].tolist() == [BOS, BOI]  # as guidance begins
    assert dropped.tokens_L[1:][dropped.loss_mask_L[:-1]].tolist() == (
        CODE + DOCUMENTS[1].parts[0].values.ravel()).tolist()
    got = losses(BATCH)
    text = 2 * (5 + 4 + 5)  # BOI and EOS too: of the first, of two pictures and a word, of text alone
    assert got["lm_loss"][1] == text and got["code_loss"][1] == 2 * 4 * N
    assert got["token_loss"][1] == got["z_loss"][1] == text + 8 * N == BATCH.loss_mask_BT.sum()
    assert make_objective(CFG).counts(BATCH) == {"token_loss": BATCH.loss_mask_BT.sum()}


def test_losses_are_the_formulas():
    """In float64 from the tokens on: text by the full softmax, codes, log Z squared, and their sum."""
    got, head = losses(BATCH), np.float64(params()["lm_head_kernel"])[:, : CODE + K]
    sums = dict.fromkeys(got, 0.0)
    for row in range(2):
        tokens = BATCH.tokens_BT[row]
        h = plain(CFG.model, params(), tokens, BATCH.positions_BT[row], BATCH.segment_ids_BT[row])
        for p in np.flatnonzero(BATCH.loss_mask_BT[row]):
            z, target = h[p] @ head, tokens[p + 1]
            log_z = np.log(np.exp(z - z.max()).sum()) + z.max()
            sums["code_loss" if target >= V + 2 else "lm_loss"] += log_z - z[target]
            sums["z_loss"] += log_z**2
            sums["token_loss"] += log_z - z[target] + 0.01 * log_z**2
    for name, want in sums.items():
        assert float(got[name][0]) == pytest.approx(want, rel=1e-5), name
    assert make_objective(CFG).weights == {"token_loss": 1.0}


def test_packed_equals_each_document_alone():
    together = losses(BATCH)
    alone = losses(batch_of(*([document] for document in DOCUMENTS)))
    for name, (total, count) in together.items():
        assert count == 2 * alone[name][1]
        assert float(total) == pytest.approx(2 * float(alone[name][0]), rel=1e-5)


def test_no_gradient_reaches_what_comes_later():
    """From each position's logits to each position's embedding: exactly the causal mask, inside images too."""
    model, row = LanguageModel(CFG.model, T), jax.tree.map(lambda x: x[:1], BATCH)
    sight = row_sight(*map(jnp.asarray, (row.positions_BT, row.segment_ids_BT, row.image_ids_BT)),
                      CFG.model.image_attention)
    weights = np.random.default_rng(2).standard_normal(CODE + K).astype(np.float32)
    x_BTD = model.apply({"params": params()}, row.tokens_BT, method="embed_tokens")

    def scalar(x_BTD, p):
        h_BTD, _ = model.apply({"params": params()}, x_BTD, sight, method="hidden")
        return model.apply({"params": params()}, h_BTD[0, p], method="logits")[: CODE + K] @ weights

    each = jax.jit(lambda x: jax.lax.map(lambda p: jax.grad(scalar)(x, p), jnp.arange(T)))
    gradient = np.abs(np.asarray(each(x_BTD))[:, 0]).sum(-1)
    np.testing.assert_array_equal(gradient != 0, dense_mask(row.segment_ids_BT, row.image_ids_BT, "causal")[0])


def test_on_a_mesh_it_is_the_same_with_its_gradients():
    """Rows, vocabulary and positions split."""
    batch, made = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), BATCH), make_objective(CFG)

    def loss(params, batch):
        out = made.loss(params, NO_AUX, batch, jax.random.key(0))
        return out["token_loss"][0], out

    step = jax.value_and_grad(loss, has_aux=True)
    (_, want), gradients = jax.jit(step)(params(), batch)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=2, sequence=2))
    with jax.set_mesh(mesh):
        split_batch = sharding.put_batch(batch, mesh, len(batch.row_ids_B))
        (_, got), split = jax.device_get(jax.jit(step)(params(), split_batch))
    for name, (total, count) in want.items():
        assert (float(got[name][0]), got[name][1]) == (pytest.approx(float(total), rel=1e-5), count)
    jax.tree.map(functools.partial(assert_close, rtol=1e-4), split, gradients)


# ---------------------------------------------------------------- rows

def test_rows_hold_what_was_prepared(chameleon):
    """Codes come back out of the tokens, slot by slot; nothing else stands in a batch."""
    rows, form = kind_of(chameleon).open_rows(chameleon), chameleon.rows
    batch = packing.stack_rows(rows.read(range(8)))
    rows.check(batch)
    assert batch.latents_BIhwc.shape == (8, form.image_slots, 0, 0, 0) and not batch.max_t_BI.any()
    for k, documents in enumerate(rows.documents(range(8))):
        want = [example.tokens_L[example.image_ids_L > 0] - CODE for example in rows.examples(documents)]
        want = np.concatenate(want).reshape(-1, 4, 4)
        images = form.layout.images(jax.tree.map(lambda x, k=k: x[k], batch))
        np.testing.assert_array_equal(images[: len(want)], want)
        assert not images[len(want) :].any() and images.shape == (form.image_slots, 4, 4)
    n = jax.device_get(packed.count(chameleon.model, batch))
    totals = jax.device_get(kind_of(chameleon).totals(chameleon, batch))
    assert totals["images"] == n.images == (batch.image_start_BI < T).sum() > 0
    assert totals["patches"] == N * n.images and totals["tokens"] == (batch.segment_ids_BT > 0).sum()


def test_held_out_rows_hold_every_record_once(chameleon):
    held = kind_of(chameleon).open_heldout(chameleon)
    for source in held.values():
        batch = next(iter(source.batches(len(source))))
        source.check(batch)
        assert batch.segment_ids_BT.max(axis=1).sum() == source.num_documents == len(source.source)
    shown = pipeline.batches(kind_of(chameleon).open_rows(chameleon), 0, 1, 4)
    assert (next(iter(shown)).tokens_BT >= CODE).any()


def test_expected_counts_are_those_of_such_rows():
    """A row of two documents, each a picture and as much text."""
    cfg = replace(CFG, "data", image_share=2 * (N + 2) / T, seq_len=T)
    text = layout.text([5] * (T // 2 - N - 4))
    row = packing.pack_row(0, [cfg.rows.layout.lay(Document((text, picture(0))))] * 2, cfg.rows)
    n = packed.count(cfg.model, packing.stack_rows([row] * cfg.train.batch_size))
    expected = kind_of(cfg).expected(cfg)
    assert (expected.scored, expected.pairs) == (int(n.scored), float(n.pairs))
    want = {part: float(x) for part, x in objective.model_flops(cfg, n).items()}
    assert expected.flops == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("change, words", [
    ({"model.num_codes": 512}, ("codes of shape (4, 4) from 27", "codes of shape (4, 4) from 512")),
    ({"model.codes_per_image": 64}, ("codes of shape (4, 4) from 27", "codes of shape (8, 8) from 27"))])
def test_other_codes_are_refused(chameleon, change, words):
    with pytest.raises(UserError) as e:
        kind_of(chameleon).open_rows(config.changed(chameleon, change))
    text = str(e.value)
    assert "\n" not in text and all(word in text for word in (*words, "model.num_codes, codes_per_image"))


def test_data_of_the_other_kind_are_refused_both_ways(chameleon, cfg):
    latents, codes = r"latents of shape \(4, 4, 4\)", r"codes of shape \(4, 4\) from 27"
    for mine, other, has, wants in ((chameleon, cfg, latents, codes), (cfg, chameleon, codes, latents)):
        swapped = replace(mine, "data", prepared=other.data.prepared)
        with pytest.raises(UserError, match=f"holds {has}, the model expects {wants}: change model"):
            kind_of(mine).open_rows(swapped)


def test_a_code_outside_an_image_is_found(chameleon):
    batch = packing.stack_rows(kind_of(chameleon).open_rows(chameleon).read(range(4)))
    tokens, inside = batch.tokens_BT, np.argwhere(batch.image_ids_BT > 0)[0]
    for place, token in ((inside, 7), (np.argwhere((batch.image_ids_BT == 0) & (tokens < V))[1], CODE)):
        wrong = tokens.copy()
        wrong[tuple(place)] = token
        found = f"position {place[1]}: token id {token}: ids from {CODE} on are codes"
        with pytest.raises(UserError, match=found):
            packing.check_batch(batch._replace(tokens_BT=wrong), chameleon.vocabulary)


def test_an_image_is_a_square_of_codes():
    with pytest.raises(UserError, match=r"model\.codes_per_image = 60 must be a square"):
        tiny_chameleon("unused", **{"model.codes_per_image": 60})
