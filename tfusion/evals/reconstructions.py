"""What is left of a picture after encoding and decoding it: no drawn picture can be sharper."""

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
    return float(10 * np.log10(255**2 / max(error, 1e-4)))  # 88 dB: no picture differs


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


def errors(images, reconstructions) -> dict:
    """Figures of pictures, uint8, and what became of them; L1 and MSE of pixels in -1..1, as the losses."""
    difference = (images.astype(np.float64) - reconstructions) / 127.5
    title, n = "Autoencoder: {} of held-out pictures", len(images)
    return {
        "autoencoder_psnr": figure.number(title.format("PSNR") + " (dB)", psnr(images, reconstructions),
                                          "higher", n=n),
        "autoencoder_l1": figure.number(title.format("L1"), float(np.abs(difference).mean()), "lower", n=n),
        "autoencoder_mse": figure.number(title.format("MSE"), float((difference**2).mean()), "lower", n=n)}


def sprites(run: Trained, reconstructions) -> dict:
    """Whether the sprites of held-out scenes are found again, judged as those of drawn pictures are."""
    world, held, _ = scenes.held_out(run.cfg, len(reconstructions))
    verdicts = scenes.judge_pictures(world, held, reconstructions)
    found, _ = scenes.metrics("generation", scenes.DRAWN, held, verdicts, scenes.chance(held)["generation"])
    return {"autoencoder_sprites": found["generation_sprites"] | {
        "title": "Autoencoder: exactly the sprites, looking right, in reconstructed scenes", "want": None}}


def run(run: Trained, folder: Path, options: Options) -> dict:
    real = held_out(run, options.number)
    again = inference.decoder(run).reconstruct(run, real)
    pairs = {"kind": "pairs", "above": "images", "below": "reconstructions",
             "made": "Held-out pictures, encoded and decoded.",
             "reading": "Above, held-out originals; below, the same after encoding and decoding. No generated "
                        "picture can be sharper than these."}
    write_card(folder, section("reconstructions", "What the autoencoder keeps", pairs),
               images=real[:SHOWN], reconstructions=again[:SHOWN])
    found = sprites(run, again) if scenes_source(run.cfg) else {}
    return found | errors(real, again)


register(Evaluator("reconstructions", ("reconstruct",), run, order=30))
