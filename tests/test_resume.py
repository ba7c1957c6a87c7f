"""Resumed = uninterrupted, bit by bit; and nothing already saved is lost when a run goes wrong."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.conftest import replace, tiny_config, tiny_dict
from tests.golden import write_split
from tfusion import config, sharding
from tfusion.checkpoint import Checkpoints
from tfusion.data.tokenizers import load_saved
from tfusion.errors import UserError
from tfusion.inference import trained
from tfusion.objectives import make_objective
from tfusion.objectives.base import KINDS
from tfusion.training import loop, metrics, resume
from tfusion.training import state as states
from tfusion.training.optimizer import make_optimizer

ROOT = Path(__file__).parents[1]
STEPS, EVERY = 6, 3


@pytest.fixture(scope="module", autouse=True)
def quick_compiles(tmp_path_factory):
    """Every run is the same program: compile it once, and without much optimisation."""
    settings = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
                "jax_persistent_cache_min_compile_time_secs": 0.0, "jax_disable_most_optimizations": True}
    before = {"jax_compilation_cache_dir": None, "jax_persistent_cache_min_compile_time_secs": 1.0,
              "jax_disable_most_optimizations": False}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield


def mesh():
    return sharding.make_mesh(config.MeshConfig(1, 1, 1, 1), jax.devices()[:1])


def train(cfg, workdir, objective=None, **options):
    """The last state; with another objective in place of the kind's own where one is given."""
    kind = KINDS[cfg.objective]
    given = kind._replace(make=lambda cfg: objective) if objective else kind
    with jax.set_mesh(mesh()), mock.patch.dict(KINDS, {cfg.objective: given}):
        return jax.device_get(loop.train(cfg, workdir, mesh(), **options))


def run_config(root):
    """A checkpoint falls between two log lines: the losses before it must not be in the line after it."""
    return with_train(tiny_config(root), num_steps=STEPS, checkpoint_every=EVERY, log_every=2, eval_every=2,
                      diagnostics_every=0)


@pytest.fixture(scope="module")
def whole(prepared_root, tmp_path_factory):
    """(config, workdir, last state) of a run that nothing disturbed. Tests work on copies."""
    cfg, workdir = run_config(prepared_root), tmp_path_factory.mktemp("whole")
    return cfg, workdir, train(cfg, workdir)


@pytest.fixture
def copied(whole, tmp_path):
    return Path(shutil.copytree(whole[1], tmp_path / "run"))


def interrupt_after(monkeypatch, num_batches: int):
    """The run dies when it asks for one batch more."""
    real = loop.pipeline.batches

    def batches(rows, first_row, num, *rest):
        if num <= 2:  # the held-out batches
            return real(rows, first_row, num, *rest)
        return cut(real(rows, first_row, num, *rest))

    def cut(iterator):
        for _ in range(num_batches):
            yield next(iterator)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.pipeline, "batches", batches)


def all_lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def lines(workdir) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    clock = ("perf/", "time", "goodput/", "data/wait_fraction")
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in all_lines(workdir)]


def saved_steps(workdir) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def digest(folder) -> dict:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), (_, y) in zip(*(jax.tree_util.tree_leaves_with_path(t) for t in (a, b))):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def test_resumed_equals_uninterrupted(whole, tmp_path, monkeypatch, capsys):
    cfg, workdir, state = whole
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, EVERY + 2)
        train(cfg, tmp_path)
    assert saved_steps(tmp_path) == [EVERY]
    assert max(line["step"] for line in lines(tmp_path)) == EVERY + 1  # past the checkpoint
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lm_lo')  # killed while writing
    resumed = train(cfg, tmp_path)
    assert f"resumed from step {EVERY}" in capsys.readouterr().out
    assert_same_bits(resumed, state)  # parameters, optimizer, moving average, step
    assert lines(tmp_path) == lines(workdir)
    assert list(train_lines(tmp_path)) == [2, 3, 4, 6]
    assert (tmp_path / "summary.json").read_text() == (workdir / "summary.json").read_text()
    assert saved_steps(tmp_path) == saved_steps(workdir) == [EVERY, STEPS]


