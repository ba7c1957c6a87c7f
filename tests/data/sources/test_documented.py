"""What docs/data.md shows works as it stands there."""

import re
from pathlib import Path

import pytest
from PIL import Image

import tfusion.objectives  # noqa: F401  registers the kinds of training
from experiments import own_data
from tests.data.sources.conftest import same
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


def test_shares_that_change():
    block, = (x for x in DOCS.read_text().split("```")[1::2] if "share=((0" in x)
    tree, scope = own_data.get_config(), {}
    exec(block, {}, scope)
    tree.data.sources = scope
    shares = {name: source.share for name, source in config.from_dict(tree).data.sources.items()}
    assert set(shares) == {"photos", "notes"} and all(len(share) == 3 for share in shares.values())


def test_what_goes_wrong_names_its_tests():
    """Each fault's line the tests that show its outcome."""
    lines = DOCS.read_text().partition("## What goes wrong")[2].partition("\n## ")[0].split("\n")
    cells = [line.split("|")[3] for line in lines if line.startswith("| ") and "| test |" not in line]
    files = {path.name: path.read_text() for path in DOCS.parents[1].glob("tests/**/test_*.py")}
    for cell in cells:
        named = re.findall(r"`(?:[\w/]*/)?(test_\w+\.py)?(?:::(test_\w+))?`", cell)
        assert named and named[0][0], cell
        for file, test in named:
            texts = [files[file]] if file else list(files.values())
            assert not test or any(f"def {test}(" in text for text in texts), (file, test)


def test_another_kind(tmp_path, monkeypatch):
    monkeypatch.setitem(config.REGISTRY, "source", dict(config.REGISTRY["source"]))
    exec(next(block for block in blocks() if "@config.register" in block), {"__name__": "documented"})
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    tree = own_data.get_config()
    tree.data.sources = {"mine": dict(kind="lines", share=1.0, path=str(tmp_path / "a.txt"))}
    source = config.from_dict(tree).data.sources["mine"]
    both = [list(records(source.open(split), "mine")) for split in ("train", "heldout")]
    assert sorted(text for split in both for (text,) in split) == ["one", "three", "two"] and len(both[1]) == 1


def run(block: str, folder) -> None:
    """What docs/data.md shows, with its /data elsewhere."""
    exec(block.replace('"/data/', f'"{folder}/'), {"__name__": "documented"})


def test_the_same_pictures_written_as_array_record_and_by_tfds(tmp_path):
    """As it stands there; TFDS shuffles what it writes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(9):
        Image.new("RGB", (9, 6), (i, 20 * i, 0)).save(folder / f"{i}.jpg")
        (folder / f"{i}.txt").write_text(f"a photo of {i}\n")
    run(next(block for block in blocks() if "ArrayRecordWriter" in block), tmp_path)
    run(next(block for block in blocks() if "GeneratorBasedBuilder" in block), tmp_path)
    tree = own_data.get_config("photos=folder,shards=array_record,set=tfds")
    for name, path in (("photos", "photos"), ("shards", "pairs"), ("set", "tfds/pairs/1.0.0")):
        tree.data.sources[name].update(path=str(tmp_path / path), heldout_fraction=0.3)
    tree.data.sources.set.key = "key"
    sources = config.from_dict(tree).data.sources
    for split in ("train", "heldout"):
        read = {name: list(records(source.open(split, 4), name)) for name, source in sources.items()}
        read["set"].sort(key=lambda record: record[0])
        assert len(read["photos"]) == len(read["shards"]) == len(read["set"]) > 1
        assert all(same(a, b) and same(a, c) for a, b, c in zip(*read.values()))


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
