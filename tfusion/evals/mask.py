"""Who sees whom in one packed row of the training data, as the report draws it."""

from pathlib import Path

import numpy as np

from tfusion.evals.base import Evaluator, Options, register, section, write_card
from tfusion.inference.trained import Trained
from tfusion.models.masks import dense_mask
from tfusion.objectives import kind_of


def run(run: Trained, folder: Path, options: Options) -> dict:
    cfg = run.cfg
    row = kind_of(cfg).open_rows(cfg)[0]
    mask = dense_mask(row.segment_ids_BT[None], row.image_ids_BT[None], cfg.model.image_attention)[0]
    names = {cfg.vocabulary.boi: "<boi>", cfg.vocabulary.eoi: "<eoi>"}
    pieces = [f"patch {n}" if n else names.get(t) or run.tokenizer.piece(t)
              for t, n in zip(row.tokens_BT.tolist(), row.image_ids_BT.tolist())]
    block = {"kind": "mask", "mask": "mask", "segments": "segment_ids", "images": "image_ids", "pieces": pieces}
    write_card(folder, section("mask", "Who sees whom", block), mask=np.asarray(mask),
               segment_ids=row.segment_ids_BT, image_ids=row.image_ids_BT)
    return {}


register(Evaluator("mask", ("data", "go_on"), run, order=40))