@pytest.mark.slow
def test_a_strict_run_evaluates_resumes_and_is_what_is_sampled(prepared_root, tmp_path):
    """No moving average, no dropped caption: what is trained is evaluated and sampled, resumed or not."""
    tree = tiny_dict(prepared_root)
    tree.optimizer.ema_decay = tree.data.caption_dropout = 0.0
    tree.train.update(num_steps=4, checkpoint_every=2, log_every=2, eval_every=2, eval_documents=8,
                      diagnostics_every=0)
    cfg = config.from_dict(tree)
    state = train(cfg, tmp_path)
    assert state.ema_params is None
    before = lines(tmp_path)
    assert [line["step"] for line in before if line.get("eval/diffusion_loss")] == [2, 4]
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    assert_same_bits(train(cfg, tmp_path), state)
    assert lines(tmp_path) == before
    assert_same_bits(trained.load(tmp_path).params, state.params)


@pytest.mark.parametrize("broken", [b"", b'{"stages": [', b"\x00" * 9], ids=["empty", "cut", "zeros"])
def test_broken_side_files_stop_no_run(whole, copied, broken):
    cfg, workdir, state = whole
    names = ("timing.json", "summary.json", "metrics.jsonl", "config.json", "goodput.json")
    for name in names:
        (copied / name).write_bytes(broken)
    assert_same_bits(train(cfg, copied), state)
    for name in ("summary.json", "config.json"):
        assert (copied / name).read_text() == (workdir / name).read_text()
    assert json.loads((copied / "timing.json").read_text())["stages"][-1]["name"] == f"train from step {STEPS}"
    assert lines(copied) == []  # its lines are gone, the run is not


def test_a_finished_run_is_left_as_it_is(whole, copied):
    cfg, workdir, state = whole
    assert_same_bits(train(cfg, copied), state)
    assert lines(copied) == lines(workdir)
    assert digest(copied / "checkpoints") == digest(workdir / "checkpoints")


def test_a_changed_key_counts_for_nothing_where_nothing_is_left_to_train(whole, copied, capsys):
    before = (copied / "config.json").read_text()
    train(replace(config.load(copied), "optimizer", learning_rate=0.5), copied)
    assert (copied / "config.json").read_text() == before and not (copied / "config_changes.jsonl").exists()
    assert f"step {STEPS} of {STEPS} is done" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_goes_on_is_not_done(copied, monkeypatch):
    """summary.json says that a run is at its end: who follows it would stop."""
    assert (copied / "summary.json").exists()
    seen = []
    monkeypatch.setattr(loop, "finish", lambda workdir, *_: seen.append((workdir / "summary.json").exists()))
    train(with_train(config.load(copied), num_steps=STEPS + 2), copied)
    assert seen == [False]


def victims(folder) -> dict:
    """Files whose loss must be noticed: the largest of an item, its index, the small meta."""
    files = [p for p in (folder / "optimizer").rglob("*") if p.is_file()]
    return {"data": max(files, key=lambda p: p.stat().st_size), "index": folder / "params/manifest.ocdbt",
            "tree": folder / "ema/_METADATA", "meta": folder / "meta/metadata"}


