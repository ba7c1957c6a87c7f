"""Experiments that train in seconds, for drills on a cluster: the toy kind of training, and `:text`, a small
model of words. The sweep `:FOLDER` has a point that begins with a run which is not there: FOLDER."""

import time

from experiments import quickstart
from tests import toy

STEPS, EVERY, READ_S = 800, 100, 0.02


class Rows(toy.ToyRows):
    """Which take their time: there is some to take a run's machines away in."""

    def read(self, rows) -> list:
        time.sleep(READ_S)
        return super().read(rows)


def get_config(arg=None) -> dict:
    if arg == "text":
        tree = quickstart.get_config("smoke")
        tree.model.update(num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, d_ff=32, text_vocab_size=260)
        tree.data.update(tokenizer="byte", seq_len=192, window_rows=32, image_share=0.12)
        for name in ("scenes", "stories"):
            tree.data.sources[name].share = 0.0
        tree.train.update(num_steps=3, batch_size=2, log_every=1, eval_every=3, eval_documents=2,
                          diagnostics_every=0, checkpoint_every=3)
        return tree
    toy.ToyRows = Rows  # in the process that trains
    tree = toy.get_config()
    tree["train"] |= dict(num_steps=STEPS, checkpoint_every=EVERY, log_every=1, eval_every=STEPS)
    return tree


def get_sweep(folder) -> list[dict]:
    file = "tests/launch/tiny.py"
    return [dict(name="long", config=file, verbs=["train"]),
            dict(name="short", config=file, verbs=["train"], overrides={"train.num_steps": EVERY}),
            dict(name="broken", config=file, verbs=["train"],
                 overrides={"train.num_steps": EVERY, "train.init_from": folder})]
