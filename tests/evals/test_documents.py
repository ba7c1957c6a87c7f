"""The data's own held-out documents: what is a pair, whose picture stands beside whose caption."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from tfusion import inference
from tfusion.data.tokenizers import load_tokenizer
from tfusion.errors import UserError
from tfusion.evals import documents, reconstructions
from tfusion.evals.base import LeftOut, Options
from tfusion.inference.trained import Trained
from tfusion.objectives.base import Aux

PHOTO = [np.full((32, 32, 3), 10 * i, np.uint8) for i in range(8)]
BROKEN = "broken"


class Records(list):
    """One that is broken raises when it is read."""

    def __getitem__(self, i):
        record = super().__getitem__(i)
        if record is BROKEN:
            raise UserError("cannot be read")
        return record


@dataclasses.dataclass(frozen=True)
class Spec:
    kind: str
    records: object
    share: float = 1.0

    @property
    def takes_part(self) -> bool:
        return self.share > 0

    def open(self, split, image_size=None):
        assert split == "heldout" and image_size == 32
        if isinstance(self.records, Exception):
            raise self.records
        return Records(self.records)


@pytest.fixture
def make_run(cfg, monkeypatch):
    """A run on sources of the given specs that draws what its texts are long, and tells what is bright."""
    def grey(value):
        return np.full((32, 32, 3), value, np.uint8)

    decoder = inference.Decoder(
        draw=lambda run, texts, seed: np.stack([grey(len(text) + seed) for text in texts]),
        describe=lambda run, pictures: [f"a picture of {x.mean():.0f}" for x in pictures],
        go_on=lambda run, parts, **options: [["a", PHOTO[i % 3], "b"] if i % 5 == 0 else [PHOTO[7]] * (i % 2)
                                             for i in range(len(parts))],
        reconstruct=lambda run, pictures: pictures, image_size=32)
    monkeypatch.setattr(inference, "decoder", lambda run: decoder)

    def make(**specs):
        data = dataclasses.replace(cfg.data, sources=specs)
        return Trained(dataclasses.replace(cfg, data=data), {}, SimpleNamespace(image_size=32),
                       load_tokenizer("byte"), 1, {}, Aux(1, {}, {}))
    return make


def card(folder):
    (section,) = json.loads((folder / "card.json").read_text())["sections"]
    with np.load(folder / "card.npz") as file:
        return section["blocks"][0], {name: file[name] for name in file.files}


def test_pairs_are_one_text_and_one_picture(make_run):
    run = make_run(
        photos=Spec("folder", [["one", PHOTO[1]], BROKEN, [PHOTO[2], "two"], ["x", PHOTO[3], "y"], [PHOTO[4]],
                                  ["longer than a row" * 20, PHOTO[0]]]),
        notes=Spec("jsonl", [["text alone"], ["three", PHOTO[5]]]), scenes=Spec("scenes", [["no", PHOTO[6]]]),
        unused=Spec("folder", [["not", PHOTO[6]]], share=0.0), written=Spec("prepared", UserError("not raw")))
    texts, pictures = documents.pairs(run, 10)
    assert texts == ["three", "one", "two"] and [int(x.mean()) for x in pictures] == [50, 10, 20]
    assert documents.pairs(run, 2)[0] == ["three", "one"]  # equally many of each source


def test_without_pairs_it_says_why(make_run):
    with pytest.raises(LeftOut, match="no held-out document is one text and one picture, but for scenes"):
        documents.pairs(make_run(notes=Spec("jsonl", [["text"]]), scenes=Spec("scenes", [["a", PHOTO[1]]])), 4)
    with pytest.raises(LeftOut, match="/photos is not there"):
        documents.pairs(make_run(photos=Spec("folder", UserError("/photos is not there"))), 4)


def test_captions_are_drawn_beside_their_own_pictures(make_run, tmp_path):
    run = make_run(photos=Spec("folder", [["a", PHOTO[1]], ["abc", PHOTO[2]]]))
    assert documents.drawn(run, tmp_path, Options(seed=100)) == {}
    block, arrays = card(tmp_path)
    assert [item["caption"] for item in block["items"]] == ["a", "abc"]
    assert [int(x.mean()) for x in arrays[block["above"]]] == [10, 20]
    assert [int(x.mean()) for x in arrays[block["below"]]] == [101, 103]


def test_pictures_are_described_beside_their_own_captions(make_run, tmp_path):
    run = make_run(photos=Spec("folder", [["a", PHOTO[1]], ["b", PHOTO[2]]]))
    assert documents.described(run, tmp_path, Options()) == {}
    block, arrays = card(tmp_path)
    assert block["items"] == [{"caption": "a picture of 10", "remark": "its own: a"},
                              {"caption": "a picture of 20", "remark": "its own: b"}]
    assert [int(x.mean()) for x in arrays[block["images"]]] == [10, 20]


def test_documents_with_most_pictures_are_shown(make_run, tmp_path):
    documents.from_nothing(make_run(), tmp_path, Options())
    block, arrays = card(tmp_path)
    assert len(block["documents"]) == documents.CHOSEN and len(arrays["images"]) == documents.CHOSEN
    assert block["documents"][0] == [{"text": "a"}, {"image": 0}, {"text": "b"}]
    assert [parts[0].get("image") for parts in block["documents"][1:3]] == [1, 2]


def test_reconstructions_of_any_pictures(make_run, tmp_path):
    run = make_run(photos=Spec("folder", [["a", x] for x in PHOTO]), notes=Spec("jsonl", [["text"]]))
    figures = reconstructions.run(run, tmp_path, Options(number=4))
    assert figures["autoencoder_psnr"]["n"] == 4 and len(card(tmp_path)[1]["images"]) == 4
    with pytest.raises(LeftOut, match="none of these has pictures"):
        reconstructions.run(make_run(notes=Spec("jsonl", [["text"]])), tmp_path, Options())


def test_reconstructions_are_measured_by_hand():
    """Half of the pixels off by 51, that is by 0.4 of -1..1: L1 0.2, MSE 0.08."""
    images = np.zeros((2, 4, 4, 3), np.uint8)
    again = images.copy()
    again[:, :2] += 51
    values = {name: figure["value"] for name, figure in reconstructions.errors(images, again).items()}
    assert values == pytest.approx({"autoencoder_psnr": 10 * np.log10(2 * 25), "autoencoder_l1": 0.2,
                                    "autoencoder_mse": 0.08})


def test_what_is_found_again_in_reconstructed_scenes(cfg):
    run = SimpleNamespace(cfg=cfg)
    real = reconstructions.held_out(run, 12)
    half = real * (np.arange(12) < 6).astype(np.uint8)[:, None, None, None]
    for images, share in ((real, 1.0), (half, 0.5)):
        found = reconstructions.sprites(run, images)["autoencoder_sprites"]
        assert found["value"] == share and found["n"] == 12
