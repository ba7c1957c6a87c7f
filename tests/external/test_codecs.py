"""Pretrained image tokenizers: what diffusers' own modules compute on the same weights; and what is refused."""

import hashlib
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.external import codecs, inputs
from tfusion.errors import UserError
from tfusion.models.codecs import diffusers, load

COMMITTED = np.load(codecs.REFERENCES)
GRID = codecs.SIZE // 2
TOLERANCE = 1e-5  # of the largest number; measured: 1.3e-6


pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module", autouse=True)
def one_picture():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers.Pretrained, "chunk", 1)
        yield


@pytest.fixture(params=["committed", "installed"])
def references(request):
    """case -> arrays: as the file holds them, as the software gives them now."""
    if request.param == "committed":
        return lambda case: {name: COMMITTED[f"{case}_{name}"] for name in ("shapes", "encoded", "decoded")}
    for name in ("torch", "diffusers"):
        pytest.importorskip(name, reason=f"{name} is not installed: {inputs.INSTALL}")
    return codecs.references


def weights_of(case: str) -> dict[str, np.ndarray]:
    return codecs.draw(case, json.loads(str(COMMITTED[f"{case}_shapes"])))


def write(folder, case: str, weights=None, **config) -> str:
    """A file and its config.json; what --codec names it by."""
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file(weights_of(case) if weights is None else weights, path)
    config = codecs.CASES[case] | {"_diffusers_version": "0.42"} | config
    (folder / "config.json").write_text(json.dumps(config))
    return f"{path}#{hashlib.sha256(path.read_bytes()).hexdigest()}"


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """case -> its codec, opened once."""
    return {case: diffusers.open_file(write(tmp_path_factory.mktemp(case), case), GRID)
            for case in codecs.CASES}


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


@pytest.mark.parametrize("case", codecs.CASES)
def test_equals_diffusers(references, opened, case):
    """With and without the optional convolutions, attention and a shift; codes are the very same."""
    theirs, codec = references(case), opened[case]
    encoded = codec.encode(codecs.picture())
    assert encoded.shape[1:] == codec.shape and encoded.dtype == codec.dtype
    (close if codec.dtype == np.float32 else np.testing.assert_array_equal)(encoded, theirs["encoded"])
    decoded = jax.jit(lambda w, z: codec.decoded(codec.cfg, w, z))(dict(codec.weights), theirs["encoded"])
    close(decoded, theirs["decoded"])


def test_what_they_are(opened):
    assert opened["kl"].shape == (16, 16, 4) and opened["kl"].image_size == 32
    assert opened["vq"].shape == (16, 16) and opened["vq"].num_codes == 50
    assert opened["kl"].kind == "diffusers_kl" and opened["vq"].kind == "diffusers_vq"


def test_a_saved_codec_is_the_same_and_its_config_counts(opened, tmp_path):
    codec = opened["vq"]
    codec.save(tmp_path / "codec.npz")
    again = load(tmp_path / "codec.npz")
    assert (again.fingerprint, again.shape, again.image_size) == (codec.fingerprint, codec.shape, 32)
    pixels = np.clip(np.round((COMMITTED["vq_decoded"] + 1) * 127.5), 0, 255)
    assert np.abs(again.decode(COMMITTED["vq_encoded"]) - pixels).max() <= 1
    other = diffusers.open_file(write(tmp_path, "kl", scaling_factor=0.2), GRID)
    assert other.fingerprint != opened["kl"].fingerprint


def test_former_names_of_attention_are_known(opened, tmp_path):
    former = {now: name for name, now in diffusers.FORMER.items()}
    weights = weights_of("kl")
    for now, name in former.items():
        weights = {key.replace(f".{now}.", f".{name}."): x for key, x in weights.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in weights
    assert diffusers.open_file(write(tmp_path, "kl", weights), GRID).fingerprint == opened["kl"].fingerprint


def without(case: str, name: str) -> dict:
    weights = weights_of(case)
    del weights[name]
    return weights


BAD = {  # case, weights, changes of config.json, what is said
    "a missing tensor": ("kl", without("kl", "decoder.conv_in.bias"), {},
                         "has no tensor 'decoder.conv_in.bias', which its config.json asks for"),
    "one too many": ("kl", None, {"use_quant_conv": False}, "is a place for quant_conv.bias, and 1 more"),
    "other sizes": ("kl", weights_of("kl") | {"encoder.conv_in.weight": np.zeros((8, 4, 3, 3), np.float32)},
                    {}, "does not hold what its config.json describes"),
    "another model": ("kl", None, {"_class_name": "AutoencoderDC"}, "_class_name = 'AutoencoderDC' is not"),
    "other blocks": ("vq", None, {"up_block_types": ["UNetUp"]}, r"up_block_types = \['UNetUp'\] is not known"),
    "another activation": ("kl", None, {"act_fn": "relu"}, "act_fn = 'relu' is not known here"),
    "a mean of latents": ("kl", None, {"latents_mean": [0.0]}, r"latents_mean = \[0.0\] is not known here"),
    "blocks of no list": ("kl", None, {"down_block_types": None}, "config.json is missing or broken"),
}


@pytest.mark.parametrize("case, weights, config, said", BAD.values(), ids=BAD)
def test_what_is_not_known_is_refused_in_one_line(tmp_path, case, weights, config, said):
    with pytest.raises(UserError, match=said) as e:
        diffusers.open_file(write(tmp_path, case, weights, **config), GRID)
    assert "\n" not in str(e.value) and "config.json" in str(e.value)


def test_the_hash_is_asked_for_and_checked(tmp_path):
    path, _, right = write(tmp_path, "kl").partition("#")
    with pytest.raises(UserError, match=f"sha256 {right}, which must be named"):
        diffusers.open_file(path, GRID)
    with pytest.raises(UserError, match=f"sha256 {right}, {'0' * 64} is wanted: bring it anew"):
        diffusers.open_file(f"{path}#{'0' * 64}", GRID)
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        diffusers.open_file(f"{tmp_path / 'nowhere.safetensors'}#{right}", GRID)


def test_what_is_no_safetensors(tmp_path):
    write(tmp_path, "kl")
    path = tmp_path / "cut.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        diffusers.open_file(f"{path}#{hashlib.sha256(path.read_bytes()).hexdigest()}", GRID)
