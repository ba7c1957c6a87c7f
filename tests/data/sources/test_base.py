"""Which records are held out, and reading on past those that are damaged."""

import dataclasses
import threading

import numpy as np
import pytest

from tfusion.data.sources import base
from tfusion.data.sources.base import Source, Unreadable, held_out, pictures, records
from tfusion.errors import UserError

KEYS = [f"{i:04d}.jpg" for i in range(2000)]


class Damaged(list):
    """A list of records, of which some cannot be read."""

    def __init__(self, records, damaged=()):
        super().__init__(records)
        self.damaged = set(damaged)

    def __getitem__(self, record):
        if record in self.damaged:
            raise Unreadable(f"{record}.jpg cannot be read as a picture")
        return super().__getitem__(record)


@dataclasses.dataclass(frozen=True)
class Spec(Source):
    opened: list = None

    def open(self, split, image_size):
        return self.opened


@dataclasses.dataclass(frozen=True)
class Kept(Spec):
    heldout_fraction: float = 0.02


def test_the_fraction_is_held_out():
    assert held_out(KEYS, 0.02).mean() == pytest.approx(0.02, abs=0.01)
    assert held_out(KEYS, 0.5).mean() == pytest.approx(0.5, abs=0.05)
    assert not held_out(KEYS, 0.0).any()


def test_a_record_stays_on_its_side_whatever_stands_around_it():
    """By its key, not by its place or number: other records come, go or change their order."""
    side = dict(zip(KEYS, held_out(KEYS, 0.1)))
    fewer = [key for i, key in enumerate(reversed(KEYS)) if i % 3]
    assert [side[key] for key in fewer] == held_out(fewer, 0.1).tolist()
    assert (held_out(KEYS, 0.1) >= held_out(KEYS, 0.05)).all()


def test_the_rule_is_pinned():
    """Another hash would show a trained model what was held out from it."""
    assert np.flatnonzero(held_out(KEYS[:200], 0.02)).tolist() == [43, 97, 108, 125]


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("fraction", [1e-9, 0.02, 1.0])
def test_of_two_records_and_more_each_side_has_one(number, fraction):
    held = held_out(KEYS[:number], fraction)
    assert held.shape == (number,) and (number < 2 or 0 < held.sum() < number)


def test_records_of_one_key_stay_together():
    keys = ["a", "b", "a", "c", "a"]
    for fraction in (1e-9, 0.5, 1.0):
        held = held_out(keys, fraction)
        assert held[0] == held[2] == held[4]
    assert not held_out(["a"] * 5, 1e-9).any()


def test_any_file_name_has_a_side():
    """Names that are not UTF-8, as an old archive leaves them."""
    assert held_out(["\udce9t\udce9.jpg", "b"], 0.5).shape == (2,)


def test_records_come_in_order_from_several_threads():
    both = threading.Barrier(2, timeout=20)

    class Slow(list):
        def __getitem__(self, record):
            if record in (0, base.AT_ONCE):
                both.wait()  # passes only where two threads read
            return [str(record)]

    assert list(records(Slow(range(500)), "x")) == [[str(i)] for i in range(500)]


def test_reading_stays_close_behind_who_reads():
    """Pictures that nobody has asked for yet would fill the memory."""
    asked = []

    class Counted(list):
        def __getitem__(self, record):
            asked.append(record)
            return [str(record)]

    reading = records(Counted(range(10_000)), "x")
    next(reading)
    reading.close()
    assert max(asked) < base.AT_ONCE * (base.AHEAD + 1)


def test_what_cannot_be_read_is_left_out_counted_and_named(capsys):
    source = Damaged([["a caption", i] for i in range(100)], damaged=(3, 40, 41, 70, 99))
    read = [i for _, i in records(source, "photos/train")]
    assert read == [i for i in range(100) if i not in source.damaged]
    assert capsys.readouterr().err.splitlines() == [
        "warning: photos/train: 5 of 100 records cannot be read and are left out:",
        *(f"  {i}.jpg cannot be read as a picture" for i in (3, 40, 41)), "  and 2 more"]


def test_nothing_to_tell_is_not_told(capsys):
    assert len(list(records([["a"], ["b", 1]], "x"))) == 2 and list(records([], "x")) == []
    assert not capsys.readouterr().err


def test_where_nothing_can_be_read_the_first_reason_is_given():
    with pytest.raises(UserError, match=r"^photos/train: none of 3 records can be read. The first: 0.jpg"):
        list(records(Damaged([[1]] * 3, range(3)), "photos/train"))


def test_few_held_out_records_may_all_be_damaged(capsys):
    """Of ten pictures one is held out; the source is then not evaluated."""
    assert list(records(Damaged([[1]], [0]), "photos/heldout", needed=False)) == []
    assert "photos/heldout: 1 of 1 records cannot be read and are left out" in capsys.readouterr().err


