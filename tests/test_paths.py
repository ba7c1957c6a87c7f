"""Paths are taken as their user means them: `~` is the home folder, a URL never becomes a folder's name."""

import os

import pytest
from absl.flags import FlagValues, IllegalFlagValueError

from experiments import quickstart
from tfusion import config, paths
from tfusion.errors import UserError

URLS = ["gs://bucket/run", "s3://bucket", "file:///tmp/x", "file:/tmp/x", "https://host/x.png", "GS://b",
        "hf://datasets/x", "abfs+ssl://x"]


@pytest.mark.parametrize("text", URLS)
def test_urls_are_refused(text):
    with pytest.raises(UserError, match="cloud paths and URLs are not supported yet; use a local path"):
        paths.local(text)


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
    with pytest.raises(IllegalFlagValueError, match="flag --workdir=gs://b/run: cloud paths and URLs are not"):
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
        f"{name} = 'gs://bucket/x': cloud paths and URLs are not supported yet; use a local path")
