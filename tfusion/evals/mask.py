"""Who sees whom in one packed row of the training data, as the report draws it."""

from pathlib import Path

import numpy as np

from tfusion.evals.base import Evaluator, Options, register, section, write_card
from tfusion.inference.trained import Trained
from tfusion.models.masks import dense_mask
from tfusion.objectives import kind_of


def run(run: Trained, folder: Path, options: Options) -> dict:
    kind = kind_of(run.cfg)
    row, known = kind.open_rows(run.cfg)[0], kind.row_format(run.cfg).vocabulary
    image_attention = kind.trunk(run.cfg).image_attention
    mask = dense_mask(row.segment_ids_BT[None], row.image_ids_BT[None], image_attention)[0]
    names = {known.boi: "<boi>", known.eoi: "<eoi>"}
    pieces = [f"patch {n}" if n else names.get(t) or run.tokenizer.piece(t)
              for t, n in zip(row.tokens_BT.tolist(), row.image_ids_BT.tolist())]
    block = {"kind": "mask", "mask": "mask", "segments": "segment_ids", "images": "image_ids", "pieces": pieces}
    write_card(folder, section("mask", "Who sees whom", block), mask=np.asarray(mask),
               segment_ids=row.segment_ids_BT, image_ids=row.image_ids_BT)
    return {}


register(Evaluator("mask", ("data", "rows"), run, order=40))
