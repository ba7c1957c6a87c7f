"""How the codes of an image tokenizer are used on held-out pictures: how many of them, and how evenly."""

from pathlib import Path

import numpy as np

from tfusion import inference
from tfusion.evals import figure
from tfusion.evals.base import Evaluator, Options, register, section, write_card
from tfusion.evals.reconstructions import held_out
from tfusion.inference.trained import Trained

WANTED = 0.9  # of all codes, of a codebook that is not too large for its pictures


def perplexity(counts) -> float:
    """exp of the entropy of how often each code occurs: as many codes, evenly used, would say as much."""
    share = counts[counts > 0] / counts.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def run(run: Trained, folder: Path, options: Options) -> dict:
    decoder, images = inference.decoder(run), held_out(run, options.number)
    counts = np.bincount(decoder.codes(run, images).ravel(), minlength=decoder.num_codes)
    even = perplexity(counts)
    write_card(folder, section("codes", "How codes are used", {
        "kind": "table", "title": f"Codes in {len(images):,} held-out pictures",
        "head": ["codebook", "of them used", "usage perplexity", "share of the most used", "codes seen"],
        "rows": [[len(counts), int((counts > 0).sum()), even, float(counts.max() / counts.sum()),
                  int(counts.sum())]],
        "reading": "Perplexity: so many codes, all used alike, would say as much. Background takes many places "
                   "and few codes, which keeps it far below the codebook's size."}))
    return {"code_usage": figure.share("Codes: share of the codebook that occurs in held-out pictures",
                                       list(counts > 0), want=WANTED),
            "code_perplexity": figure.number(f"Codes: usage perplexity (of {len(counts):,})", even, "higher",
                                             n=len(images))}


register(Evaluator("codes", ("codes",), run, order=31))