@pytest.mark.parametrize("victim", ["data", "index", "tree", "meta"])
def test_truncated_checkpoint_is_one_line(whole, copied, victim):
    cfg, folder = whole[0], copied / "checkpoints"
    before = digest(folder / str(EVERY))
    path = victims(folder / str(STEPS))[victim]
    os.truncate(path, path.stat().st_size // 2)
    metrics_before = (copied / "metrics.jsonl").read_text()
    with pytest.raises(UserError) as e:
        train(cfg, copied)
    message = str(e.value)
    assert f"{folder / str(STEPS)} cannot be read" in message and "\n" not in message
    assert message.endswith(f"train with --resume=latest_good to go on from step {EVERY}, or move that folder "
                            "away")
    assert digest(folder / str(EVERY)) == before
    assert (copied / "metrics.jsonl").read_text() == metrics_before


def test_latest_good_passes_over_what_is_damaged(whole, copied, monkeypatch, capsys):
    """It is named, moved aside and kept, and its step saved again; the curve is the uninterrupted one."""
    cfg, workdir, state = whole
    folder = copied / "checkpoints"
    path = victims(folder / str(STEPS))["data"]
    os.truncate(path, path.stat().st_size // 2)
    resumed = train(cfg, copied, resume_from="latest_good")
    out, err = capsys.readouterr()
    assert f"resumed from step {EVERY} of {STEPS}" in out
    assert f"warning: checkpoint {folder / str(STEPS)} cannot be read" in err
    assert f"warning: {folder / str(STEPS)} is now {STEPS}.damaged" in err
    assert_same_bits(resumed, state)
    assert lines(copied) == lines(workdir) and saved_steps(copied) == [EVERY, STEPS]
    assert (folder / f"{STEPS}.damaged").is_dir()
    for step in (EVERY, STEPS):
        (folder / str(step) / "meta" / "metadata").write_text("{}")
    with pytest.raises(UserError, match=rf"none of the checkpoints in {folder} is good \(steps 3, 6\): move"):
        train(cfg, copied, resume_from="latest_good")
    assert saved_steps(copied) == [EVERY, STEPS]


def test_latest_good_does_not_pass_over_another_model(whole, copied):
    other = replace(whole[0], "model", num_layers=3)
    with pytest.raises(UserError, match=r"was saved with model\.num_layers"):
        train(other, copied, resume_from="latest_good")
    assert saved_steps(copied) == [EVERY, STEPS]


# ---------------------------------------------------------------- another run's checkpoints

@pytest.mark.parametrize("step", [None, EVERY])
def test_a_branch_goes_on_from_another_runs_state_and_stands_alone(whole, copied, tmp_path, capsys, step):
    """On the same schedule it is the run itself, line by line; then the other one may go."""
    cfg, workdir, state = whole
    if step is None:
        shutil.rmtree(copied / "checkpoints" / str(STEPS))
    path = copied if step is None else copied / "checkpoints" / str(step)
    branch = with_train(cfg, branch_from=str(path))
    assert_same_bits(train(branch, tmp_path / "branch"), state)
    said = capsys.readouterr().out
    assert f"branched from {copied} at step {EVERY} of {STEPS}" in said and "learning rate" not in said
    assert lines(tmp_path / "branch") == [line for line in lines(workdir) if line["step"] > EVERY]
    summaries = [(x / "summary.json").read_text() for x in (tmp_path / "branch", workdir)]
    assert summaries[0] == summaries[1]  # totals too
    shutil.rmtree(copied)
    train(branch, tmp_path / "branch")
    assert f"step {STEPS} of {STEPS} is done" in capsys.readouterr().out
    assert_same_bits(trained.load(tmp_path / "branch").params, state.ema_params)


def test_a_branch_has_a_schedule_of_its_own_and_no_other_data(whole, tmp_path, capsys):
    cfg, workdir, _ = whole
    path = str(workdir / "checkpoints" / str(EVERY))
    longer = with_train(cfg, branch_from=path, num_steps=STEPS + 2)
    train(longer, tmp_path / "branch")
    said = capsys.readouterr().out
    assert f"branched from {workdir} at step {EVERY} of {STEPS + 2}" in said
    assert "learning rate goes on at" in said
    changed = json.loads((tmp_path / "branch" / "config_changes.jsonl").read_text())["changed"]
    assert changed["train.branch_from"] == ["none", path]
    with pytest.raises(UserError, match=r"was saved with data\.caption_dropout"):
        train(replace(longer, "data", caption_dropout=0.05), tmp_path / "other")
    for wrong, what in ((tmp_path / "nowhere", "it is no run's --workdir"), (f"{workdir}/checkpoints/5", "3")):
        with pytest.raises(UserError, match=f"no checkpoint to begin from in {wrong}: .*{what}"):
            train(with_train(cfg, branch_from=str(wrong)), tmp_path / "other")
    assert not (tmp_path / "other" / "config.json").exists()


def begin(cfg, workdir) -> resume.Start:
    """Where a run would begin."""
    tx = make_optimizer(cfg.optimizer, cfg.train.num_steps)
    rows = KINDS[cfg.objective].open_rows(cfg)
    with jax.set_mesh(mesh()):
        return resume.start(cfg, make_objective(cfg), tx, mesh(), Checkpoints(workdir), rows, workdir)


def test_a_run_that_takes_parameters_is_fresh_but_for_them(whole, tmp_path, capsys):
    """The average of the other's weights becomes both weights and average; the rest is as at the beginning."""
    cfg, workdir, state = whole
    got = begin(with_train(cfg, init_from=str(workdir)), made(tmp_path / "run"))
    assert (int(got.state.step), got.next_row, got.totals) == (0, 0, None)
    assert_same_bits(jax.device_get(got.state.params), state.ema_params)
    assert_same_bits(got.state.params, got.state.ema_params)
    out = capsys.readouterr().out
    number = len(jax.tree.leaves(state.params))
    assert f"begins with the parameters of {workdir}, step {STEPS}, moving average\n  loaded: {number} (" in out
    assert "  new: 0\n  left over: 0\n" in out
    fresh = begin(cfg, made(tmp_path / "fresh"))
    assert "begins afresh, step 0 of 6" in capsys.readouterr().out
    assert_same_bits(got.state.opt_state, fresh.state.opt_state)


def made(folder):
    folder.mkdir()
    return folder


def test_parameters_are_taken_as_far_as_they_go(whole, capsys):
    """What one has and the other has not is named; what both have in different shapes is refused."""
    cfg, workdir, _ = whole
    source = resume.read_params(workdir)
    tx = make_optimizer(cfg.optimizer, 6)
    state = states.init_state(make_objective(cfg), tx, True, 0, mesh())
    params = dict(state.params)
    name = next(iter(params))
    params["another"] = params.pop(name)
    got = resume.initialise(state._replace(params=params), source, {"tokenizer": "another"})
    out, err = capsys.readouterr()
    assert re.search(r"  new: \d+ \(params/another", out)
    assert re.search(rf"  left over: \d+ \(params/{name}", out)
    assert "was trained with another tokenizer" in err
    assert_same_bits(got.params["another"], params["another"])
    wrong = dict(state.params)
    wrong[name] = jax.tree.map(lambda x: x[..., :1], wrong[name])
    with pytest.raises(UserError, match=rf"params/{name}\S* is float32\[.*\], not float32\[.*: begin with"):
        resume.initialise(state._replace(params=wrong), resume.read_params(workdir), {})
    with pytest.raises(UserError, match=r"has no parameter of this model, but params/.* model has params/x"):
        resume.initialise(state._replace(params={"x": jnp.ones(1)}), resume.read_params(workdir), {})


@pytest.mark.parametrize("name", ["eval/lm_loss", "eval/scenes/diffusion_loss"])
def test_the_best_checkpoint_by_a_figure_of_the_evaluation(whole, tmp_path, name):
    cfg = with_train(whole[0], keep_last=1, keep_best=name, checkpoint_every=2)
    train(cfg, tmp_path)
    figures = {line["step"]: line[name] for line in lines(tmp_path)}
    assert saved_steps(tmp_path) == sorted({min(figures, key=figures.get), STEPS})
    with pytest.raises(UserError, match=r"train\.keep_best = 'eval/x'; choices: none, eval/lm_loss, "):
        train(with_train(cfg, keep_best="eval/x"), tmp_path)


def test_deleting_the_broken_checkpoint_goes_on_from_the_older(whole, copied):
    cfg, workdir, state = whole
    shutil.rmtree(copied / "checkpoints" / str(STEPS))
    assert_same_bits(train(cfg, copied), state)
    assert lines(copied) == lines(workdir)


CHANGES = {"model.num_layers": 3, "process.prediction": "eps", "data.caption_dropout": 0.05,
           "optimizer.ema_decay": 0.0}


@pytest.mark.parametrize("name", CHANGES)
def test_another_model_is_one_line(whole, copied, name):
    group, key = name.split(".")
    cfg = whole[0]
    old = getattr(getattr(cfg, group), key)
    before = digest(copied)
    with pytest.raises(UserError, match=rf"was saved with {re.escape(name)} = {old}, .* {CHANGES[name]}: "
                                        "set it back, or start in another --workdir$"):
        train(replace(cfg, group, **{key: CHANGES[name]}), copied)
    assert digest(copied) == before


def test_other_data_are_refused(whole, copied, tmp_path):
    """Prepared again with a record more, the rows are others: a run must not go on as if they were not."""
    cfg, before = whole[0], digest(copied)
    root = shutil.copytree(cfg.data.prepared, tmp_path / "data")
    shutil.rmtree(root / "glosses" / "train")
    write_split(root, "glosses", "train", [["another"], ["text"]], load_saved(root).encode_batch, None)
    elsewhere = replace(cfg, "data", prepared=str(root))
    with pytest.raises(UserError, match=r"trained on other data than .*/data now holds \(changed: .*glosses"):
        train(elsewhere, copied)
    assert digest(copied) == before


def test_the_data_may_stand_elsewhere_and_what_changed_is_kept(whole, copied, tmp_path, capsys):
    """Same data under another path, more steps: said and noted, each key with what it was."""
    cfg = whole[0]
    root = shutil.copytree(cfg.data.prepared, tmp_path / "moved")
    changed = with_train(replace(cfg, "data", prepared=str(root)), num_steps=STEPS + 2)
    train(changed, copied)
    out = capsys.readouterr().out
    assert f"changed since step {STEPS}: train.num_steps = {STEPS + 2} (was {STEPS})" in out
    assert "the learning rate goes on at" in out
    (line,) = (json.loads(x) for x in (copied / "config_changes.jsonl").read_text().splitlines())
    assert line["step"] == STEPS and line["changed"] == {
        "data.prepared": [cfg.data.prepared, str(root)], "train.num_steps": [STEPS, STEPS + 2]}
    assert config.load(copied).train.num_steps == STEPS + 2


def test_nan_stops_before_it_is_saved(whole, tmp_path):
    """NaN in step 5; checkpoints at 3 and 6, losses looked at only at 6: the error still names step 5."""
    cfg, workdir, state = whole
    rare = with_train(cfg, log_every=STEPS, eval_every=0, diagnostics_every=0)
    real = make_objective(cfg)

    def loss(params, aux, batch, key):
        losses = real.loss(params, aux, batch, key)
        bad = batch.row_ids_B[0] >= 4 * cfg.train.batch_size
        total, count = losses["lm_loss"]
        return {**losses, "lm_loss": (jnp.where(bad, jnp.nan, total), count)}

    with pytest.raises(UserError, match=r"^step 5: lm_loss.* not finite; the last checkpoint is untouched"):
        train(rare, tmp_path, real._replace(loss=loss))
    assert saved_steps(tmp_path) == [EVERY]
    assert_same_bits(train(cfg, tmp_path), state)  # resumed from the last good one, without the fault
    assert [line for line in lines(tmp_path) if line["step"] > EVERY] == [
        line for line in lines(workdir) if line["step"] > EVERY]


# ---------------------------------------------------------------- log lines, traces

def with_train(cfg, **changes):
    return replace(cfg, "train", **changes)


def train_lines(workdir) -> dict:
    """{step: line}; each step has one, in order, with the losses of training."""
    found = lines(workdir)
    assert all("train/lm_loss" in line for line in found)
    steps = [line["step"] for line in found]
    assert steps == sorted(set(steps))
    return dict(zip(steps, found))


@pytest.fixture(scope="module")
def every_step(whole, tmp_path_factory):
    """Lines of each step, all but the last written while the next one runs."""
    workdir = tmp_path_factory.mktemp("every_step")
    cfg = with_train(whole[0], log_every=1, eval_every=0, checkpoint_every=STEPS)
    state = train(cfg, workdir)
    assert_same_bits(state, whole[2])
    return train_lines(workdir)


@pytest.mark.parametrize(("changes", "steps"), [
    (dict(eval_every=0, checkpoint_every=STEPS), [2, 4, 6]),  # 2 and 4 are late
    (dict(eval_every=2, checkpoint_every=STEPS), [2, 4, 6]),  # none is
    (dict(eval_every=4, diagnostics_every=2, checkpoint_every=2), [2, 4, 6]),
    (dict(eval_every=3, diagnostics_every=0, checkpoint_every=STEPS), [2, 3, 4, 6]),  # 3: evaluated, not due
], ids=["late", "evaluated", "saved", "between"])
def test_log_lines_are_means_over_their_steps(whole, every_step, tmp_path, changes, steps):
    """Each line is the mean over the steps since the one before, by their counts, written at once or late."""
    cfg = with_train(whole[0], log_every=2, **changes)
    train(cfg, tmp_path)
    assert list(every_step) == [1, 2, 3, 4, 5, 6]
    got, objective = train_lines(tmp_path), make_objective(cfg)
    assert list(got) == steps
    rows, B, R = KINDS[cfg.objective].open_rows(cfg), cfg.train.batch_size, cfg.data.window_rows
    batches = list(loop.pipeline.batches(rows, 0, STEPS, B))
    fill = [np.mean([(rows[w * R + i].segment_ids_BT > 0).mean() for i in range(R)]) for w in range(2)]
    counts = [objective.counts(batch) for batch in batches]
    for before, (step, line) in zip([0, *steps], got.items()):
        since = range(before + 1, step + 1)
        for name in ("lm_loss", "diffusion_loss", "grad_norm", "param_norm"):
            values = [every_step[s][f"train/{name}"] for s in since]
            weights = [float(counts[s - 1].get(name, 1)) for s in since]
            assert line[f"train/{name}"] == pytest.approx(np.average(values, weights=weights), rel=1e-6), name
        assert line["train/learning_rate"] == every_step[step]["train/learning_rate"]
        assert line["data/fill"] == pytest.approx(fill[(step * B - 1) // R], rel=1e-6)  # of its window
        assert line["total/tokens"] == sum(int((b.segment_ids_BT > 0).sum()) for b in batches[:step])
        assert line["total/images"] == sum(int((b.max_t_BI > 0).sum()) for b in batches[:step])
        assert ("eval/lm_loss" in line) == loop.due(step, cfg.train.eval_every, STEPS)
        assert ("grad_norm/lm_loss" in line) == loop.due(step, cfg.train.diagnostics_every, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("broken_after", [4, 5])
def test_resumed_equals_uninterrupted_with_late_lines(whole, tmp_path, monkeypatch, broken_after):
    """Step 4's line is lost, or there, when the run dies: in the end it is there once."""
    cfg = with_train(whole[0], eval_every=0)
    train(cfg, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, broken_after)
        train(cfg, tmp_path / "broken")
    assert list(train_lines(tmp_path / "broken")) == ([2, 3] if broken_after == 4 else [2, 3, 4])
    assert_same_bits(train(cfg, tmp_path / "broken"), whole[2])
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")
    assert list(train_lines(tmp_path / "broken")) == [2, 3, 4, 6]


class Clock:
    """Stands for `time`: the second moves when told to."""

    def __init__(self):
        self.now = 1_790_000_000.0

    def perf_counter(self) -> float:
        return self.now

    time = monotonic = perf_counter


def test_times_of_steps_evaluation_and_saving_apart(whole, tmp_path, monkeypatch):
    """A step takes 1 s, compiling 100, an evaluation 20, a save 7; the first run dies after step 4."""
    clock, real_add = Clock(), loop.Log.add
    compile_, evaluate, save = jax.stages.Lowered.compile, loop.Held.evaluate, Checkpoints.save

    def slowed(function, seconds):
        def run(*args, **more):
            clock.now += seconds
            return function(*args, **more)
        return run

    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(metrics, "time", clock)
    monkeypatch.setattr(loop.writers, "time", clock)
    monkeypatch.setattr(loop.Log, "add", slowed(real_add, 1.0))
    monkeypatch.setattr(jax.stages.Lowered, "compile", slowed(compile_, 100.0))
    monkeypatch.setattr(loop.Held, "evaluate", slowed(evaluate, 20.0))
    monkeypatch.setattr(Checkpoints, "save", slowed(save, 7.0))
    cfg = with_train(whole[0], log_every=1, eval_every=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, EVERY + 1)
        train(cfg, tmp_path)
    saved = [row.get("time/save_s") for row in all_lines(tmp_path)]
    assert saved == [None, None, None, 7]  # the line stands before its step is saved: the next one says it
    between = clock.now
    train(cfg, tmp_path)
    rows = all_lines(tmp_path)
    assert [row["perf/step_ms"] for row in rows] == [1000.0] * STEPS
    assert [row.get("time/eval_s") for row in rows] == [None, 20, None, 20, None, 20]
    assert rows[0]["time"] == 1_790_000_101 and rows[3]["time"] == between + 121
    assert rows[0]["perf/images_per_sec"] == rows[0]["total/images"] > 0


def traces(workdir) -> list[Path]:
    return [p for p in (workdir / "profile").rglob("*.xplane.pb") if p.stat().st_size]


@pytest.mark.slow
def test_profile_writes_a_trace_of_its_steps(whole, tmp_path, monkeypatch):
    """Started before step 2's batch, stopped after two steps; the run itself is not changed by a bit."""
    events, real = [], jax.profiler.stop_trace
    start_trace, real_step = jax.profiler.start_trace, loop.metrics.Throughput.add
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *a: events.append("start") or start_trace(*a))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop") or real())
    monkeypatch.setattr(loop.metrics.Throughput, "add",
                        lambda self, *a: events.append("step") or real_step(self, *a))
    state = train(whole[0], tmp_path, profile=(2, 2))
    assert events == ["step"] * 2 + ["start"] + ["step"] * 2 + ["stop"] + ["step"] * 2
    assert len(traces(tmp_path)) == 1
    assert_same_bits(state, whole[2])
    assert lines(tmp_path) == lines(whole[1])


@pytest.mark.parametrize("profile", [(1, 1), (2, 3)], ids=["over", "under way"])
def test_profile_of_steps_before_the_resumed_one(whole, copied, profile, capsys):
    """The same command again after a crash: the window lies behind, wholly or in part."""
    cfg, workdir, state = whole
    shutil.rmtree(copied / "checkpoints" / str(STEPS))
    assert_same_bits(train(cfg, copied, profile=profile), state)  # from step 3
    assert lines(copied) == lines(workdir)
    assert f"--profile={profile[0]}:{profile[1]} begins before step 3" in capsys.readouterr().out
    assert not traces(copied)
