"""The folder that is written, gone on with and put in its place; and nothing is deleted that is not ours."""

import contextlib
import errno
import itertools
import os
import pathlib
import shutil
import threading
import traceback

import pytest

from tests.kills import killed_at
from tfusion.errors import UserError
from tfusion.preparing import unfinished
from tfusion.preparing.unfinished import LOCK, MARK, PLAN, begun, check, complete

OLD, NEW = {"of": "old"}, {"of": "new"}


def tree(folder) -> dict:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def fill(root, text: str) -> None:
    plan = {"of": text}
    with begun(root, plan) as folder:
        if folder:
            (folder / "pairs").mkdir(exist_ok=True)
            (folder / "pairs" / "shard").write_text(text)
            (folder / "meta.json").write_text(text)
    if folder:
        complete(root, plan, lambda folder: True)


def test_data_are_replaced_at_the_end_alone(tmp_path):
    root = tmp_path / "deep" / "data"
    fill(root, "old")
    with pytest.raises(KeyboardInterrupt), begun(root, NEW) as folder:
        (folder / "meta.json").write_text("half")
        raise KeyboardInterrupt
    assert (root / "meta.json").read_text() == "old"
    fill(root, "new")
    assert (root / "meta.json").read_text() == "new"
    assert (root / MARK).read_text() == f"meta.json\npairs/shard\n{PLAN}\n"
    assert names(root.parent) == ["data"]


def test_what_was_begun_is_gone_on_with(tmp_path, capsys):
    for text in ("a", "b"):
        with begun(tmp_path / "data", NEW) as folder:
            assert (folder / "a").exists() == (text == "b")
            (folder / text).write_text(text)
    complete(tmp_path / "data", NEW, lambda folder: bool((folder / "c").write_text("c")))
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


@pytest.fixture
def no_folder_is_renamed(monkeypatch):
    """As by gcsfuse on a bucket without a hierarchical namespace."""
    real = os.replace

    def replace(a, b):
        if os.path.isdir(a):
            raise OSError(errno.ENOSYS, "Function not implemented", str(a))
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "former data"])
def test_where_no_folder_is_renamed_files_are_moved(tmp_path, no_folder_is_renamed, left):
    """Killed at any change: who finds meta.json finds all that it tells of, and the next one goes on."""
    for change in itertools.count():
        root, then = tmp_path / f"{change}" / "data", ("new", "other")[change % 2]
        root.parent.mkdir()
        if left == "an empty folder":
            root.mkdir()
        if left == "former data":
            fill(root, "old")
            (root / "codec").write_text("old")  # the first one that would be deleted
            (root / MARK).write_text((root / MARK).read_text() + "codec\n")
        killed = killed_at(change, lambda root=root: fill(root, "new"))
        found = tree(root) if root.exists() else {}
        assert "meta.json" not in found or found["meta.json"] == found["pairs/shard"], change
        assert found.get("meta.json") != "old" or "codec" in found
        check(root)
        fill(root, then)
        assert names(root.parent) == ["data"] and names(root / "pairs") == ["shard"], change
        assert names(root) == [MARK, "meta.json", "pairs", PLAN], change
        assert {tree(root)[name] for name in ("meta.json", "pairs/shard")} == {then}
        if not killed:
            break
    assert change > 8


def test_a_worker_that_comes_while_files_are_moved_moves_the_rest(tmp_path, no_folder_is_renamed):
    with begun(tmp_path / "data", NEW) as folder:
        for name in ("a", "b", "meta.json"):
            (folder / name).write_text(name)
    for change in itertools.count():
        copy = tmp_path / f"{change}"
        shutil.copytree(folder, copy / "data.unfinished")
        killed = killed_at(change, lambda copy=copy: complete(copy / "data", NEW, lambda folder: True))
        complete(copy / "data", NEW, lambda folder: True)
        with begun(copy / "data", NEW) as left:  # and deletes what is left of the gate
            assert left is None
        assert {"a", "b", "meta.json", PLAN} <= tree(copy / "data").keys() and names(copy) == ["data"], change
        if not killed:
            break


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "former data", "an unfinished folder",
                                  "former data twice"])
def test_killed_at_any_change_and_run_again(tmp_path, left):
    """Whatever stood there, what is found is whole, and the same command goes on, or the one before does."""
    for change in itertools.count():
        root, then = tmp_path / f"{change}" / "data", ("new", "other")[change % 2]
        root.parent.mkdir()
        if left == "an empty folder":
            root.mkdir()
        if left.startswith("former data"):
            fill(root, "old")
        if left == "former data twice":
            shutil.copytree(root, root.with_name("data.old"))
        if left == "an unfinished folder":
            with begun(root, OLD) as folder:
                (folder / "pairs").mkdir()
                (folder / "pairs" / "other").write_text("other")
        former = tree(root)
        killed = killed_at(change, lambda root=root: fill(root, "new"))
        check(root)
        found = tree(root)
        assert found == former or found["meta.json"] == "new", change
        fill(root, then)
        assert names(root.parent) == ["data"] and names(root / "pairs") == ["shard"], change
        assert names(root) == [".lock", MARK, "meta.json", "pairs", PLAN], change
        assert (root / "meta.json").read_text() == then
        if not killed:
            break
    assert change > 8


