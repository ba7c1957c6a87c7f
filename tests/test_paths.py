"""Paths are taken as their user means them: `~` is the home folder, a URL never becomes a folder's name."""

import itertools
import os

import pytest
from absl.flags import FlagValues, IllegalFlagValueError
from etils import epath

from experiments import quickstart
from tests.conftest import InMemory
from tests.kills import killed_at
from tfusion import config, paths
from tfusion.errors import UserError

URLS = ["gs://bucket/run", "s3://bucket", "file:///tmp/x", "file:/tmp/x", "https://host/x.png", "GS://b",
        "hf://datasets/x", "abfs+ssl://x"]


@pytest.mark.parametrize("text", URLS)
def test_urls_are_refused_where_a_local_path_is_needed(text):
    with pytest.raises(UserError, match="a local path is needed here; a bucket can be mounted"):
        paths.local(text)


@pytest.fixture
def gcsfs(monkeypatch):
    """As if the package were installed; nothing here reaches a bucket."""
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: {"gcsfs": "it"}.get(name))


def test_a_bucket_where_one_will_do(gcsfs, monkeypatch):
    assert paths.anywhere("gs://bucket/run") == "gs://bucket/run" and paths.anywhere("run") == "run"
    assert paths.in_bucket("gs://bucket/run") and not paths.in_bucket("/gs/run")
    assert paths.absolute("gs://bucket/run") == "gs://bucket/run" == str(paths.path("gs://bucket/run"))
    for text in [text for text in URLS if not text.startswith("gs:")]:
        with pytest.raises(UserError, match=r"a local path is needed, or one that begins with gs://$"):
            paths.anywhere(text)
    with pytest.raises(UserError, match="the bucket has no name"):
        paths.anywhere("gs://")
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package gcsfs: pip install gcsfs, or tfusion\[buckets\]"):
        paths.anywhere("gs://bucket/run")


@pytest.mark.parametrize("text", ["", " ", "a\0b"])
def test_what_names_nothing(text):
    with pytest.raises(UserError, match="a path is needed"):
        paths.local(text)


@pytest.mark.parametrize("text", ["run", "/tmp/run", "./~", "a~", "a:b", "data/2024-01-01T10:00", "default",
                                  "../x", "C:/x"])
def test_others_are_left_as_they_are(text):
    assert paths.local(text) == text


def test_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/me")
    assert paths.local("~/run1") == "/home/of/me/run1" and paths.local("~") == "/home/of/me"
    with pytest.raises(UserError, match=r"no such home folder is known here; write the path in full"):
        paths.local("~nobody-of-that-name/run1")


def test_no_home_folder_at_all(monkeypatch):
    """A uid that the system does not know, as in containers."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(UserError, match="no such home folder is known here"):
        paths.local("~/run1")


def test_flags(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/me")
    values = FlagValues()
    paths.define("workdir", None, "", flag_values=values)
    values(["verb", "--workdir=~/run1"])
    assert values.workdir == "/home/of/me/run1"
    with pytest.raises(IllegalFlagValueError, match="flag --workdir=gs://b/run: a local path is needed here"):
        values(["verb", "--workdir=gs://b/run"])


@pytest.mark.parametrize("name", ["data.prepared", "data.tokenizer"])
def test_the_config(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/me")
    tree, key = quickstart.get_config(), name.removeprefix("data.")
    tree.data[key] = "~/x"
    cfg = config.from_dict(tree)
    assert getattr(cfg.data, key) == "/home/of/me/x"
    assert config.from_dict(cfg.to_dict()) == cfg
    tree.data[key] = "gs://bucket/x"
    with pytest.raises(UserError) as e:
        config.from_dict(tree)
    assert str(e.value) == (
        f"{name} = 'gs://bucket/x': a local path is needed here; a bucket can be mounted (docs/data.md)")


def test_a_folder_is_deleted_its_mark_last(tmp_path):
    """Killed at any change: what is left has its mark, or is empty. In whatever order the disk lists files."""
    for change in itertools.count():
        folder = tmp_path / f"{change}"
        (folder / "deep").mkdir(parents=True)
        for name in ("mark", "deep/x", *map(str, range(30))):
            (folder / name).touch()
        killed = killed_at(change, lambda folder=folder: paths.delete(folder, "mark"))
        left = os.listdir(folder) if folder.exists() else []
        assert "mark" in left or not left, change
        if not killed:
            break
    assert not folder.exists() and change > 30
    paths.delete(folder, "mark")  # absent


class Listing(InMemory):
    """Keeps listings as gcsfs does, and goes by its settings."""

    protocol = ("gs", "gcs")

    def ls(self, path, detail=True, **more):
        path = self._strip_protocol(path)
        if (found := self._ls_from_cache(path)) is None:
            found = self.dircache[path] = super().ls(path, detail=True, **more)
        return found if detail else [one["name"] for one in found]


def test_what_others_write_into_a_bucket_is_seen(bucket, monkeypatch):
    other, reader = InMemory(skip_instance_cache=True), Listing(skip_instance_cache=True)
    monkeypatch.setattr(epath.backend.fsspec_backend, "_get_filesystem", lambda name: reader)
    for number in range(3):
        other.pipe(f"{bucket}/{number}", b"x")
        assert len(list(paths.path(bucket).iterdir())) == number + 1
