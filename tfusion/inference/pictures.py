"""What a trained autoencoder can do: reconstruct pictures, write them as codes, and become the codec of another
run."""

import jax.numpy as jnp

from tfusion.inference.base import Decoder, register
from tfusion.inference.trained import Trained
from tfusion.models.codecs import Codec
from tfusion.models.codecs.kl import KLCodec
from tfusion.models.codecs.vq import VQCodec
from tfusion.objectives.vq_autoencoder import codebook


def kl(run: Trained) -> Decoder:
    cfg, params = run.cfg.autoencoder, run.params

    def plain() -> Codec:
        channels = jnp.zeros(cfg.latent_channels)
        return KLCodec(cfg, params, channels, channels + 1)

    return Decoder(reconstruct=lambda run, pictures: reconstructed(plain(), pictures),
                   make_codec=lambda run, read: KLCodec.fit(cfg, params, read(cfg.image_size)),
                   image_size=cfg.image_size)


def vq(run: Trained) -> Decoder:
    """Codes need no normalisation: its codec looks at no pictures."""
    cfg = run.cfg.autoencoder

    def codec() -> Codec:
        return VQCodec(cfg, {**run.params, "codebook": codebook(run.params, run.aux.buffers)})

    return Decoder(reconstruct=lambda run, pictures: reconstructed(codec(), pictures),
                   codes=lambda run, pictures: codec().encode(pictures), num_codes=cfg.num_codes,
                   make_codec=lambda run, read: codec(), image_size=cfg.image_size)


def reconstructed(codec: Codec, pictures):
    """Pictures encoded and decoded, uint8 (n, H, W, 3)."""
    return codec.decode(codec.encode(pictures))


register("autoencoder", kl)
register("vq_autoencoder", vq)
