"""The folder that is written, gone on with and put in its place; and nothing is deleted that is not ours."""

import os

import pytest

from tfusion.errors import UserError
from tfusion.preparing.unfinished import MARK, PLAN, begun, check, complete

OLD, NEW = {"of": "old"}, {"of": "new"}


def tree(folder) -> dict:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def fill(root, text: str) -> None:
    plan = {"of": text}
    with begun(root, plan) as folder:
        if folder:
            (folder / "meta.json").write_text(text)
            complete(root, plan, lambda folder: None)


def test_data_are_replaced_at_the_end_alone(tmp_path):
    root = tmp_path / "deep" / "data"
    fill(root, "old")
    with pytest.raises(KeyboardInterrupt), begun(root, NEW) as folder:
        (folder / "meta.json").write_text("half")
        raise KeyboardInterrupt
    assert (root / "meta.json").read_text() == "old"
    fill(root, "new")
    assert (root / "meta.json").read_text() == "new" and (root / MARK).read_text() == f"meta.json\n{PLAN}\n"
    assert names(root.parent) == ["data"]


def test_what_was_begun_is_gone_on_with(tmp_path, capsys):
    for text in ("a", "b"):
        with begun(tmp_path / "data", NEW) as folder:
            assert (folder / "a").exists() == (text == "b")
            (folder / text).write_text(text)
    complete(tmp_path / "data", NEW, lambda folder: (folder / "c").write_text("c"))
    assert not capsys.readouterr().err
    assert {"a", "b", "c"} <= tree(tmp_path / "data").keys() and names(tmp_path) == ["data"]


def test_what_was_begun_of_something_else_is_begun_anew_with_a_line(tmp_path, capsys):
    with begun(tmp_path / "data", OLD) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a").write_text("a")
    with begun(tmp_path / "data", NEW) as folder:
        assert not (folder / "deep").exists()
    assert "data.unfinished was made of other sources, another tokenizer or another codec: begun anew" in (
        capsys.readouterr().err)


def test_killed_while_it_is_emptied(tmp_path, monkeypatch):
    """What is half deleted is not gone on with, not even by those who began it."""
    with begun(tmp_path / "data", OLD) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a").write_text("a")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with begun(tmp_path / "data", NEW):
            pass
    with begun(tmp_path / "data", OLD) as folder:
        assert not (folder / "deep").exists()


def test_what_is_made_already_is_left_as_it_is(tmp_path):
    fill(tmp_path / "data", "new")
    before = tree(tmp_path)
    with begun(tmp_path / "data", NEW) as folder:
        assert folder is None
    assert tree(tmp_path) == before


def test_workers_side_by_side(tmp_path):
    """Whoever is last completes; whoever comes later finds it done."""
    root = tmp_path / "data"
    with begun(root, NEW, 0, 2) as one, begun(root, NEW, 1, 2) as two:
        assert one == two
        with pytest.raises(UserError, match="is being written by another process"), begun(root, NEW, 1, 2):
            pass
        with pytest.raises(UserError, match="is being written by another process"), begun(root, NEW, 0, 1):
            pass
        with pytest.raises(UserError, match="is being written by another process"), begun(root, OLD, 2, 2):
            pass
        assert (one / PLAN).exists()
        (one / "a").write_text("a")
        complete(root, NEW, lambda folder: None)
        complete(root, NEW, lambda folder: 1 / 0)  # another one has done it
    with begun(root, NEW, 1, 2) as folder:
        assert folder is None
    assert names(tmp_path) == ["data"] and names(root) == [".lock", MARK, "a", PLAN]


@pytest.mark.parametrize("end", ["", ".unfinished", ".old"])
def test_a_folder_of_the_users_is_left_as_it_is(tmp_path, end):
    (tmp_path / f"mine{end}").mkdir()
    (tmp_path / f"mine{end}" / "thesis.txt").write_text("all of it")
    (tmp_path / f"mine{end}" / "meta.json").write_text("{}")  # external latents have one too
    before = tree(tmp_path)
    for call in (lambda: fill(tmp_path / "mine", "new"), lambda: check(tmp_path / "mine")):
        with pytest.raises(UserError, match=rf"mine{end} holds .* `python -m tfusion.prepare` did not make"):
            call()
    assert tree(tmp_path) == before


def test_the_working_folder_is_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="did not make"):
        fill(".", "new")
    with pytest.raises(UserError, match="did not make"):
        fill(tmp_path / "thesis.txt", "new")
    assert tree(tmp_path) == {"thesis.txt": "all of it"}


def test_a_symlink_goes_on_pointing_to_the_data(tmp_path):
    fill(tmp_path / "disk", "old")
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    fill(tmp_path / "data", "new")
    assert (tmp_path / "data").is_symlink() and (tmp_path / "disk" / "meta.json").read_text() == "new"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("all of it")
    os.remove(tmp_path / "data")
    (tmp_path / "data").symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"theirs holds thesis\.txt that"):
        fill(tmp_path / "data", "new")


@pytest.mark.parametrize("name", ["notes.txt", "photos/train/tokens.npy"])
def test_what_the_user_added_to_our_folder_is_left_too(tmp_path, name):
    root = tmp_path / "data"
    fill(root, "old")
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("mine")
    before = tree(root)
    with pytest.raises(UserError, match=f"data holds {name} that `python -m tfusion.prepare` did not make"):
        fill(root, "new")
    assert tree(root) == before


def test_what_the_user_adds_meanwhile_is_left_too(tmp_path):
    root = tmp_path / "data"
    fill(root, "old")
    with pytest.raises(UserError, match=r"notes\.txt"), begun(root, NEW):
        (root / "notes.txt").write_text("mine")
        complete(root, NEW, lambda folder: None)
    assert (root / "notes.txt").read_text() == "mine" and (root / "meta.json").read_text() == "old"


def test_killed_between_the_two_moves(tmp_path, monkeypatch):
    """The old data come back by themselves, and the next one goes on."""
    root = tmp_path / "data"
    fill(root, "old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        real = os.replace

        def killed(a, b):
            if str(b) == str(root):
                raise KeyboardInterrupt
            real(a, b)

        patch.setattr(os, "replace", killed)
        fill(root, "new")
    assert not root.exists()
    check(root)
    assert (root / "meta.json").read_text() == "old"
    complete(root, NEW, lambda folder: None)
    assert (root / "meta.json").read_text() == "new" and names(tmp_path) == ["data"]


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "data").mkdir()
    fill(tmp_path / "data", "new")
    assert (tmp_path / "data" / "meta.json").read_text() == "new"
