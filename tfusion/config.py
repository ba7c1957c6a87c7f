"""The configuration of a run: frozen dataclasses, built once from the experiment's ConfigDict.

Every knob has its value in the experiment file; nothing here supplies a default. Derived numbers are
properties. `from_dict` raises UserError with one line naming the key and the choices.
"""

import dataclasses
import difflib
import functools
import json
import math
import os
import secrets
import typing
from pathlib import Path

from tfusion import paths
from tfusion.errors import UserError

SLOTS_PER_IMAGE = 1.25  # rows differ in how many images they hold
CHOICES = {
    "objective": ("transfusion", "autoencoder"),
    "model.adapter": ("linear",),
    "model.patch_positions": ("none", "learned"),
    "model.image_attention": ("bidirectional", "causal"),
    "model.remat": ("none", "attention", "dots", "full"),
    "model.compute_dtype": ("float32", "bfloat16"),
    "diffusion.prediction": ("eps", "v"),
    "sampling.sampler": ("ddpm", "ddim"),
    "sampling.variance": ("fixed_small", "fixed_large"),
}
PATHS = ("data.prepared", "data.tokenizer")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    d_ff: int
    text_vocab_size: int  # V; BOI and EOI come on top
    latent_size: int  # h = w of an image's latent
    latent_channels: int
    patch_size: int  # k: a k x k window of latent pixels is one patch
    adapter: str
    patch_positions: str  # learnt position of a patch within its image
    image_attention: str
    remat: str
    compute_dtype: str

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def boi(self) -> int:
        return self.text_vocab_size

    @property
    def eoi(self) -> int:
        return self.text_vocab_size + 1

    @property
    def vocab_size(self) -> int:
        return self.text_vocab_size + 2

    @property
    def padded_vocab_size(self) -> int:
        """Rounded up to 128 so that the vocabulary shards; the added ids get no probability."""
        return math.ceil(self.vocab_size / 128) * 128

    @property
    def num_patches(self) -> int:
        """N: patches per image."""
        return (self.latent_size // self.patch_size) ** 2

    @property
    def patch_values(self) -> int:
        """P: numbers in one patch."""
        return self.patch_size**2 * self.latent_channels

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (self.latent_size, self.latent_size, self.latent_channels)


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    prediction: str
    num_timesteps: int
    loss_weight: float  # lambda in L = L_LM + lambda * L_DDPM


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    width: int
    num_blocks: int
    downsample: int  # pixels per latent pixel, each way
    kl_weight: float  # of the KL summed over an image, beside errors that are means over its pixels


@dataclasses.dataclass(frozen=True)
class DataConfig:
    prepared: str  # folder written by `prepare`
    tokenizer: str  # 'byte', 'default' or the path of a SentencePiece model
    mixture: dict[str, float] = dataclasses.field(hash=False)  # source -> share of the tokens
    seq_len: int
    image_share: float  # expected of a row's positions in images, BOI and EOI included; 0 without images
    window_rows: int  # R: rows planned at once
    caption_dropout: float
    image_first_fraction: float
    image_first_max_t: float  # noise limit where the image precedes its caption
    num_scenes: int
    num_sprites: int
    jitter: int  # sprites are moved by up to this many pixels


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float
    warmup_steps: int
    b2: float
    weight_decay: float
    ema_decay: float


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    num_steps: int
    batch_size: int  # rows in the global batch
    num_microbatches: int
    log_every: int
    eval_every: int
    eval_documents: int  # held-out records of each source that are looked at
    diagnostics_every: int
    checkpoint_every: int


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int
    fsdp: int  # -1: the devices left over
    tensor: int
    sequence: int  # context parallelism: positions of a row over devices


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    sampler: str
    variance: str  # DDPM's, named as in diffusers: the posterior's, or beta
    num_inference_steps: int
    guidance_scale: float


@dataclasses.dataclass(frozen=True)
class Config:
    objective: str
    seed: int
    model: ModelConfig
    diffusion: DiffusionConfig
    autoencoder: AutoencoderConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: MeshConfig
    sampling: SamplingConfig

    @property
    def image_slots(self) -> int:
        """I: image slots of a row, a quarter more than data.image_share asks for, at most as many as fit."""
        T, N = self.data.seq_len, self.model.num_patches
        wanted = math.ceil(SLOTS_PER_IMAGE * self.data.image_share * T / (N + 2))
        return max(1, min(wanted, T // (N + 2))) if wanted else 0

    @property
    def image_size(self) -> int:
        return self.model.latent_size * self.autoencoder.downsample

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def from_dict(tree) -> Config:
    """Builds and validates a Config from nested mappings (a ConfigDict or parsed JSON)."""
    cfg = _build(Config, tree, "")
    _check_choices(cfg)
    _check_numbers(cfg)
    _check_together(cfg)
    return cfg


def load(workdir) -> Config:
    """Reads the resolved configuration that `train` left in a workdir."""
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{path} not found: --workdir must be the workdir of a training run")
    try:
        tree = json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path} is broken ({e}): resume the run with its --config to write it again") from e
    return from_dict(tree)


def changed(cfg: Config, values: dict) -> Config:
    """cfg with {"group.key": value} put in, None where it stays: for flags of verbs that stand for config keys.

    Raises UserError where the whole is not a valid config.
    """
    tree = cfg.to_dict()
    for name, value in values.items():
        *groups, key = name.split(".")
        group = functools.reduce(dict.__getitem__, groups, tree)
        group[key] = group[key] if value is None else value
    return from_dict(tree)


def save(cfg: Config, workdir) -> None:
    replace_text(Path(workdir) / "config.json", json.dumps(cfg.to_dict(), indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one move: whoever is killed meanwhile, and a full disk, leave the old one whole; two
    writers at once, one of theirs."""
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.unfinished")
    try:
        with unfinished.open("x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else a crash of the machine can leave the new name empty
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _build(cls, tree, prefix: str):
    if not hasattr(tree, "keys"):
        raise UserError(f"config key '{prefix[:-1]}' must be a group of keys, got {tree!r}")
    fields = typing.get_type_hints(cls)
    for key in tree:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(fields)}"
            raise UserError(f"unknown config key '{prefix}{key}'; {hint}")
    missing = [key for key in fields if key not in tree]
    if missing:
        raise UserError(f"config key '{prefix}{missing[0]}' is missing; set it in the experiment file")
    return cls(**{key: _value(kind, tree[key], prefix + key) for key, kind in fields.items()})


def _value(kind, value, name: str):
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, name + ".")
    if typing.get_origin(kind) is dict:
        if not hasattr(value, "keys"):
            raise UserError(f"config key '{name}' must map names to numbers, got {value!r}")
        return {k: _value(float, value[k], f"{name}.{k}") for k in value}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"config key '{name}' must be {kind.__name__}, got {value!r}")
    if name in PATHS:
        try:
            return paths.local(value)
        except UserError as e:
            raise UserError(f"{name} = {value!r}: {e}") from e
    return value


def _get(cfg, dotted: str):
    for part in dotted.split("."):
        cfg = getattr(cfg, part)
    return cfg


def _check_choices(cfg: Config) -> None:
    for name, choices in CHOICES.items():
        if _get(cfg, name) not in choices:
            raise UserError(f"{name} = {_get(cfg, name)!r}; choices: {', '.join(choices)}")


def _divides(cfg: Config, small: str, large: str) -> None:
    a, b = _get(cfg, small), _get(cfg, large)
    if b % a:
        raise UserError(f"{small} = {a} must divide {large} = {b}")


INT32, UINT32, FLOAT32 = 2**31 - 1, 2**32 - 1, (2.0**-126, 2.0**128)  # what the devices count and compute in


def check_number(name: str, value: float, may_be_zero: bool = False, most: int = INT32) -> None:
    """Raises UserError where a number is not positive (or 0, where that means off), not finite, or one that
    the devices do not hold: JAX takes seed 2^32 for seed 0.
    """
    if not (0 < value < math.inf or (value == 0 and may_be_zero)):  # NaN is neither
        raise UserError(f"{name} = {value} must be positive and finite")
    if isinstance(value, int) and value > most:
        raise UserError(f"{name} = {value} must be at most {most}")
    if isinstance(value, float) and value and not FLOAT32[0] <= value < FLOAT32[1]:
        raise UserError(f"{name} = {value} must be between 1.2e-38 and 3.4e+38, as float32 is")


def _check_numbers(cfg: Config) -> None:
    may_be_zero = {"seed", "data.jitter", "optimizer.warmup_steps", "optimizer.weight_decay",
                   "optimizer.ema_decay", "train.eval_every", "train.diagnostics_every",
                   "autoencoder.kl_weight", "data.caption_dropout", "data.image_first_fraction",
                   "data.image_share", "diffusion.loss_weight", "sampling.guidance_scale",
                   "autoencoder.num_blocks"}
    for group in dataclasses.fields(cfg):
        value = getattr(cfg, group.name)
        leaves = vars(value).items() if dataclasses.is_dataclass(value) else [("", value)]
        for key, leaf in leaves:
            name = f"{group.name}.{key}".rstrip(".")
            if name == "mesh.fsdp" and leaf == -1:
                continue
            if isinstance(leaf, int | float):
                check_number(name, leaf, name in may_be_zero, UINT32 if name == "seed" else INT32)


def _check_together(cfg: Config) -> None:
    if cfg.train.num_steps * cfg.train.batch_size > INT32:  # rows are numbered in int32
        raise UserError(f"train.num_steps = {cfg.train.num_steps} x train.batch_size = {cfg.train.batch_size} "
                        f"must be at most {INT32} rows")
    _divides(cfg, "model.num_heads", "model.d_model")
    _divides(cfg, "model.num_kv_heads", "model.num_heads")
    _divides(cfg, "model.patch_size", "model.latent_size")
    _divides(cfg, "train.num_microbatches", "train.batch_size")
    if cfg.data.seq_len < 2:
        raise UserError(f"data.seq_len = {cfg.data.seq_len} must be at least 2: <bos> and a token")
    if cfg.model.head_dim % 2:
        raise UserError(f"model.d_model / model.num_heads = {cfg.model.head_dim} must be even for RoPE")
    for name in ("data.image_share", "data.caption_dropout", "data.image_first_fraction",
                 "data.image_first_max_t", "optimizer.ema_decay"):
        if _get(cfg, name) > 1:
            raise UserError(f"{name} = {_get(cfg, name)} must be at most 1")
    if cfg.optimizer.b2 >= 1 - 2**-25:  # 1 in float32, and a division by 1 - b2^n
        raise UserError(f"optimizer.b2 = {cfg.optimizer.b2} must be below 1")
    if cfg.sampling.num_inference_steps > cfg.diffusion.num_timesteps:
        raise UserError(f"sampling.num_inference_steps = {cfg.sampling.num_inference_steps} must be at "
                         f"most diffusion.num_timesteps = {cfg.diffusion.num_timesteps}")
    if not cfg.data.mixture or min(cfg.data.mixture.values()) < 0 or not (
            0 < sum(cfg.data.mixture.values()) < math.inf):
        raise UserError("data.mixture must give at least one source a positive share, and none a negative one")
