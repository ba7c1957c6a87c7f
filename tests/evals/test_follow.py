"""A run is watched: each new checkpoint is evaluated once, the newest stands in evaluation/, and it ends."""

import json

import pytest

from tfusion.errors import UserError
from tfusion.evals import follow as module
from tfusion.evals.follow import follow, publish


class Training:
    """A run that goes on whenever the follower waits: a turn is a list of checkpoints, the last is the end."""

    def __init__(self, workdir, *turns):
        self.workdir, self.turns, self.now, self.evaluated = workdir, list(turns), [], []

    def steps(self, workdir):
        return self.now

    def wait(self):
        if not self.turns:
            raise AssertionError("the run is done, and is still waited for")
        self.now = self.turns.pop(0)
        if not self.turns:
            (self.workdir / "summary.json").write_text("{}")

    def evaluate(self, step, place):
        self.evaluated.append(step)
        (place / "losses").mkdir(parents=True)
        (place / "losses/card.json").write_text(str(step))
        (place / "timing.json").write_text("{}")
        (place / "metrics.json").write_text(json.dumps({"step": step}))

    def follow(self):
        follow(self.workdir, self.evaluate, self.wait, self.steps)


def newest(workdir):
    folder = workdir / "evaluation"
    return json.loads((folder / "metrics.json").read_text())["step"], (folder / "losses/card.json").read_text()


def test_each_checkpoint_once_and_then_it_ends(tmp_path):
    """The last one comes with summary.json and is not missed."""
    training = Training(tmp_path, [], [10], [10], [20, 30], [30, 40])
    training.follow()
    assert training.evaluated == [10, 20, 30, 40] and newest(tmp_path) == (40, "40")
    steps = sorted((tmp_path / "evaluation/steps").iterdir())
    assert [path.name for path in steps] == ["10", "20", "30", "40"]
    assert json.loads((steps[0] / "metrics.json").read_text()) == {"step": 10}
    training.follow()  # nothing is done twice
    assert training.evaluated == [10, 20, 30, 40]


def test_what_ends_while_it_is_looked_at_is_not_missed(tmp_path):
    """The last checkpoint and summary.json come right after the checkpoints were listed."""
    training = Training(tmp_path, [10], [10, 20])

    def steps(workdir):
        listed = training.now
        if listed == [10] and len(training.turns) == 1 and training.evaluated:
            training.wait()
        return listed

    follow(tmp_path, training.evaluate, lambda: training.turns and training.wait(), steps)
    assert training.evaluated == [10, 20]


def test_one_that_cannot_be_read_is_said_as_long_as_it_is_listed(tmp_path):
    """Old ones too: what is deleted leaves the list first, in one move."""
    training = Training(tmp_path, [10, 20, 30], [10, 20, 30])

    def damaged(step, place):
        raise UserError("a file is not there")

    training.evaluate = damaged
    with pytest.raises(UserError, match="a file is not there"):
        training.follow()


def test_what_was_begun_and_not_done_is_done_again(tmp_path):
    (tmp_path / "evaluation/steps/10").mkdir(parents=True)
    training = Training(tmp_path, [10])
    training.follow()
    assert training.evaluated == [10]


def test_a_checkpoint_that_vanishes_is_passed_over(tmp_path, capsys):
    """Training keeps the newest ones only: one may go while it is read."""
    training = Training(tmp_path, [10], [30])

    def evaluate(step, place):
        if step == 10:
            training.now = [20]
            raise UserError("no checkpoint of step 10")
        Training.evaluate(training, step, place)

    follow(tmp_path, evaluate, training.wait, training.steps)
    assert training.evaluated == [20, 30]
    assert "step 10: the checkpoint is gone, it is not evaluated" in capsys.readouterr().out


def test_any_other_mistake_is_said(tmp_path):
    training = Training(tmp_path, [10])

    def evaluate(step, place):
        raise UserError("other data")

    with pytest.raises(UserError, match="other data"):
        follow(tmp_path, evaluate, training.wait, training.steps)


def test_an_interruption_leaves_nothing_half_made_in_evaluation(tmp_path):
    training = Training(tmp_path, [10], [20])

    def evaluate(step, place):
        if step == 20:
            (place / "losses").mkdir(parents=True)
            raise KeyboardInterrupt
        Training.evaluate(training, step, place)

    with pytest.raises(KeyboardInterrupt):
        follow(tmp_path, evaluate, training.wait, training.steps)
    assert newest(tmp_path) == (10, "10") and not (tmp_path / "evaluation/steps/20/metrics.json").exists()


def test_metrics_json_is_published_last(tmp_path, monkeypatch):
    step, folder = tmp_path / "10", tmp_path / "evaluation"
    Training(tmp_path).evaluate(10, step)
    folder.mkdir()
    stood = []
    monkeypatch.setattr(module, "replace_text", lambda *args: stood.extend(p.name for p in folder.rglob("*")))
    publish(step, folder)
    assert set(stood) == {"losses", "card.json", "timing.json"}


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert module.steps_of(tmp_path) == []
