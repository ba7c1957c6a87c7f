"""The VQ autoencoder's objective: L1 + L2 + |sg(z) - e|^2 + beta |z - sg(e)|^2, e the code nearest to z.

The decoder is given e, and z its gradient (straight-through). The codebook is learnt by its loss, as the paper
has it; it is the sum of a parameter, which the optimizer moves, and a buffer, which says where each code began:
a code that nothing falls on any more begins anew where a vector of the batch is, those far from their own code
first. So does every code at the first step.

B batch, h w grid, K codes, c code_dim, n = B h w.
"""

import dataclasses

import jax
import jax.numpy as jnp

from tfusion.config import RunConfig
from tfusion.models.codecs.network import to_unit
from tfusion.models.codecs.vq import VQAutoencoder, VQConfig, nearest
from tfusion.objectives import autoencoder
from tfusion.objectives.autoencoder import PicturesConfig
from tfusion.objectives.base import Aux, Kind, Objective, register
from tfusion.types import ImageBatch

USAGE_DECAY = 0.99  # of a code's share of all vectors, averaged over steps
DEAD = 0.1  # of an equal share: a code below begins anew


@dataclasses.dataclass(frozen=True)
class VQRunConfig(RunConfig):
    autoencoder: VQConfig
    data: PicturesConfig


def codebook(params, buffers):
    """(K, c)."""
    return params["codebook"] + buffers["origin"]


def make(cfg: VQRunConfig) -> Objective:
    a = cfg.autoencoder
    model, (h, w) = VQAutoencoder(a), a.grid

    def init(key):
        return model.init(key, jnp.zeros((1, a.image_size, a.image_size, 3)))["params"]

    def init_buffers(key):
        del key
        return {"origin": jnp.zeros((a.num_codes, a.code_dim)), "usage": jnp.zeros(a.num_codes)}

    def loss(params, aux: Aux, batch: ImageBatch, key):
        del key
        x, stop = to_unit(batch.images_BHWC), jax.lax.stop_gradient
        z = model.apply({"params": params}, x, method="encode")
        codes_Kc = codebook(params, aux.buffers)
        e = codes_Kc[nearest(stop(z), stop(codes_Kc))]
        error = model.apply({"params": params}, z + stop(e - z), method="decode") - x
        return autoencoder.reconstruction(error) | {
            "codebook": (jnp.sum((stop(z) - e) ** 2), z.size),
            "commitment": (jnp.sum((z - stop(e)) ** 2), z.size)}

    def counts(batch: ImageBatch):
        elements = len(batch.row_ids_B) * h * w * a.code_dim
        return autoencoder.reconstruction_counts(batch) | {"codebook": elements, "commitment": elements}

    def after_update(params, buffers, batch: ImageBatch, key):
        z = model.apply({"params": params}, to_unit(batch.images_BHWC), method="encode")
        noise = autoencoder.row_noise(key, batch.row_ids_B, lambda key: jax.random.gumbel(key, (h, w)))
        return restarted(params, buffers, z.reshape(-1, a.code_dim), noise.reshape(-1))

    return Objective(
        init=init, loss=loss, counts=counts, init_buffers=init_buffers, after_update=after_update,
        weights=autoencoder.RECONSTRUCTION | {"codebook": 1.0, "commitment": a.commitment_weight})


def restarted(params, buffers, z_nc, gumbel_n):
    """The buffers after a batch: each code's usage, and new origins of dead codes. Vectors are drawn without
    replacement, by their squared distance to their own code (the largest log distance + Gumbel noise)."""
    codes_Kc, (K, n) = codebook(params, buffers), (len(buffers["usage"]), len(z_nc))
    codes = nearest(z_nc, codes_Kc)
    share = jnp.zeros(K).at[codes].add(1.0) / n
    usage = USAGE_DECAY * buffers["usage"] + (1 - USAGE_DECAY) * share
    distance = jnp.sum((z_nc - codes_Kc[codes]) ** 2, axis=-1)
    _, drawn = jax.lax.top_k(jnp.log(distance) + gumbel_n, min(n, K))
    dead = usage < DEAD / K
    rank = jnp.cumsum(dead) - 1  # among the dead
    dead &= rank < len(drawn)
    z_Kc = z_nc[drawn[jnp.clip(rank, 0, len(drawn) - 1)]]
    return {"origin": jnp.where(dead[:, None], z_Kc - params["codebook"], buffers["origin"]),
            "usage": jnp.where(dead, 1 / K, usage)}


register("vq_autoencoder", Kind(
    config=VQRunConfig, make=make, open_rows=autoencoder.open_rows, open_heldout=autoencoder.open_heldout,
    abstract_batch=autoencoder.abstract_batch, totals=autoencoder.totals, expected=autoencoder.expected))
