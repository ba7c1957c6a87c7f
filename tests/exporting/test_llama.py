"""Llama's layout, by names, values and logits that others wrote down; and the way back, into a run."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from tests.conftest import tiny_config
from tests.exporting.conftest import call_verb, write_run
from tests.external import inputs, write_references
from tests.external.test_llama import CFG
from tfusion import config, exported, sharding
from tfusion.data.tokenizers import load_tokenizer
from tfusion.errors import UserError
from tfusion.exporting import llama as writing
from tfusion.exporting import parity
from tfusion.inference import trained
from tfusion.models import llama
from tfusion.objectives import kind_of, make_objective

V, D = 262, 32  # of the tiny model: 260 bytes and specials, BOI, EOI
FORM = llama.Form(CFG, inputs.T, CFG.text_vocab_size, {"boi": inputs.V - 2, "eoi": inputs.V - 1}, None)
TINY = tiny_config("/gone")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """tests/external's weights, written in files of at most 50 kB."""
    folder, leaves = tmp_path_factory.mktemp("llama"), jax.tree.map(jax.numpy.asarray, inputs.weights())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "FILE_BYTES", 50_000)
        writing.write_tensors(folder, exported.MODEL, writing._theirs(leaves, FORM))
    return folder


def test_names_and_values_are_those_that_hugging_face_loads(small):
    """tests/external loads that state with strict=True."""
    theirs, want = exported.Tensors(small), write_references.llama_state()
    assert theirs.names() == sorted(want)
    for name, x in want.items():
        assert theirs.shape(name) == x.shape
        np.testing.assert_array_equal(theirs.read(name), x)


