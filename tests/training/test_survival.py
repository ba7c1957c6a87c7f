"""What ends a run, or tries to: preemption, numbers that are not finite, a step that does not end."""

import contextlib
import functools
import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import toy
from tests.conftest import replace
from tests.test_resume import assert_same_bits, interrupt_after, lines, mesh, saved_steps
from tfusion import checkpoint, checksum, config, distributed, errors
from tfusion.checkpoint import Checkpoints
from tfusion.errors import HUNG, PREEMPTED, Stopped, UserError
from tfusion.objectives import make_objective
from tfusion.objectives.base import KINDS
from tfusion.training import loop, metrics, saving, watchdog
from tfusion.training import state as states
from tfusion.training import step as steps
from tfusion.training.optimizer import make_optimizer

ROOT = Path(__file__).parents[2]
STEPS, EVERY, BATCHES = 12, 6, 2  # of training, between saves and evaluations; of an evaluation


def toy_config(**train):
    tree = toy.get_config()
    tree["train"] |= dict(num_steps=STEPS, log_every=3, eval_every=EVERY, diagnostics_every=EVERY,
                          checkpoint_every=EVERY) | train
    return config.from_dict(tree)


def train(cfg, workdir):
    with jax.set_mesh(mesh()):
        return jax.device_get(loop.train(cfg, workdir, mesh()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(config, lines, last state) of a run that nothing disturbed."""
    cfg, workdir = toy_config(), tmp_path_factory.mktemp("whole")
    state = train(cfg, workdir)
    return cfg, lines(workdir), state


@pytest.fixture
def notice(monkeypatch):
    """notice(n): the n-th question that a run asks is the point where all of its processes are to stop."""
    def at(call):
        asked = itertools.count(1)
        monkeypatch.setattr(distributed.multihost_utils, "reached_preemption_sync_point",
                            lambda number: next(asked) == call)
    return at


@pytest.fixture
def saves(monkeypatch):
    """The steps at which something was saved, twice where twice."""
    made, real = [], Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save",
                        lambda self, step, *args, **more: made.append(step) or real(self, step, *args, **more))
    return made


def meta(workdir, step: int) -> dict:
    checkpoints = Checkpoints(workdir)
    found = checkpoints.meta(step)
    checkpoints.close()
    return found


# ---------------------------------------------------------------- preemption

# A step asks once, and so does each batch of an evaluation.
@pytest.mark.parametrize(("call", "step", "abandoned"), [
    (4, 4, False), (EVERY, EVERY, True), (EVERY + 1, EVERY, True), (EVERY + BATCHES + 3, EVERY + 3, False),
    (STEPS + BATCHES, STEPS, True), (STEPS + 2 * BATCHES, STEPS, True)],
    ids=["in a step", "in one to evaluate at", "in an evaluation", "later", "in the last", "at the end"])
def test_preempted_saves_once_and_goes_on(whole, tmp_path, notice, saves, call, step, abandoned):
    cfg, whole_lines, state = whole
    notice(call)
    with pytest.raises(Stopped, match=f"^preempted at step {step}: it is saved; the same command") as e:
        train(cfg, tmp_path)
    assert e.value.status == PREEMPTED == 42
    assert saves == [s for s in range(EVERY, step, EVERY)] + [step]
    assert saved_steps(tmp_path)[-1] == step  # whole when the process ends
    assert not (tmp_path / "summary.json").exists()
    assert (meta(tmp_path, step)["unwritten"] is not None) == abandoned
    assert ([line["step"] for line in lines(tmp_path)][-1] == step) != abandoned

    assert_same_bits(train(cfg, tmp_path), state)
    again = lines(tmp_path)
    assert (tmp_path / "summary.json").exists()
    if step % 3 == 0:  # else the save's own line splits one
        assert again == whole_lines
    assert {line["step"]: line["eval/line/error"] for line in again if "eval/line/error" in line} == {
        line["step"]: line["eval/line/error"] for line in whole_lines if "eval/line/error" in line}
    assert len({line["step"] for line in again}) == len(again)


def test_a_notice_comes_to_a_queue_of_two(tmp_path, monkeypatch):
    """Without a wait the loop asks as far ahead of the devices as a line of metrics is away. The step that is
    under way is not waited for: the device would have nothing to do."""
    asked, waited, real_ended, real_ready = [], [], loop.Run.ended, loop.jax.block_until_ready
    monkeypatch.setattr(loop.jax, "block_until_ready", lambda x: waited.append([*x]) or real_ready(x))

    def ended(self, losses):
        waited.clear()
        asked.append(losses)
        answer = real_ended(self, losses)
        assert [id(x) for (x,) in filter(None, waited)] == [id(x) for x in asked[-2:-1]]
        return answer

    monkeypatch.setattr(loop.Run, "ended", ended)
    train(toy_config(log_every=STEPS), tmp_path)
    assert len(asked) == STEPS + 2 * BATCHES


def test_an_abandoned_evaluation_ends_at_its_batch(tmp_path, notice, monkeypatch):
    looked = []
    monkeypatch.setattr(loop.Held, "diagnose", lambda *args: looked.append("gradients") or {})
    real = loop.Run.ended
    monkeypatch.setattr(loop.Run, "ended", lambda self, losses: looked.append("batch") or real(self, losses))
    notice(EVERY + 1)
    with pytest.raises(Stopped):
        train(toy_config(), tmp_path)
    assert looked == ["gradients"] + ["batch"] * (EVERY + 1)  # the first ones: compiled before the steps


def test_what_a_user_stops_is_saved_and_not_started_again(whole, tmp_path, notice, monkeypatch):
    notice(4)
    monkeypatch.setattr(distributed, "_interrupted", threading.Event())
    distributed._interrupted.set()
    with pytest.raises(Stopped, match=r"^stopped at step 4: it is saved; the same command") as e:
        train(whole[0], tmp_path)
    assert e.value.status == 1 and saved_steps(tmp_path) == [4]


def test_a_notice_in_the_last_step_of_all_finishes_the_run(whole, tmp_path, notice):
    notice(STEPS)
    assert_same_bits(train(toy_config(eval_every=0, diagnostics_every=0), tmp_path), whole[2])
    assert (tmp_path / "summary.json").exists()


def test_a_save_that_fails_at_the_end_is_said(tmp_path, notice, monkeypatch):
    """And the process ends as one that was preempted, which launchers restart."""
    def fail(*_, **__):
        raise ValueError("no space left")

    notice(2)
    monkeypatch.setattr(checkpoint._Manager, "save", fail)
    with pytest.raises(Stopped) as e:
        train(toy_config(), tmp_path)
    assert errors._first(e.value) is e.value
    assert str(e.value).startswith("preempted at step 2: it could not be saved, there is no checkpoint")


def test_an_evaluation_that_was_made_up_for_twice_stands_there_once(whole, tmp_path, notice, monkeypatch):
    """By attempts that ended before they could save again."""
    notice(EVERY)
    with pytest.raises(Stopped):
        train(whole[0], tmp_path)
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(loop, "compile_step", lambda *_: 1 / 0)
            train(whole[0], tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [3, EVERY]


def test_a_step_that_was_evaluated_late_may_be_the_best(tmp_path, notice, monkeypatch):
    """The attempt that makes up for the evaluation remembers its figure; so does the one after it."""
    cfg, real = toy_config(keep_best="eval/error", keep_last=1), Checkpoints.save
    for call in (EVERY + 1, 3):  # in the evaluation; three steps on
        notice(call)
        with pytest.raises(Stopped):
            train(cfg, tmp_path)
    notice(1000)
    monkeypatch.setattr(Checkpoints, "save", lambda self, *args, measured, **more: real(
        self, *args, measured=measured and {"eval/error": 1e9}, **more))  # no later one is as good
    train(cfg, tmp_path)
    assert saved_steps(tmp_path) == [EVERY, STEPS]


def test_all_that_a_save_runs_is_compiled_before_a_notice_is_waited_for(tmp_path, monkeypatch):
    functions, sizes, real, compile_ = [], [], distributed.Preemption.listen, checksum._compiled.__wrapped__

    @functools.cache
    def compiled(out):
        functions.append(compile_(out))
        return functions[-1]

    def size():
        return sum(function._cache_size() for function in functions)

    monkeypatch.setattr(checksum, "_compiled", compiled)
    monkeypatch.setattr(distributed.Preemption, "listen", lambda self: sizes.append(size()) or real(self))
    train(toy_config(), tmp_path)
    assert 0 < size() == sizes[0]


@pytest.mark.parametrize(("processes", "error", "call"), [
    (1, ValueError("x"), "close"), (2, None, "close"), (2, Stopped("x"), "close"),
    (2, ValueError("x"), "abandon"), (2, KeyboardInterrupt(), "abandon")], ids=str)
def test_after_an_error_of_its_own_a_process_asks_the_others_nothing(monkeypatch, processes, error, call):
    """They are at a step, and would never answer."""
    called = []
    checkpoints = SimpleNamespace(
        close=lambda: called.append("close"), abandon=lambda: called.append("abandon"))
    log = SimpleNamespace(goodput=SimpleNamespace(part=lambda name: contextlib.nullcontext()))
    monkeypatch.setattr(saving.jax, "process_count", lambda: processes)
    saver = saving.Saver(toy_config(), checkpoints, SimpleNamespace(identity={}), {}, log)
    saver.__exit__(type(error), error, None)
    assert called == [call]


def test_until_steps_are_under_way_a_notice_ends_the_process_at_once(tmp_path, monkeypatch):
    """Then all is compiled that a save would have to wait for; and until the last save is whole."""
    sizes, at_close, listening = [], [], distributed.Preemption._listening
    real_listen, real_close, real_held = distributed.Preemption.listen, Checkpoints.close, loop.Held
    held = []

    def compiled():
        return held[0].eval_step._cache_size(), held[0].diagnostics_step._cache_size()

    monkeypatch.setattr(loop, "Held", lambda *args: held.append(real_held(*args)) or held[0])
    monkeypatch.setattr(distributed.Preemption, "listen",
                        lambda self: sizes.append((listening.is_set(), compiled())) or real_listen(self))
    monkeypatch.setattr(Checkpoints, "close",
                        lambda self: real_close(self) or at_close.append((listening.is_set(), compiled())))
    train(toy_config(), tmp_path)
    assert sizes == [(False, (1, 1))] and at_close[0] == (True, (1, 1)) and not listening.is_set()


# ---------------------------------------------------------------- saves by time

def test_saves_by_time_at_log_steps(tmp_path, saves, monkeypatch):
    """A step takes a minute: 4 minutes after the last save, whatever it was for, comes the next log step's."""
    clock, real_add = SimpleNamespace(now=0.0), loop.Log.add

    def add(self, *args):
        clock.now += 60.0
        return real_add(self, *args)

    monkeypatch.setattr(saving, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(loop.Log, "add", add)
    train(toy_config(log_every=2, checkpoint_every=5, checkpoint_minutes=4.0), tmp_path)
    assert saves == [4, 5, 10, 12]
    saves.clear()
    train(toy_config(log_every=2, checkpoint_every=5), tmp_path / "by steps only")
    assert saves == [5, 10, 12]


# ---------------------------------------------------------------- numbers that are not finite

def faulty(cfg, bad_steps, gradient_alone=False):
    """The toy's objective, whose loss is NaN at some steps, or is not and its gradient is."""
    real = make_objective(cfg)

    def loss(params, aux, batch, key):
        (total, count), bad = real.loss(params, aux, batch, key)["error"], jnp.array([-1, *bad_steps])
        bad = jnp.any(bad == batch.row_ids_B[0] // cfg.train.batch_size + 1)
        x = jnp.where(bad, 0.0, 1.0) * params["line_kernel"][0] ** 2
        worse = jnp.sqrt(x) if gradient_alone else jnp.where(bad, jnp.nan, 0.0) * total  # of 0: no derivative
        return {"error": (total + worse, count)}

    return real._replace(loss=loss)


def train_faulty(cfg, workdir, bad_steps, monkeypatch):
    kind, objective = KINDS["toy"], faulty(cfg, bad_steps)
    monkeypatch.setitem(KINDS, "toy", kind._replace(make=lambda cfg: objective))
    return train(cfg, workdir)


def is_schedule(x) -> bool:
    return isinstance(x, optax.ScaleByScheduleState)


@pytest.mark.parametrize("gradient_alone", [False, True])
def test_a_skipped_step_changes_nothing_but_the_count(one_device_mesh, gradient_alone):
    cfg = toy_config(nonfinite="skip")
    objective, tx = faulty(cfg, [2], gradient_alone), make_optimizer(cfg.optimizer, STEPS)
    step = jax.jit(steps.make_train_step(objective, tx, cfg))
    state = states.init_state(objective, tx, True, 0, one_device_mesh)
    frozen, rows = {"offset": jnp.float32(toy.OFFSET)}, toy.ToyRows(cfg.width, cfg.seed)
    batches = [jax.tree.map(lambda *x: jnp.stack(x), *rows.read(range(8 * k, 8 * k + 8))) for k in range(3)]
    seen = []
    for batch in batches:
        before = state
        state, losses = step(state, frozen, batch)
        seen.append(jax.device_get(losses))
        same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), before, state)
        scheduled = [x for x in jax.tree.leaves(state, is_leaf=is_schedule) if is_schedule(x)]
        assert [int(x.count) for x in scheduled] == [int(state.step)]  # the learning rate goes on
        same = jax.tree.map(lambda x: True if is_schedule(x) else x, same, is_leaf=is_schedule)
        assert int(state.step) == int(before.step) + 1
        assert all(jax.tree.leaves(same._replace(step=True))) == (batch is batches[1])
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state))
    assert [int(losses["skipped_steps"][0]) for losses in seen] == [0, 1, 0]
    assert {name: tuple(map(float, value)) for name, value in seen[1].items()} == {
        "error": (0, 0), "grad_norm": (0, 0), "param_norm": (0, 0), "skipped_steps": (1, 1)}
    assert int(state.buffers["seen"]) == 16


