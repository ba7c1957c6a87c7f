"""Packaging: `pip install .` puts `tfusion` (the library, its verbs and the data pack) anywhere.

Lower bounds only; requirements.txt holds the exact versions that the tests run on. `experiments/` is not
installed: experiments are read and edited in a checkout.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "tfusion/__init__.py").read_text(), re.M)[1]

REQUIREMENTS = [
    "jax>=0.10",  # arrays, jit, sharding: everything on a device
    "flax>=0.12",  # Linen: declares parameters, names their logical axes, scans the blocks
    "optax>=0.2.8",  # AdamW, gradient clipping, the learning-rate schedule
    "orbax-checkpoint>=0.12",  # asynchronous, sharded, atomic checkpoints
    "safetensors>=0.6",  # exports in Llama's layout, written and read lazily; no pickle in them
    "grain>=0.2.18",  # step-indexed reading and prefetching of rows
    "array_record>=0.8.6",  # shards of records, read and written
    "etils[epath]>=1.15",  # their paths, local or gs://
    "ml_dtypes>=0.5",  # bfloat16 on the host
    "tensorflow-datasets>=4.9.10",  # what it wrote, read without TensorFlow; imported by sources of its kind
    "ml-collections>=1.1",  # ConfigDict and --config=FILE.py:variant
    "einops>=0.8",  # patchify, space-to-depth
    "absl-py>=2.1",  # flags of the verbs
    "numpy>=2.0",  # all data work on the host
    "scipy>=1.13",  # robust least squares: L(N, D); jax brings it
    "pillow>=11.0",  # decodes the emoji of the data pack
    "sentencepiece>=0.2",  # the shipped tokenizer, Llama's, or any other
    "tqdm>=4.66",  # progress bars with an ETA
    "tensorboardX>=2.6",  # event files without TensorFlow
    "matplotlib>=3.9",  # the curves of the report
]

EXTRAS = {
    "tpu": ["jax[tpu]>=0.10"],  # adds libtpu
    "gpu": ["jax[cuda13]>=0.10"],  # adds the CUDA 13 plugin and libraries; older driver: jax[cuda12]
    "huggingface": ["tokenizers>=0.21"],  # data.tokenizer=tokenizer.json; tested with 0.21.0 and 0.23.3
    "tiktoken": ["tiktoken>=0.13"],  # data.tokenizer=NAME.tiktoken; before, a long word takes minutes
    "buckets": ["gcsfs>=2026.9"],  # a run's folder in gs://: what epath reaches it by
    "wandb": ["wandb>=0.19"],  # train --wandb=PROJECT; tested with 0.31.0
    "dev": [
        "pytest>=8.0",  # the tests
        "pytest-xdist>=3.6",  # on all cores: the fast set is of many small programs, each on one
        "ruff>=0.9",  # lint
        "resvg-py>=0.5",  # renders the SVGs when the data pack is rebuilt; 0.5.0 makes the bytes shipped
    ],
    # For tests/external; its references come from torch 2.13.0, transformers 5.24.0 and diffusers 0.42.1.
    "external": [
        "torch==2.13.0",  # the two below stand on it; a CPU build will do
        "transformers>=5.24",  # LlamaForCausalLM: the decoder on text
        "diffusers>=0.42",  # DDPMScheduler and DDIMScheduler: the sampler's steps
    ],
    "peers": ["torch==2.13.0", "transfusion-pytorch==0.20.0"],  # what benchmarks/train_step.py compares with
}

setup(
    name="tfusion",
    version=VERSION,
    description="Pretrain one transformer on text and images: Transfusion (arXiv 2408.11039) in JAX",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "tfusion/data/packs/LICENSES/*"],
    python_requires=">=3.11",
    packages=find_packages(include=["tfusion", "tfusion.*"]),
    package_data={"tfusion.data.packs": ["*.npz", "*.xz", "*.model", "README.md", "LICENSES/*"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
)
