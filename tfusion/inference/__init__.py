"""A run opened for use (trained.py), and what it can do (base.py): one decoder per kind of training."""

from tfusion.inference import documents, pictures
from tfusion.inference.base import Decoder, can, decoder, register

register("transfusion", documents.decoder)
register("autoencoder", pictures.decoder)

__all__ = ["Decoder", "can", "decoder", "register"]