def test_a_large_model_is_in_several_files_with_an_index(small):
    files = sorted(small.glob("*.safetensors"))
    index = json.loads((small / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    held = {name: path.name for path in files for name in load_file(path)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in write_references.llama_state().values())
    assert all(path.stat().st_size < 60_000 for path in files)


def test_the_definition_is_hugging_faces(small):
    """Their logits, committed; within 1e-5 of the largest. Measured: 2.1e-6."""
    file, about = np.load(inputs.REFERENCES), llama.to_config(FORM, "float32")
    for row, documents in enumerate(inputs.documents()):
        for i, ids in enumerate(documents):
            got, want = parity.logits(exported.Tensors(small), about, ids[None])[0], file[f"logits_{row}_{i}"]
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_what_stands_in_the_folder(run, llama_export):
    about = json.loads((llama_export / "config.json").read_text())
    assert about["model_type"] == "llama" and about["boi_token_id"] == 260 and about["eoi_token_id"] == 261
    assert about["vocab_size"] == V and exported.is_llama(llama_export) and not exported.is_llama(run[0])
    beside = load_file(llama_export / "tfusion" / "adapter.safetensors")
    flat = flatten_dict(run[1]["ema"], sep=".")
    assert beside.keys() == {name for name in flat if name.startswith("image_adapter.")}
    for name, x in beside.items():
        np.testing.assert_array_equal(x, flat[name])
    names = {str(path.relative_to(llama_export)) for path in llama_export.rglob("*") if path.is_file()}
    assert names == {"README.md", "config.json", "export.json", "model.safetensors", "tfusion/config.json",
                     "tfusion/adapter.safetensors", "tfusion/tokenizer.json", "tfusion/codec.npz"}
    assert "260 = BOI, 261 = EOI" in (llama_export / "README.md").read_text()


def test_in_bfloat16_with_a_tokenizer_whose_ids_are_the_rows(tmp_path, capsys):
    """SentencePiece with bos 1 and eos 2 stands where others look for it; bytes have no such file. The logits
    are those of the rounded weights, in float32."""
    own = load_tokenizer("default")
    cfg = config.changed(TINY, {"model.text_vocab_size": own.vocab_size, "model.compute_dtype": "bfloat16"})
    write_run(cfg, tmp_path / "run", tokenizer="default")
    call_verb(workdir=tmp_path / "run", out=tmp_path / "out", format="llama", dtype="bfloat16")
    said = capsys.readouterr().out.split()
    assert 0 < float(said[said.index("files:") + 5].rstrip(",")) < 1e-4
    assert "rounded to bfloat16 by at most" in " ".join(said)
    model = (tmp_path / "out" / "tokenizer.model").read_bytes()
    assert own.shift == 0 and model == (tmp_path / "run" / "tokenizer.model").read_bytes()
    told = (tmp_path / "out" / "README.md").read_text()
    assert "Ids are those of `tokenizer.model`" in told and "\ntokenizer = AutoTokenizer.from" in told


def test_is_no_run(llama_export):
    with pytest.raises(UserError, match=r"an export in Llama's layout, .* export with --format=orbax"):
        trained.load(llama_export)


# ---------------------------------------------------------------- what is refused

def test_parameters_that_a_llama_has_not_are_named():
    llama.check_leaves(["image_adapter/patch_in_kernel", *inputs.SHAPES])
    with pytest.raises(UserError, match="no place for decoder/blocks/attention/q_norm_scale: "):
        llama.check_leaves(["decoder/blocks/attention/q_norm_scale"])


def test_files_that_are_another_function_are_not_left_there(run, tmp_path, monkeypatch):
    """Gate and up exchanged: read back as they were, and no Llama."""
    gate, up = (f"decoder/blocks/mlp/{name}_kernel" for name in ("gate", "up"))
    monkeypatch.setitem(llama.LAYER, gate, "mlp.up_proj")
    monkeypatch.setitem(llama.LAYER, up, "mlp.gate_proj")
    with pytest.raises(UserError, match="differ by 0, Llama's text logits by "):
        call_verb(workdir=run[0], out=tmp_path / "out", format="llama")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the way back

def fresh(mesh):
    """Placed, every element 5: what is left as it was is seen."""
    with jax.set_mesh(mesh):
        boxed = jax.eval_shape(make_objective(TINY).init, jax.random.key(0))
    return jax.tree.map(lambda x: jax.device_put(np.full(x.shape, 5, x.dtype), x.sharding),
                        sharding.placed(boxed, mesh))


def start(folder, mesh=None, shift=4):
    return exported.start_from_llama(folder, kind_of(TINY).llama(TINY),
                                     fresh(mesh or sharding.parse_mesh(None)), shift)


@pytest.mark.parametrize("mesh", [None, "fsdp=4,tensor=2"])
def test_an_export_starts_a_run(run, llama_export, mesh):
    """Every parameter is what it was, but for the vocabulary's padding; in shards, as it was initialised."""
    begun = start(llama_export, mesh and sharding.parse_mesh(mesh))
    want = {name: x.copy() for name, x in flatten_dict(run[1]["ema"], sep="/").items()}
    want["token_embedding"][V:], want["lm_head_kernel"][:, V:] = 5, 5
    got = flatten_dict(begun.params, sep="/")
    assert got.keys() == want.keys() == set(begun.loaded) and not begun.new and not begun.left_over
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x)
    assert len(got["token_embedding"].sharding.device_set) == (8 if mesh else 1)


def llama_of_others(folder, rows: int, tied: bool = False, **changes):
    """A folder as others publish them, of the tiny model's sizes; returns its tensors."""
    about = llama.to_config(kind_of(TINY).llama(TINY), "float32") | {"tie_word_embeddings": tied} | changes
    for ours in ("boi_token_id", "eoi_token_id", "head_dim", "rope_parameters"):
        about.pop(ours)
    shapes = {leaf: x.shape for leaf, x in flatten_dict(
        nn.unbox(jax.eval_shape(make_objective(TINY).init, jax.random.key(0))), sep="/").items()}
    tensors = {t.name: np.float32(np.random.default_rng(i).standard_normal(
        llama.shape_there(shapes[t.leaf], t, rows))) for i, t in enumerate(llama.tensors(2))
        if not (tied and t.leaf == "lm_head_kernel")}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(about))
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_of_others_starts_a_run(tmp_path, tied):
    """Its 250 rows are our ids 4 to 253, by the tokenizer's shift; what else is ours stays as initialised."""
    tensors = llama_of_others(tmp_path / "llama", 250, tied)
    begun = start(tmp_path / "llama")
    table, head = np.full((384, D), 5.0), np.full((D, 384), 5.0)
    table[4:254] = tensors["model.embed_tokens.weight"]
    head[:, 4:254] = tensors["model.embed_tokens.weight" if tied else "lm_head.weight"].T
    np.testing.assert_array_equal(begun.params["token_embedding"], table)
    np.testing.assert_array_equal(begun.params["lm_head_kernel"], head)
    np.testing.assert_array_equal(begun.params["decoder"]["blocks"]["mlp"]["down_kernel"][1],
                                  tensors["model.layers.1.mlp.down_proj.weight"].T)
    adapter = [f"image_adapter/{name}" for name in begun.params["image_adapter"]]
    rows = [f"{leaf} (rows {which})" for leaf in llama.TABLES for which in ("0 to 3", "254 to 261")]
    assert set(begun.new) == {*adapter, *rows}
    assert begun.left_over == ["model.layers.0.self_attn.rotary_emb.inv_freq"]


