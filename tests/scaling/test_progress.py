"""How far a point is, from the files of its workdir."""

import json

import pytest

from tfusion import workdir
from tfusion.errors import UserError
from tfusion.scaling import progress
from tfusion.scaling.runner import Runner


def write_log(folder, *lines) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(
        (line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def test_a_run_under_way_has_a_step_a_pace_and_its_last_losses(sweep):
    named = sweep.freeze()
    a = named["a"]
    write_log(a.folder, {"step": 10, "time": 100.0, "train/lm_loss": 3.0, "eval/lm_loss": 2.5},
              {"step": 20, "time": 140.0, "train/lm_loss": 2.0, "train/diffusion_loss": 0.5,
               "train/diffusion_loss_bin0": 9.0})
    stopped = progress.state(a, named)
    assert stopped[:5] == ("stopped", "train", 20, 60, None)
    with workdir.hold(a.folder / workdir.LOCK):
        state = progress.state(a, named)
    assert state.what == "running" and state.eta == pytest.approx(4.0 * 40)
    assert state.losses == {"train/lm_loss": 2.0, "eval/lm_loss": 2.5, "train/diffusion_loss": 0.5}


def test_a_pace_needs_two_lines_and_broken_ones_are_none(sweep):
    named = sweep.freeze()
    write_log(named["a"].folder, {"step": 10, "time": 100.0}, "{broken", "3")
    with workdir.hold(named["a"].folder / workdir.LOCK):
        state = progress.state(named["a"], named)
    assert state.step == 10 and state.eta is None


def test_each_verb_is_done_when_its_last_file_says_so(sweep):
    named = sweep.freeze()
    a, data = named["a"], named["data"]
    steps = a.resolved["train"]["num_steps"]
    assert progress.next_verb(data, named) == "prepare"
    (sweep.out / "data" / "made").mkdir(parents=True)
    (sweep.out / "data" / "made" / "meta.json").write_text("{}")
    assert progress.state(data, named).what == "finished"
    (a.folder / "evaluation").mkdir(parents=True)
    (a.folder / "summary.json").write_text(json.dumps({"steps": steps}))
    (a.folder / "evaluation" / "metrics.json").write_text("{half")
    assert progress.next_verb(a, named) == "evaluate"
    (a.folder / "evaluation" / "metrics.json").write_text(json.dumps({"step": steps}))
    assert progress.next_verb(a, named) == "" and progress.state(a, named).what == "finished"


def test_a_workdir_that_holds_another_run_is_said_and_left(sweep):
    named = sweep.freeze()
    a = named["a"]
    a.folder.mkdir(parents=True)
    tree = json.loads(json.dumps(a.resolved))
    (a.folder / "config.json").write_text(json.dumps(tree))
    assert progress.state(a, named).what == "stopped"
    relative = a._replace(resolved=a.resolved | {"data": a.resolved["data"] | {"prepared": "./runs/data"}})
    for kept, what in (("/x/runs/data", "stopped"), ("/x/other/data", "failed")):  # a run makes it absolute
        (a.folder / "config.json").write_text(json.dumps(tree | {"data": tree["data"] | {"prepared": kept}}))
        assert progress.state(relative, named).what == what
    tree["optimizer"]["learning_rate"] = 9.0
    (a.folder / "config.json").write_text(json.dumps(tree))
    state, rate = progress.state(a, named), a.resolved["optimizer"]["learning_rate"]
    assert state.what == "failed" and state.why == (
        f"its workdir holds another run (optimizer.learning_rate = 9.0, not {rate}): move it away")
    made = sweep.out / "data" / "made"
    made.mkdir(parents=True)
    (made / "meta.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds another run than 'a' \(optimizer.learning_rate = 9.0, not"):
        Runner(sweep.out, list(named.values()), 1, True).run()
