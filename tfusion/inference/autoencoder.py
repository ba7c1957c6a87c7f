"""A trained autoencoder as a codec: pictures <-> normalised latents.

The latent of a picture is the posterior's mean, normalised per channel to mean 0 and standard deviation 1
over training pictures (the paper states neither choice; docs/recipe.md).
"""

import dataclasses
import hashlib
import json
import zipfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tfusion import config
from tfusion.errors import UserError
from tfusion.models.autoencoder import Autoencoder, to_pixels, to_unit

CHUNK = 256  # pictures per call, so that one compiled shape serves any number


def in_chunks(fn, x):
    """fn over CHUNK rows at a time, the last chunk padded; numpy out."""
    out = []
    for start in range(0, len(x), CHUNK):
        part = x[start : start + CHUNK]
        padded = np.concatenate([part, np.repeat(part[-1:], CHUNK - len(part), axis=0)])
        out.append(np.asarray(fn(padded))[: len(part)])
    return np.concatenate(out)


class LatentCodec:
    def __init__(self, cfg: config.AutoencoderConfig, latent_size: int, params, mean, std):
        self.cfg, self.params, self.mean, self.std = cfg, params, mean, std
        self.latent_shape = (latent_size, latent_size, len(mean))
        self.image_size = latent_size * cfg.downsample
        model = Autoencoder(cfg, len(mean))
        apply = partial(model.apply, {"params": params})
        self._encode = jax.jit(lambda x: (apply(to_unit(x), method="encode")[0] - mean) / std)
        self._decode = jax.jit(lambda z: to_pixels(apply(z * std + mean, method="decode")))

    def encode(self, images):
        """uint8 (n, H, W, 3) -> normalised latents, float32 (n, h, w, c). Raises UserError on another size."""
        size, images = (self.image_size, self.image_size, 3), np.asarray(images)
        if images.shape[1:] != size or images.dtype != np.uint8:
            raise UserError(f"pictures are {images.dtype} {images.shape[1:]}, the autoencoder was trained on "
                            f"uint8 {size}: bring them to that size")
        return in_chunks(self._encode, images)

    def decode(self, latents):
        """Normalised latents -> uint8 (n, H, W, 3)."""
        return in_chunks(self._decode, np.asarray(latents, np.float32))

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, value in sorted(self._arrays().items()):
            digest.update(name.encode() + np.ascontiguousarray(value).tobytes())
        return digest.hexdigest()

    def _arrays(self) -> dict:
        flat = flatten_dict(self.params, sep="/")
        return {**{f"params/{k}": np.asarray(v) for k, v in flat.items()},
                "mean": np.asarray(self.mean), "std": np.asarray(self.std)}

    def save(self, path: Path) -> None:
        about = {"cfg": dataclasses.asdict(self.cfg), "latent_size": self.latent_shape[0]}
        del about["cfg"]["kl_weight"]  # only its training needs that
        np.savez(path, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **self._arrays())

    @classmethod
    def load(cls, path: Path) -> "LatentCodec":
        """Reads what `save` wrote. Raises UserError where it is broken."""
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
            about = json.loads(bytes(arrays["about"]))
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
            raise UserError(f"{path} is broken ({e}): bring it back from where it was copied") from e
        flat = {k.removeprefix("params/"): v for k, v in arrays.items() if k.startswith("params/")}
        return cls(config.AutoencoderConfig(**about["cfg"], kl_weight=0.0), about["latent_size"],
                   unflatten_dict(flat, sep="/"), arrays["mean"], arrays["std"])

    @classmethod
    def fit(cls, cfg: config.Config, params, images) -> "LatentCodec":
        """A trained autoencoder, its latents' normalisation measured on `images`, uint8 (n, H, W, 3)."""
        channels, size = cfg.model.latent_channels, cfg.model.latent_size
        latents = cls(cfg.autoencoder, size, params, jnp.zeros(channels), jnp.ones(channels)).encode(images)
        return cls(cfg.autoencoder, size, params, latents.mean((0, 1, 2)), latents.std((0, 1, 2)))
