"""The Chameleon baseline (arXiv 2405.09818, as arXiv 2408.11039 compares with it): one next-token loss, on
text and on images, which are codes of a VQ tokenizer; everything causal.

    L = mean over scored positions of -log p(next token) + z_loss_weight * (log Z)^2

Its share on text, lm_loss, is the same mean over the same tokens as Transfusion's, over the full softmax.

B batch, T tokens, N codes per image.
"""

import dataclasses
import math

import jax.numpy as jnp

from tfusion.config import RunConfig, fraction, group, number
from tfusion.data import layout
from tfusion.data.config import DataConfig, RowFormat
from tfusion.errors import UserError
from tfusion.models import flops
from tfusion.models.language import LanguageConfig, LanguageModel
from tfusion.models.lm_head import Scoring, token_losses
from tfusion.models.masks import row_sight
from tfusion.objectives import packed
from tfusion.objectives.base import Aux, Objective, register
from tfusion.types import Batch


@dataclasses.dataclass(frozen=True)
class ChameleonModelConfig(LanguageConfig):
    num_codes: int  # K: behind BOI and EOI, code k is the id V + 2 + k
    codes_per_image: int  # N, of a square

    def check(self, name: str) -> None:
        super().check(name)
        if math.isqrt(self.codes_per_image) ** 2 != self.codes_per_image:
            raise UserError(f"{name}.codes_per_image = {self.codes_per_image} must be a square, such as 1024 "
                            "= 32 x 32, as pictures are")

    @property
    def num_patches(self) -> int:
        return self.codes_per_image

    @property
    def vocab_size(self) -> int:
        return super().vocab_size + self.num_codes


@dataclasses.dataclass(frozen=True)
class CodeSamplingConfig:
    """Of an image's codes."""

    temperature: float = number(zero=True)  # 0 = the likeliest code each time
    top_p: float = fraction(zero=False)  # drawn among the likeliest that reach this together
    guidance_scale: float = number(zero=True)  # 1 = off


@dataclasses.dataclass(frozen=True)
class ChameleonConfig(RunConfig):
    model: ChameleonModelConfig
    z_loss_weight: float = number(zero=True, may_change=True)
    data: DataConfig
    sampling: CodeSamplingConfig = group(may_change=True)

    @property
    def vocabulary(self) -> layout.Vocabulary:
        return layout.Vocabulary(self.model.text_vocab_size, self.model.codes_per_image, self.model.num_codes)

    @property
    def rows(self) -> RowFormat:
        """What it asks of packed rows."""
        side = math.isqrt(self.model.codes_per_image)
        return RowFormat(self.data, self.vocabulary, (side, side), layout.codes(self.vocabulary))


def make(cfg: ChameleonConfig) -> Objective:
    model = LanguageModel(cfg.model, cfg.data.seq_len)
    scoring = Scoring(cfg.model.vocab_size, cfg.z_loss_weight, cfg.vocabulary.first_code)

    def init(key):
        row = jnp.zeros((1, 1), jnp.int32)
        return model.init(key, row, row_sight(row, row, row))["params"]

    def loss(params, aux: Aux, batch: Batch, key):
        del aux, key
        sight = row_sight(batch.positions_BT, batch.segment_ids_BT, batch.image_ids_BT,
                          cfg.model.image_attention)
        h_BTD = model.apply({"params": params}, batch.tokens_BT, sight)
        head_DV = model.apply({"params": params}, method="lm_head")
        return token_losses(h_BTD, head_DV, batch.tokens_BT, batch.loss_mask_BT, scoring)

    return Objective(init=init, loss=loss, counts=lambda batch: {"token_loss": jnp.sum(batch.loss_mask_BT)},
                     weights={"token_loss": 1.0}, reported=("lm_loss", "code_loss"))


def model_flops(cfg: ChameleonConfig, n: flops.Counts) -> dict:
    """{part: FLOPs of forward and backward}."""
    return flops.transformer_flops(cfg.model, cfg.model.vocab_size, n)


register("chameleon", packed.kind(ChameleonConfig, make, model_flops))
