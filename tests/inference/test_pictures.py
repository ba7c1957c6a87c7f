"""What a trained autoencoder can do."""

import jax
import numpy as np

from experiments import quickstart
from tfusion import config, inference
from tfusion.inference.trained import Trained
from tfusion.models.codecs.network import to_unit
from tfusion.models.codecs.vq import VQAutoencoder
from tfusion.objectives import make_objective
from tfusion.objectives.base import Aux


def test_a_vq_autoencoder_writes_codes_and_becomes_a_codec():
    """Its codebook is the parameter and where each code began together; pictures are not looked at."""
    tree = quickstart.get_config("vq")
    tree.autoencoder.update(image_size=8, width=8, num_blocks=0, num_codes=6, code_dim=3)
    cfg = config.from_dict(tree)
    book, origin = np.random.default_rng(0).normal(0, 0.3, (2, 6, 3)).astype(np.float32)
    params = jax.jit(make_objective(cfg).init)(jax.random.key(0)) | {"codebook": book}
    run = Trained(cfg, params, None, None, 1, {}, Aux(1, {}, {"origin": origin, "usage": np.ones(6)}))
    can, images = inference.decoder(run), np.random.default_rng(1).integers(0, 256, (9, 8, 8, 3), np.uint8)
    codec = can.make_codec(run, None)
    z = np.asarray(jax.jit(lambda x: VQAutoencoder(cfg.autoencoder).apply(
        {"params": params}, to_unit(x), method="encode"))(images))
    codes = ((z[..., None, :] - (book + origin)) ** 2).sum(-1).argmin(-1)
    assert len(np.unique(codes)) > 2 and can.num_codes == 6 and can.image_size == 8
    np.testing.assert_array_equal(can.codes(run, images), codes)
    np.testing.assert_array_equal(codec.encode(images), codes)
    np.testing.assert_array_equal(can.reconstruct(run, images), codec.decode(codes))
