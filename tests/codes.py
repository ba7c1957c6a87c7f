"""A codec of codes without a network, and a Chameleon small enough for tests.

ColourCodec: pictures of 32 x 32 pixels <-> 4 x 4 codes, each the colour of a block of 8 x 8, of 27 colours.
"""

import numpy as np

from experiments import quickstart
from tests.golden import write_split
from tfusion import config
from tfusion.data import store
from tfusion.data.tokenizers import load_tokenizer
from tfusion.models.codecs import base
from tfusion.workdir import CODEC

K, N = 27, 16


@base.register("colours")
class ColourCodec:
    image_size, shape, dtype, num_codes, fingerprint = 32, (4, 4), np.int32, K, "colours"

    def encode(self, images):
        base.check_pictures(images, 32)
        levels = images.reshape(len(images), 4, 8, 4, 8, 3).mean((2, 4)) // 86
        return (levels @ [1, 3, 9]).astype(np.int32)

    def decode(self, codes):
        levels = np.asarray(codes)[..., None] // [1, 3, 9] % 3
        return np.kron(127 * levels, np.ones((1, 8, 8, 1))).astype(np.uint8)

    def save(self, path):
        base.write(path, {"kind": "colours"}, {})

    @classmethod
    def read(cls, about, arrays):
        return cls()


def tiny_dict(root, tiny):
    """Of conftest's tiny Transfusion `tiny`, what fits: 2 layers, width 32, 16 codes per image."""
    tree = quickstart.get_config("chameleon,smoke")
    tree.model.update(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=64, text_vocab_size=260,
                      num_codes=K, codes_per_image=N)
    tree.data, tree.train, tree.optimizer = tiny.data.copy_and_resolve_references(), tiny.train, tiny.optimizer
    tree.data.update(prepared=str(root), image_share=0.4)
    return tree


def write(root, cfg) -> None:
    """Prepared data: byte tokenizer, 100 records of each source and split, the codec beside them."""
    tokenizer, codec = load_tokenizer("byte"), ColourCodec()
    for name, spec in cfg.data.sources.items():
        for split in ("train", "heldout"):
            records = spec.open(split, 32)
            records = [records[i] for i in range(min(len(records), 100))]
            if name == "glosses":
                records = [[text[:60]] for (text,) in records]
            write_split(root, name, split, records, tokenizer.encode_batch, codec.encode)
    codec.save(root / CODEC)
    store.write_meta(root, tokenizer, codec.fingerprint, codec.shape, image_dtype="int32", num_codes=K)


def tiny_config(root, tiny, **changes):
    return config.changed(config.from_dict(tiny_dict(root, tiny)), changes)
