"""The verb `sample`: its flags, what prompts become, and what is written. The model is a stand-in."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.conftest import import_verb
from tfusion.data import layout
from tfusion.data.tokenizers import load_tokenizer
from tfusion.errors import UserError
from tfusion.inference import documents, trained

sample = import_verb("sample")

FLAGS = {name: flag.value for name, flag in vars(sample).items() if isinstance(flag, SimpleNamespace)}
TEXT, PICTURE = layout.text([98, 99]), layout.image(np.zeros((4, 4, 4), np.float32))


class Verb:
    """`sample` with flags given by name; records what the model is asked for."""

    def __init__(self, cfg, folder, monkeypatch):
        self.folder, self.tokenizer, self.rows = folder, load_tokenizer("byte"), []
        def encode(images):
            assert images.shape[1:] == (32, 32, 3)
            return np.zeros((len(images), 4, 4, 4), np.float32)

        codec = SimpleNamespace(image_size=32, encode=encode,
                                decode=lambda latents: np.zeros((len(latents), 32, 32, 3), np.uint8))
        monkeypatch.setattr(sample.distributed, "start_process", lambda: None)
        run = trained.Trained(cfg, {}, codec, self.tokenizer, 6, {}, None)
        monkeypatch.setattr(sample.trained, "load", lambda *a: run)
        monkeypatch.setattr(documents.transfusion, "generate", self.generate)
        self.patch = monkeypatch

    def generate(self, cfg, params, prompts, **settings):
        self.cfg, self.prompts, self.settings = cfg, prompts, settings
        return self.rows or [[TEXT]] * len(prompts)

    def __call__(self, **given):
        assert given.keys() <= FLAGS.keys()
        for name, value in (FLAGS | {"WORKDIR": str(self.folder)} | given).items():
            self.patch.setattr(sample, name, SimpleNamespace(value=value))
        sample.main()

    def documents(self):
        return [json.loads(x) for x in (self.folder / "samples" / "documents.jsonl").read_text().splitlines()]


@pytest.fixture
def verb(cfg, tmp_path, monkeypatch):
    return Verb(cfg, tmp_path, monkeypatch)


@pytest.mark.parametrize(("flags", "line"), [
    (dict(GUIDANCE=float("nan")), "sampling.guidance_scale = nan must be 0 or more and finite"),
    (dict(GUIDANCE=float("inf")), "sampling.guidance_scale = inf must be 0 or more and finite"),
    (dict(TEMPERATURE=float("nan")), "--temperature = nan must be 0 or more and finite"),
    (dict(TEMPERATURE=float("inf")), "--temperature = inf must be 0 or more and finite"),
    (dict(STEPS=1001), "sampling.num_inference_steps = 1001 must be at most process.num_timesteps = 1000"),
    (dict(DRAW=True, MAX_IMAGES=0), "--draw and --max_images=0 exclude each other")])
def test_flags_are_held_to_the_configs_rules(verb, flags, line):
    with pytest.raises(UserError, match=line):
        verb(PROMPTS=["a"], **flags)
    assert not (verb.folder / "samples").exists()


def test_flags_that_were_given_replace_the_configs(verb, cfg):
    verb(PROMPTS=["a"])
    assert verb.cfg.sampling == cfg.sampling
    verb(PROMPTS=["a"], GUIDANCE=0.0, SAMPLER="ddpm", STEPS=7, SEED=5, TEMPERATURE=0.5)
    assert (verb.cfg.sampling.guidance_scale, verb.cfg.sampling.sampler) == (0.0, "ddpm")
    assert verb.cfg.sampling.num_inference_steps == 7
    assert verb.settings == {"seed": 5, "temperature": 0.5, "max_images": None}
    assert verb.cfg.model == cfg.model and verb.cfg.data == cfg.data


def test_white_space_around_a_prompt_is_no_part_of_it(verb):
    verb(PROMPTS=["a fox ", "\ta fox\n", "a fox"])
    plain = verb.tokenizer.encode("a fox")
    assert [[part.values.tolist() for part in prompt] for prompt in verb.prompts] == [[plain]] * 3
    assert [d["prompt"] for d in verb.documents()] == ["a fox"] * 3


def test_what_earlier_commands_left_stays(verb):
    """Rows are numbered on, also where documents.jsonl or pictures were deleted; other files do not count."""
    folder, row = verb.folder / "samples", [PICTURE, TEXT, PICTURE]
    verb.rows = [[TEXT], row]
    verb(PROMPTS=["a", "b"])
    (folder / "001_0.png").write_bytes(b"mine")
    verb.rows = [row]
    verb(PROMPTS=["c"])
    (folder / "900_0.png.txt").touch()
    verb(NUM_DOCUMENTS=1)
    assert [d["prompt"] for d in verb.documents()] == ["a", "b", "c", ""]
    named = [part["image"] for d in verb.documents() for part in d["parts"] if "image" in part]
    assert named == sorted(path.name for path in folder.glob("*.png")) == [
        f"00{row}_{number}.png" for row in (1, 2, 3) for number in (0, 1)]
    assert (folder / "001_0.png").read_bytes() == b"mine"
    (folder / "documents.jsonl").unlink()
    verb(PROMPTS=["d"])
    assert verb.documents()[0]["parts"][0] == {"image": "004_0.png"}
    for path in folder.glob("*.png"):
        path.unlink()
    verb(PROMPTS=["e"])
    assert verb.documents()[1]["parts"][0] == {"image": "001_0.png"}


def test_a_folder_that_cannot_be_written_is_seen_before_any_sampling(verb):
    (verb.folder / "file").touch()
    with pytest.raises(UserError, match=r"--out=.*/file/x is not writable \(Not a directory\); choose another"):
        verb(PROMPTS=["a"], OUT=f"{verb.folder}/file/x")
    assert not hasattr(verb, "prompts")


def test_draw_starts_a_picture_after_every_prompt(verb, cfg, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    for draw, end in ((False, []), (True, [cfg.vocabulary.boi])):
        verb(PROMPTS=["a"], IMAGES=[str(tmp_path / "x.png")], NUM_DOCUMENTS=1, DRAW=draw)
        text, picture, nothing = verb.prompts
        assert [x for part in text for x in part.values.tolist()] == [*verb.tokenizer.encode("a"), *end]
        assert picture[0].values.shape == (4, 4, 4) and [p.values.tolist() for p in picture[1:]] == [end] * draw
        assert [p.values.tolist() for p in nothing] == [end] * draw


@pytest.mark.parametrize(("rows", "flags", "said"), [
    ([[TEXT], [PICTURE, TEXT]], {}, "no picture for 1 of 2 prompts"),
    ([[TEXT], []], {}, "no picture for 2 of 2 prompts"),
    ([[PICTURE], [PICTURE, TEXT]], {}, None),
    ([[TEXT], [TEXT]], {"MAX_IMAGES": 0}, None)])
def test_prompts_without_a_picture_are_told(verb, capsys, rows, flags, said):
    verb.rows = rows
    verb(PROMPTS=["a", "b"], **flags)
    error = capsys.readouterr().err
    assert (f"{said}, the model wrote text: --draw starts one" in error) if said else error == ""


def test_describing_asks_for_no_picture(verb, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    verb(IMAGES=[str(tmp_path / "x.png")], NUM_DOCUMENTS=1)
    assert capsys.readouterr().err == ""


def test_a_terminal_that_knows_ascii_only_loses_nothing(verb, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    verb.rows = [[layout.text(verb.tokenizer.encode("für 猫")), PICTURE, layout.text([])]]
    verb(PROMPTS=["café"])
    (document,) = verb.documents()
    assert (document["prompt"], document["step"]) == ("café", 6)
    assert document["parts"] == [{"text": "für 猫"}, {"image": "000_0.png"}, {"text": ""}]
    stdout.seek(0)
    assert stdout.read().startswith("caf? -> f?r ? [000_0.png]")