def test_former_data_that_are_half_deleted_are_not_brought_back(tmp_path):
    """Not even where the data that replaced them are deleted since."""
    root, killed = tmp_path / "data", 0
    for change in itertools.count():
        fill(root, "old")
        if not killed_at(change, lambda: fill(root, "new")):
            break
        if (root / "meta.json").exists() and (root / "meta.json").read_text() == "new":
            killed += 1
            shutil.rmtree(root)
            with begun(root, NEW):
                assert tree(root) == {} or tree(root)["pairs/shard"] == "old"
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
    assert killed > 4


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
    complete(root, NEW, lambda folder: True)
    complete(root, NEW, lambda folder: 1 / 0)  # another one has done it
    with begun(root, NEW, 1, 2) as folder:
        assert folder is None
    assert names(tmp_path) == ["data"] and names(root) == [".lock", MARK, "a", PLAN]


def test_the_folder_is_not_taken_from_a_worker(tmp_path, capsys):
    """One that was started again has nothing to write perhaps; it completes what it was left."""
    root = tmp_path / "data"
    with begun(root, NEW, 0, 2):
        pass
    with begun(root, NEW, 1, 2) as folder:
        complete(root, NEW, lambda folder: 1 / 0)
        assert "data is left to other workers, who are at it still" in capsys.readouterr().out
        (folder / "a").write_text("a")
    complete(root, NEW, lambda folder: False)
    assert not root.exists()
    complete(root, NEW, lambda folder: True)
    assert names(root) == [".lock", MARK, "a", PLAN]


def test_what_another_has_begun_meanwhile_is_not_completed(tmp_path):
    root = tmp_path / "data"
    fill(root, "new")
    with begun(root, OLD):
        pass
    complete(root, NEW, lambda folder: 1 / 0)
    assert names(tmp_path) == ["data", "data.unfinished"]


def test_anothers_folder_is_left_where_the_data_are_made(tmp_path):
    """Somebody makes other data of them, and writes."""
    root = tmp_path / "data"
    fill(root, "new")
    with begun(root, OLD) as theirs:
        (theirs / "a").write_text("a")
        with begun(root, NEW) as folder:
            assert folder is None
        assert {".lock", "a", PLAN} < set(names(theirs))


def test_many_come_and_go_at_once(tmp_path):
    """Each finds a folder to write into, or all done."""
    root, wrong = tmp_path / "data", []

    def come(worker):
        try:
            for text in ("old", "new") * 5:
                plan = {"of": text}
                with contextlib.suppress(UserError):  # one that makes the other is at it
                    with begun(root, plan, worker, 4) as folder:
                        if folder:
                            (folder / f"{worker}").write_text((folder / PLAN).read_text())
                    complete(root, plan, lambda folder: True)
        except BaseException:
            wrong.append(traceback.format_exc())

    workers = [threading.Thread(target=come, args=(worker,)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong, wrong[0]
    fill(root, "last")
    assert names(tmp_path) == ["data"]


def test_completed_by_another_worker_while_one_begins(tmp_path, monkeypatch):
    """Between his look at the folder and his own lock: what is done is not begun once more."""
    real = unfinished._holds

    def completed_after_the_look(root, plan):
        monkeypatch.setattr(unfinished, "_holds", real)
        fill(root, "new")
        return False

    monkeypatch.setattr(unfinished, "_holds", completed_after_the_look)
    with begun(tmp_path / "data", NEW, 1, 2) as folder:
        assert folder is None
    assert names(tmp_path) == ["data"]


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
    with begun(root, NEW):
        (root / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        complete(root, NEW, lambda folder: True)
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
    complete(root, NEW, lambda folder: True)
    assert (root / "meta.json").read_text() == "new" and names(tmp_path) == ["data"]


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "data").mkdir()
    fill(tmp_path / "data", "new")
    assert (tmp_path / "data" / "meta.json").read_text() == "new"


def test_an_unfinished_folder_that_is_gone_is_named(tmp_path):
    with begun(tmp_path / "data", NEW) as folder:
        shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"\.lock is gone, and .*data is not what was prepared"):
        complete(tmp_path / "data", NEW, lambda folder: True)


def test_a_file_beside_is_left_as_it_is(tmp_path):
    (tmp_path / "data.unfinished").write_text("mine")
    with pytest.raises(UserError, match=r"data\.unfinished holds a file that .* did not make"):
        fill(tmp_path / "data", "new")


def moved_at(monkeypatch, name: str, root) -> None:
    """Another worker puts the folder in place just when a function of os or pathlib is called."""
    where = pathlib.Path if name == "open" else os
    real = getattr(where, name)

    def late(path, *args, **named):
        if str(path).endswith((".unfinished", LOCK)):
            monkeypatch.setattr(where, name, real)
            fill(root, "new")
        return real(path, *args, **named)

    monkeypatch.setattr(where, name, late)


def test_completed_while_one_looks_at_it(tmp_path, monkeypatch):
    with begun(tmp_path / "data", NEW):
        pass
    moved_at(monkeypatch, "listdir", tmp_path / "data")
    check(tmp_path / "data")
    assert names(tmp_path) == ["data"]


def test_completed_between_making_the_folder_and_its_gate(tmp_path, monkeypatch):
    moved_at(monkeypatch, "open", tmp_path / "data")
    with begun(tmp_path / "data", NEW) as folder:
        assert folder is None
    assert names(tmp_path) == ["data"]