def test_skipped_steps_are_counted_and_left_out(tmp_path, monkeypatch):
    cfg = toy_config(nonfinite="skip", log_every=1, eval_every=0, diagnostics_every=0)
    train_faulty(cfg, tmp_path / "skip", [4, 5], monkeypatch)
    found = {line["step"]: line for line in lines(tmp_path / "skip")}
    assert [found[s]["train/skipped_steps"] for s in range(1, 8)] == [0, 0, 0, 1, 1, 0, 0]
    assert found[4]["train/error"] is None and found[4]["train/clip_rate"] is None
    train_faulty(replace(cfg, "train", log_every=6), tmp_path / "rare", [4, 5], monkeypatch)
    rare = {line["step"]: line for line in lines(tmp_path / "rare")}
    assert rare[6]["train/skipped_steps"] == 2
    assert rare[6]["train/error"] == pytest.approx(np.mean([found[s]["train/error"] for s in (1, 2, 3, 6)]))
    with pytest.raises(UserError, match=r"^step 4: error, grad_norm, .*not finite"):
        train_faulty(replace(cfg, "train", nonfinite="stop"), tmp_path / "stop", [4, 5], monkeypatch)


def test_too_many_skipped_in_a_row_are_an_error():
    """Not too many in all; and they are counted across lines."""
    losses, most = metrics.Losses(), metrics.MOST_SKIPPED
    for step in range(1, 6 * most):
        losses.add(step, {"error": (0.0, 0), "skipped_steps": (int(step % most != 0), 1)})
    assert losses.means("")["skipped_steps"] == 6 * (most - 1)
    for step in range(1, most):
        losses.add(step, {"skipped_steps": (1, 1)})
    with pytest.raises(UserError, match=rf"^step 1: .* {most}th step in a row"):
        losses.flush()


