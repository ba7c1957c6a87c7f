"""Between image latents and transformer positions. One file per kind; its config, registered under "adapter",
says `latent_shape`, `num_patches` (N: how many positions an image takes), `flops(d_model, patches, images)`,
and makes the Linen module, `make(d_model)`, with

  encode(x_BIhwc, t_BI) -> (x_BIND, skips)   noisy latents and their t, one vector per patch, in x's dtype
  decode(h_BIND, t_BI, skips)                the transformer's outputs there, the diffusion target's estimate
                                             (B, I, h, w, c), float32

skips: whatever encode hands to decode past the transformer, such as a U-Net's features; a pytree, () where
there is nothing. Every file here is imported, so that registering the config is all it takes.

B batch, I image slots, h w c latent, N patches per image, D d_model.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