def test_other_errors_end_the_reading():
    class Broken(list):
        def __getitem__(self, record):
            raise UserError("a.txt is not UTF-8")

    with pytest.raises(UserError, match=r"a.txt is not UTF-8"):
        list(records(Broken(range(3)), "x"))


def test_pictures_without_text_are_counted(capsys):
    assert len(list(records([["a", 1], [2], [3, 4]], "photos/train"))) == 3
    assert capsys.readouterr().err == (
        "photos/train: 2 of 3 records are pictures without text, learnt as such\n")


def picture(value, size=4):
    return np.full((size, size, 3), value, np.uint8)


def test_pictures_of_every_source_that_has_a_share(capsys):
    sources = {"photos": Spec("x", 0.5, Damaged([["a", picture(i)] for i in range(9)], damaged=[2])),
               "notes": Spec("x", 0.5, [["a"], ["b"]]),
               "pairs": Spec("x", 0.1, [[picture(20), "between", picture(21)]]),
               "left out": Spec("x", 0.0, [[picture(99)]])}
    every = pictures(sources, "train", 4)
    assert every[:, 0, 0, 0].tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 20, 21]
    assert "photos/train: 1 of 9 records cannot be read" in capsys.readouterr().err
    some = pictures(sources, "train", 4, limit=4)[:, 0, 0, 0]
    assert len(some) == 4 and sorted(some[2:]) == [20, 21] and max(some[:2]) <= 8


def test_pictures_of_a_limit_are_from_all_over_the_source():
    source = {"photos": Spec("x", 1.0, [["a", picture(i)] for i in range(200)])}
    some = pictures(source, "train", 4, limit=20)[:, 0, 0, 0].tolist()
    assert len(set(some)) == 20 and max(some) > 100 and some != sorted(some)
    assert some == pictures(source, "train", 4, limit=20)[:, 0, 0, 0].tolist()


class Texts:
    """So many records of text; which were read."""

    def __init__(self, number, places=()):
        self.number, self.places, self.read = number, set(places), []

    def __len__(self):
        return self.number

    def __getitem__(self, record):
        self.read.append(record)
        return [picture(3)] if record in self.places else ["a"]


def test_a_source_of_texts_is_not_read_to_its_end_for_pictures(monkeypatch):
    """With a limit, as for fitting; where all are wanted, all are looked for."""
    monkeypatch.setattr(base, "WITHOUT", 400)
    texts, mixed = Texts(10_000), Texts(3000, range(0, 3000, 20))
    sources = {"notes": Spec("x", 0.5, texts), "photos": Spec("x", 0.5, mixed)}
    assert len(pictures(sources, "train", 4, limit=100)) == 100
    assert len(texts.read) < 400 + base.AT_ONCE * (base.AHEAD + 1) and len(mixed.read) > 1000
    assert len(pictures({"rare": Spec("x", 0.5, Texts(3000, [2999]))}, "train", 4)) == 1


@pytest.mark.parametrize("number", [0, 1, 999, 1000])
def test_places_of_a_small_source_are_drawn_as_ever(monkeypatch, number):
    monkeypatch.setattr(base, "DRAWN", 1000)
    assert base.drawn(number).tolist() == np.random.default_rng(0).permutation(number).tolist()


@pytest.mark.parametrize("number", [1001, 1999, 12_345, 10**10])
def test_places_of_a_large_source_are_from_all_over_it(monkeypatch, number):
    """Each at most once, without a list of all."""
    monkeypatch.setattr(base, "DRAWN", 1000)
    places = base.drawn(number)
    assert len(set(places.tolist())) == len(places) == 1000 and places.min() >= 0 and places.max() < number
    assert (np.histogram(places, 10, (0, number))[0] > 80).all()
    assert abs(np.corrcoef(places, np.arange(1000))[0, 1]) < 0.1
    assert number < 10_000 or len(set((places % 10).tolist())) == 10


def test_no_pictures_and_pictures_of_another_size_are_refused():
    with pytest.raises(UserError, match=r"notes, off: none of these has pictures in its heldout split"):
        pictures({"notes": Spec("x", 1.0, [["a"]]), "off": Spec("x", 0.0, [[picture(1)]])}, "heldout", 4)
    for kept, says in ((Kept, "--config.data.sources.photos.heldout_fraction=0.1"), (Spec, "give a share to")):
        some = {"notes": Spec("x", 1.0, [["a"]]), "photos": kept("x", 1.0, [])}
        with pytest.raises(UserError, match=rf"heldout split that can be read; .*{says}"):
            pictures(some, "heldout", 4)
    with pytest.raises(UserError, match="train split that can be read; give a share to one that does"):
        pictures({"photos": Kept("x", 1.0, [])}, "train", 4)
    several = {"photos": Spec("x", 1.0, [[picture(1)], [picture(1, 8)]])}
    with pytest.raises(UserError, match=r"the pictures of photos are 4 to 8 pixels high, 4 are wanted"):
        pictures(several, "train", 4)