# ---------------------------------------------------------------- the watchdog

class Result(np.ndarray):
    """As of a step that has ended or not."""

    ended = False

    def is_ready(self) -> bool:
        return self.ended


@pytest.fixture
def hung(monkeypatch):
    """Set where the watchdog would end the process."""
    event = threading.Event()
    monkeypatch.setattr(watchdog.Watchdog, "_end", lambda self: event.set() or self.close())
    return event


def test_a_step_that_does_not_end_is_noticed(hung):
    dog, result = watchdog.Watchdog(0.3 / 60), np.zeros(()).view(Result)
    dog.start()
    for _ in range(8):  # a step that is under way is none that has ended
        dog.watch({"error": (result, 1)})
        time.sleep(0.1)
    assert hung.is_set()


def test_steps_and_saves_keep_it_quiet(hung):
    dog = watchdog.Watchdog(2 / 60)
    dog.start()
    for k in range(8):
        result = np.zeros(()).view(Result)
        if k % 2:
            dog.watch([result])
            result.ended = True
        else:
            dog.beat()
        time.sleep(0.5)
    assert not hung.is_set()
    dog.close()


def test_at_zero_minutes_it_is_off(hung):
    dog = watchdog.Watchdog(0.0)
    dog.start()
    dog.watch([np.zeros(()).view(Result)])
    time.sleep(0.4)
    assert not hung.is_set() and not dog._under_way


