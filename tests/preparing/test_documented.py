"""Bring your own latents: the loop that README.md shows works as it stands there."""

import re
import textwrap
from pathlib import Path

import numpy as np

from tfusion.data import layout, store
from tfusion.data.tokenizers import ByteTokenizer
from tfusion.preparing import card

README = Path(__file__).parents[2] / "README.md"


def test_own_latents_by_several_writers(tmp_path):
    code, = (block for block in re.findall(r" *```python\n(.*?)```", README.read_text(), re.S)
             if "store.Writer" in block)
    loop, last = textwrap.dedent(code).split("# and so for", 1)
    read = []

    def read_shard(shard):
        read.append(shard)
        return [(f"picture {shard}.{i}", shard + i) for i in range(3)]

    names = {"store": store, "layout": layout, "root": tmp_path, "num_shards": 5, "num_workers": 2,
             "load_tokenizer": lambda path: ByteTokenizer(), "read_shard": read_shard,
             "encode": lambda number: np.full((32, 32, 8), number, np.float32)}
    for worker in (1, 0, 0, 1):  # and both once more
        exec(loop, names | {"worker": worker})
    assert read == [1, 3, 0, 2, 4]
    exec("# " + last, names | {"tokenizer": ByteTokenizer()})
    split = store.Split(tmp_path, "pairs", "train")
    assert len(split) == 15 and split.image_shape == (32, 32, 8)
    assert [path.name for path in split.folder.glob("ledger*")] == ["ledger.jsonl"]
    text, latents = (part.values for part in split.read(4, 2))
    assert ByteTokenizer().decode(text) == "picture 4.2" and (latents == 6).all()
    assert store.read_meta(tmp_path)["codec"] == "my encoder"
    assert card.make(tmp_path)["pairs/train"]["images"] == 15
