"""Where an export appears: whole or not at all, over nothing that export did not make."""

import itertools
import os

import pytest

from tests.kills import killed_at
from tfusion import exported
from tfusion.errors import UserError
from tfusion.exporting import place
from tfusion.workdir import LOCK


def make(out, text="new", overwrite=False):
    with place.begun(out, overwrite, {"format": "orbax"}) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text(text)


def test_appears_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with place.begun(out, False, {"format": "orbax"}) as folder:
        (folder / "weights").write_text("x")
        assert not out.exists() and folder.parent == out.parent
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert exported.about(out) == {"format": "orbax", "files": ["weights"]}
    assert {path.name for path in out.iterdir()} == {"weights", exported.MARK}


def test_an_export_is_replaced_only_if_asked(tmp_path):
    make(tmp_path / "out", "old")
    with pytest.raises(UserError, match=r"is there already: .*; --overwrite replaces an export"):
        make(tmp_path / "out")
    assert (tmp_path / "out" / "sub" / "weights").read_text() == "old"
    make(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "sub" / "weights").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_what_export_did_not_make_stays(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match="was not made by export: it is left as it is"):
        make(out, overwrite=True)
    out.rmdir()
    out.write_text("mine")
    with pytest.raises(UserError, match="was not made by export"):
        make(out, overwrite=True)
    out.unlink()
    make(out, "old")
    (out / "evaluation").mkdir()
    (out / "evaluation" / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds evaluation/metrics.json, which export did not make"):
        make(out, overwrite=True)
    assert (out / "sub" / "weights").read_text() == "old"


def test_what_comes_meanwhile_stays(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="is there already"), place.begun(out, False, {}):
        out.mkdir()
    assert os.listdir(tmp_path) == ["out"] and not os.listdir(out)


def test_a_failure_leaves_what_was(tmp_path):
    make(tmp_path / "out", "old")
    with pytest.raises(RuntimeError), place.begun(tmp_path / "out", True, {}):
        raise RuntimeError
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out" / "sub" / "weights").read_text() == "old"


def test_what_a_killed_one_left_is_cleared_away(tmp_path):
    killed = place.begun(tmp_path / "out", False, {})
    (killed.__enter__() / "half").write_text("x")
    os.rename(tmp_path / "out.unfinished", tmp_path / "kept")  # as the kill would leave it: held by nobody
    killed.__exit__(RuntimeError, RuntimeError(), None)
    os.rename(tmp_path / "kept", tmp_path / "out.unfinished")
    make(tmp_path / "out")
    assert not (tmp_path / "out" / "half").exists() and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("former", [False, True])
def test_killed_at_any_change_and_run_again(tmp_path, former):
    """What stands at `out` is whole, or nothing; and the same command makes the export, whatever was left. An
    empty folder, whose mark has just gone, is nobody's: it is named."""
    for change in itertools.count():
        out = tmp_path / f"{change}" / "out"
        if former:
            make(out, "old")
        killed = killed_at(change, lambda out=out: make(out, "new", overwrite=True))
        if out.exists():
            assert (out / "sub" / "weights").read_text() in ("old", "new"), change
        for left in out.parent.glob("out.*") if out.parent.exists() else ():
            if not os.listdir(left):
                with pytest.raises(UserError, match=rf"{left} was not made by export"):
                    make(out, overwrite=True)
                left.rmdir()
        make(out, "newer", overwrite=True)
        assert (out / "sub" / "weights").read_text() == "newer" and os.listdir(out.parent) == ["out"], change
        if not killed:
            break
    assert change > 5


def test_another_folder_of_that_name_is_left_alone(tmp_path):
    for end in (".unfinished", ".old"):
        (tmp_path / f"out{end}").mkdir()
        with pytest.raises(UserError, match=rf"out{end} was not made by export, which needs that name"):
            make(tmp_path / "out")
        (tmp_path / f"out{end}").rmdir()


def test_one_process_at_a_time(tmp_path):
    killed = place.begun(tmp_path / "out", False, {})
    folder = killed.__enter__()
    with pytest.raises(UserError, match="is being written by another process"):
        make(tmp_path / "out")
    assert (folder / LOCK).exists()
    killed.__exit__(RuntimeError, RuntimeError(), None)
