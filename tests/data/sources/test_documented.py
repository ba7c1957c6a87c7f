"""What docs/data.md shows works as it stands there."""

import re
from pathlib import Path

import pytest

import tfusion.objectives  # noqa: F401  registers the kinds of training
from experiments import own_data
from tfusion import config
from tfusion.data.sources import records
from tfusion.data.tokenizers import load_tokenizer

DOCS = Path(__file__).parents[3] / "docs" / "data.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)


def test_the_experiment():
    scope = {}
    exec(next(block for block in blocks() if "get_config" in block), scope)
    sources = config.from_dict(scope["get_config"]()).data.sources
    assert {name: type(source).__name__ for name, source in sources.items()} == {
        "photos": "FolderSource", "notes": "JsonlSource"}
    assert sources["notes"].path == "/data/notes/*.jsonl.gz" and sources["photos"].share == 0.7


def test_another_kind(tmp_path, monkeypatch):
    monkeypatch.setitem(config.REGISTRY, "source", dict(config.REGISTRY["source"]))
    exec(next(block for block in blocks() if "@config.register" in block), {"__name__": "documented"})
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    tree = own_data.get_config()
    tree.data.sources = {"mine": dict(kind="lines", share=1.0, path=str(tmp_path / "a.txt"))}
    source = config.from_dict(tree).data.sources["mine"]
    both = [list(records(source.open(split), "mine")) for split in ("train", "heldout")]
    assert sorted(text for split in both for (text,) in split) == ["one", "three", "two"] and len(both[1]) == 1


def test_words_of_own_data():
    """NAME=KIND names a source, whose path a flag can then give."""
    sources = config.from_dict(own_data.get_config("smoke,pets=folder,autoencoder,notes=jsonl")).data.sources
    assert {name: source.kind for name, source in sources.items()} == {"pets": "folder", "notes": "jsonl"}
    assert [*own_data.get_config().data.sources] == ["photos"]
    for word in ("photos=pictures", "=folder", "my photos=folder", "photos="):
        with pytest.raises(ValueError, match=rf"^variant '{word}': a source is NAME=KIND, once; kinds: "):
            own_data.get_config(word)
    with pytest.raises(ValueError, match=r"^variant 'a=jsonl': a source is NAME=KIND, once"):
        own_data.get_config("a=folder,a=jsonl")
    with pytest.raises(ValueError, match=r"^unknown variant 'photo'; .*; and sources, NAME=KIND: photos=f"):
        own_data.get_config("photo")


def test_captions_fit_as_own_data_says():
    """A hundred words of English beside a picture, in a row."""
    cfg = config.from_dict(own_data.get_config())
    sentence = "Two young guys with shaggy hair look at their hands while hanging out in the yard . "  # 17
    tokens = load_tokenizer(cfg.data.tokenizer).encode(sentence * 6)
    assert len(tokens) + cfg.model.adapter.num_patches + len(("bos", "boi", "eoi", "eos")) <= cfg.data.seq_len
