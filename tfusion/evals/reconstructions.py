"""What is left of a picture after coding it to latents and back: no drawn picture can be sharper."""

from pathlib import Path

import numpy as np

from tfusion import inference
from tfusion.data.sources import pictures
from tfusion.errors import UserError
from tfusion.evals import figure, scenes
from tfusion.evals.base import (
    Evaluator,
    LeftOut,
    Options,
    register,
    scenes_source,
    section,
    sources,
    write_card,
)
from tfusion.inference.trained import Trained

SHOWN = 16


def psnr(images, reconstructions) -> float:
    """dB, over uint8 pictures."""
    error = np.mean((images.astype(np.float64) - reconstructions) ** 2)
    return float(10 * np.log10(255**2 / error))


def held_out(run: Trained, number: int):
    """Held-out pictures, uint8 (n, H, W, 3): scenes where they take part, else equally many of each source.

    Raises LeftOut where there are none.
    """
    if scenes_source(run.cfg):
        return scenes.held_out(run.cfg, number)[2]
    if not sources(run.cfg):
        raise LeftOut("the run's config names no sources of pictures")
    try:
        return pictures(sources(run.cfg), "heldout", inference.decoder(run).image_size, number)
    except UserError as e:
        raise LeftOut(str(e)) from e


def run(run: Trained, folder: Path, options: Options) -> dict:
    real = held_out(run, options.number)
    again = inference.decoder(run).reconstruct(run, real)
    pairs = {"kind": "pairs", "above": "images", "below": "reconstructions",
             "made": "Held-out pictures, coded to latents and back.",
             "reading": "Above, held-out originals; below, the same after coding to latents and back. No "
                        "generated picture can be sharper than these."}
    write_card(folder, section("reconstructions", "What the autoencoder keeps", pairs),
               images=real[:SHOWN], reconstructions=again[:SHOWN])
    return {"autoencoder_psnr": figure.number(
        "Autoencoder: PSNR of held-out pictures (dB)", psnr(real, again), "higher", n=len(real))}


register(Evaluator("reconstructions", ("reconstruct",), run, order=30))