def test_rows_beyond_our_text_are_not_taken_for_symbols(tmp_path):
    """270 rows, as of a padded vocabulary: BOI and EOI stay as initialised."""
    tensors = llama_of_others(tmp_path / "llama", 270)
    table = start(tmp_path / "llama", shift=0).params["token_embedding"]
    np.testing.assert_array_equal(table[:260], tensors["model.embed_tokens.weight"][:260])
    assert (np.asarray(table[260:]) == 5).all()


@pytest.mark.parametrize("changes, said", [
    (dict(hidden_size=64), r"hidden_size = 64 \(model.d_model: 32\), head_dim = 16 \(.*: 8\); set the former"),
    (dict(num_key_value_heads=None), r"num_key_value_heads = 4 \(model.num_kv_heads: 2\)"),
    (dict(rope_theta=500000.0), r"rope_theta = 500000.0 \(fixed: 10000.0\)"),
    (dict(rope_scaling={"rope_type": "llama3"}), r"rope_type = llama3 \(fixed: default\)"),
    (dict(rms_norm_eps=1e-6), r"rms_norm_eps = 1e-06 \(fixed: 1e-05\)"),
    (dict(attention_bias=True), r"attention_bias = True \(fixed: False\)")])
def test_another_model_is_named(tmp_path, changes, said):
    llama_of_others(tmp_path / "llama", 250, **changes)
    with pytest.raises(UserError, match=said):
        start(tmp_path / "llama")


def damaged(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("change, said", [
    (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), "no tensor model.layers.1.mlp.up_proj"),
    (lambda tensors: tensors.update({"model.norm.weight": np.ones(3, np.float32)}),
     r"model.norm.weight is \(3,\), the config's model has \(32,\)"),
    (lambda tensors: tensors.update({"lm_head.weight": np.ones((250, 3), np.float32)}),
     r"lm_head.weight is \(250, 3\), the config's model has \(250, 32\)")])
def test_tensors_of_another_model_are_named(tmp_path, change, said):
    llama_of_others(tmp_path / "llama", 250)
    damaged(tmp_path / "llama", change)
    with pytest.raises(UserError, match=said):
        start(tmp_path / "llama")


def test_an_export_of_another_vocabulary_is_named(llama_export, tmp_path):
    folder = shutil.copytree(llama_export, tmp_path / "copy")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"boi_token_id": 200, "eoi_token_id": 201}))
    with pytest.raises(UserError, match=r"a vocabulary of 262, the config's model one of 262: set model"):
        start(folder)


def test_files_that_cannot_be_read_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no tensors that can be read .*: model.safetensors, or several"):
        exported.Tensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"no tensors that can be read"):
        exported.Tensors(tmp_path)


def test_an_index_does_not_lead_out_of_its_folder(tmp_path):
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "secret.safetensors")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(UserError, match=r"it names '\.\./secret.safetensors'"):
        exported.Tensors(tmp_path / "in")


def test_only_what_is_asked_for_is_read(small, monkeypatch):
    """A device's part of a leaf: its columns of its layers."""
    theirs, asked = exported.Tensors(small), []

    def read(name, index):
        asked.append((name, index))
        return theirs.read(name, index)

    leaf = "decoder/blocks/attention/wk_kernel"
    rows, columns = slice(0, 32), slice(8, 16)
    part = llama.from_llama(leaf, (slice(1, 3), rows, columns), inputs.L, read)
    np.testing.assert_array_equal(part, inputs.weights()[leaf][1:3, rows, columns])
    assert asked == [(f"model.layers.{i}.self_attn.k_proj.weight", (columns, rows)) for i in (1, 2)]


# ---------------------------------------------------------------- their software itself

def test_transformers_loads_it_and_computes_the_same(run, llama_export):
    """Nothing missing, nothing unexpected; logits within 1e-4. Measured: 5.7e-6, the largest logit 4.8."""
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason=f"{name} is not installed: {inputs.INSTALL}")
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(llama_export, output_loading_info=True)
    assert type(model).__name__ == "LlamaForCausalLM" and not any(info.values())
    tokens = np.random.RandomState(1).randint(0, V, (2, 100)).astype(np.int32)
    ours = np.asarray(jax.jit(kind_of(TINY).llama(TINY).logits)(run[1]["ema"], tokens))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens).long()).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