def test_until_steps_are_under_way_it_has_more_patience(hung, monkeypatch):
    """A first batch that never comes ends the process too; what comes, as a restored state, starts the hour
    anew."""
    monkeypatch.setattr(watchdog, "START_MINUTES", 1.0 / 60)
    dog = watchdog.Watchdog(0.1 / 60)
    for _ in range(4):
        time.sleep(0.5)
        assert not hung.is_set()
        dog.beat()
    assert hung.wait(5)


HANG = """
import threading, sys
from tfusion.training.watchdog import Watchdog
def where_it_hangs():
    threading.Event().wait()
Watchdog(0.5 / 60).start()
where_it_hangs()
"""


@pytest.mark.slow
def test_a_hung_process_shows_its_stacks_and_is_restarted():
    done = subprocess.run([sys.executable, "-c", HANG], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == HUNG == 134
    assert done.stderr.startswith("error: no step has ended for 0.00833333 minutes (train.watchdog_minutes)")
    assert "in where_it_hangs" in done.stderr and done.stderr.count("most recent call first") >= 2


def test_the_loop_watches_from_its_first_step_to_its_last_save(tmp_path, monkeypatch):
    """Each step and each batch of an evaluation; saves beat, and so do a state, a first batch and the compiled
    step."""
    seen = []
    for name in ("start", "watch", "beat", "close"):
        monkeypatch.setattr(watchdog.Watchdog, name, lambda self, *_, name=name: seen.append(name))
    train(toy_config(watchdog_minutes=1.0), tmp_path)
    half = ["watch"] * (EVERY + BATCHES) + ["beat"]
    assert seen == ["beat", "beat", "beat", "start", *half, *half, "close"]


def test_goodput_of_a_run_that_was_killed(whole, tmp_path, monkeypatch):
    cfg, _, state = whole
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, EVERY + 4)
        train(cfg, tmp_path)
    first = json.loads((tmp_path / "goodput.json").read_text())
    assert_same_bits(train(cfg, tmp_path), state)
    made = json.loads((tmp_path / "goodput.json").read_text())
    assert len(made["attempts"]) == 2 and made["attempts"][0] == first["attempts"][0]
    raw = [sum(attempt["seconds"].values()) for attempt in made["attempts"]]
    assert sum(made["seconds"].values()) == pytest.approx(sum(raw), abs=0.1)
    assert 0 < made["seconds"]["lost"] < raw[0] and made["seconds"]["compile"] > 0
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert {f"goodput/{part}_s" for part in made["seconds"]} < last.keys() and 0 < last["goodput/share"] < 1
    assert last["goodput/lost_s"] == pytest.approx(made["seconds"]["lost"], abs=0.02)
