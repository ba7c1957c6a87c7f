"""A config small enough to plan in a second."""

from experiments import transfusion
from tfusion import config


def small_config(batch_size: int = 8, num_microbatches: int = 1, **model):
    """2 layers, width 64, rows of 128 positions, bf16, full remat; model: other values of its group."""
    tree = transfusion.get_config("0.16b")
    sizes = dict(num_layers=2, d_model=64, num_heads=4, num_kv_heads=4, d_ff=192, text_vocab_size=510)
    tree.model.update(sizes | model)
    tree.model.adapter.update(latent_size=8, latent_channels=4)
    tree.data.update(seq_len=128, image_share=0.5)
    tree.train.update(batch_size=batch_size, num_microbatches=num_microbatches)
    return config.from_dict(tree)
