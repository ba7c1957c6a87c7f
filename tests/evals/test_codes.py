"""The usage of codes, by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from tfusion import inference
from tfusion.evals import codes
from tfusion.evals.base import Options


def test_perplexity_is_of_those_that_occur():
    assert codes.perplexity(np.array([5, 5, 0, 5, 5])) == pytest.approx(4)
    assert codes.perplexity(np.array([0, 7])) == 1
    assert codes.perplexity(np.array([2, 1, 1])) == pytest.approx(np.exp(1.5 * np.log(2)))


def test_usage_on_held_out_pictures(cfg, tmp_path, monkeypatch):
    """Code k of a picture is its number, over a codebook of five: three pictures use three of them."""
    decoder = inference.Decoder(num_codes=5, image_size=32, codes=lambda run, pictures: np.broadcast_to(
        np.arange(len(pictures), dtype=np.int32)[:, None, None], (len(pictures), 4, 4)))
    monkeypatch.setattr(inference, "decoder", lambda run: decoder)
    figures = codes.run(SimpleNamespace(cfg=cfg), tmp_path, Options(number=3))
    assert figures["code_usage"]["value"] == 3 / 5 and figures["code_usage"]["n"] == 5
    assert figures["code_perplexity"]["value"] == pytest.approx(3) and figures["code_perplexity"]["n"] == 3
    (section,) = json.loads((tmp_path / "card.json").read_text())["sections"]
    assert section["blocks"][0]["rows"] == [[5, 3, pytest.approx(3), pytest.approx(1 / 3), 48]]
