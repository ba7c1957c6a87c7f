"""What a trained autoencoder can do: reconstruct pictures, and become the codec of another run."""

from collections.abc import Callable

import jax.numpy as jnp

from tfusion.inference.base import Decoder, register
from tfusion.inference.trained import Trained
from tfusion.models.codecs.kl import KLCodec


def decoder(run: Trained) -> Decoder:
    return Decoder(reconstruct=reconstruct, make_codec=make_codec, image_size=run.cfg.autoencoder.image_size)


def reconstruct(run: Trained, pictures):
    """Pictures coded to latents and back, uint8 (n, H, W, 3)."""
    channels = jnp.zeros(run.cfg.autoencoder.latent_channels)
    codec = KLCodec(run.cfg.autoencoder, run.params, channels, channels + 1)
    return codec.decode(codec.encode(pictures))


def make_codec(run: Trained, read: Callable) -> KLCodec:
    """Its latents are normalised over read(image_size), uint8 (n, H, W, 3)."""
    return KLCodec.fit(run.cfg.autoencoder, run.params, read(run.cfg.autoencoder.image_size))


register("autoencoder", decoder)
