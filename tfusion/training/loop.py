"""The loop: next batch, step, log; evaluate if due, save if due. It never asks which kind it runs."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from tfusion import config, distributed, paths, sharding
from tfusion.checkpoint import Checkpoints, Keep
from tfusion.data import pipeline
from tfusion.errors import UserError
from tfusion.objectives import kind_of
from tfusion.objectives.base import Aux, Objective
from tfusion.training import metrics, resume, writers
from tfusion.training import state as states
from tfusion.training import step as steps
from tfusion.training.goodput import Goodput
from tfusion.training.optimizer import learning_rate_schedule, make_optimizer
from tfusion.training.saving import Saver
from tfusion.training.watchdog import Watchdog


class Held:
    """Held-out documents and the functions that look at them: the same documents and noise at every
    evaluation, and in every run on the same data. Gradients are looked at on the run's first rows."""

    def __init__(self, cfg: config.RunConfig, objective: Objective, mesh, rows):
        self.objective, self.mesh, self.rows = objective, mesh, rows
        self.names = *objective.weights, *objective.reported
        self.size = cfg.train.batch_size // cfg.train.num_microbatches  # what a training step holds at once
        self.local_rows = sharding.local_rows(mesh, self.size)
        self.sources = kind_of(cfg).open_heldout(cfg, cfg.train.eval_documents)
        self.eval_step = jax.jit(steps.make_eval_step(objective))
        self.diagnostics_step = jax.jit(steps.make_diagnostics(objective))
        self._check(cfg.train.keep_best)

    def compile(self, state, frozen, evaluating: bool, diagnosing: bool) -> None:
        """Compiles what `evaluate` and `diagnose` will call, by calling it: once steps are under way a compiler
        must not stand between a preemption's notice and the save."""
        for held in list(self.sources.values())[:1] if evaluating else ():
            batch = next(held.batches(self.size, self.local_rows))
            jax.block_until_ready(self.eval_step(  # programs under way at once can wait for each other, on CPUs
                states.sampling_params(state), Aux(state.step, frozen, state.buffers),
                sharding.put_batch(batch, self.mesh, self.size)))
        if diagnosing:
            self.diagnose(state, frozen)

    def evaluate(self, state, frozen, ended) -> dict | None:
        """{eval/name: mean over all documents}, and eval/source/name of the losses that evaluations show.

        ended: called with the losses of each batch as it is under way; where it returns True the evaluation is
        abandoned, and nothing returned.
        """
        params, total, values = states.sampling_params(state), metrics.Losses(), {}
        aux = Aux(state.step, frozen, state.buffers)
        for source, held in self.sources.items():
            alone = metrics.Losses()
            for batch in held.batches(self.size, self.local_rows):
                losses = self.eval_step(params, aux, sharding.put_batch(batch, self.mesh, self.size))
                total.add(int(state.step), losses)
                alone.add(int(state.step), {name: losses[name] for name in self.names})
                if ended(losses):
                    return None
            values |= {k: v for k, v in alone.means(f"eval/{source}/").items() if v is not None}
        return total.means("eval/") | values

    def _check(self, name: str) -> None:
        """Raises UserError where an evaluation will have no such loss ("none" is none)."""
        losses = [f"eval/{where}{loss}" for where in ("", *(f"{source}/" for source in self.sources))
                  for loss in self.objective.weights]
        if name not in ("none", *losses):
            raise UserError(f"train.keep_best = {name!r}; choices: none, {', '.join(losses)}")

    def diagnose(self, state, frozen) -> dict:
        batch = next(pipeline.batches(self.rows, 0, 1, self.size, self.local_rows))
        norms = self.diagnostics_step(state.params, Aux(state.step, frozen, state.buffers),
                                      sharding.put_batch(batch, self.mesh, self.size))
        return {f"grad_norm/{name}": float(norm) for name, norm in norms.items()}


def due(step: int, every: int, num_steps: int) -> bool:
    """Every so many steps and at the end; 0 = never."""
    return every > 0 and (step % every == 0 or step == num_steps) and step > 0


class Log:
    """Losses and rates of the steps since the last line; a line is written when its step has finished.

    A line holds all that is known of its step, evaluation and diagnostics too, and the seconds that pauses
    took since the line before: an evaluation stands in its own step's line, a save, which must find that line
    written, in the next.
    """

    def __init__(self, cfg: config.RunConfig, objective: Objective, rows, workdir: Path, begun: resume.Start,
                 goodput: Goodput, wandb: str | None):
        first = int(begun.state.step)
        self.rows_before = begun.next_row - first * cfg.train.batch_size  # where steps had other sizes before
        written = first - (begun.unwritten is not None)  # an earlier attempt may have been here before
        self.cfg, self.objective, self.rows = cfg, objective, rows
        self.writer = writers.open_writers(workdir, written, cfg, wandb) if distributed.is_writer() else (
            writers.Together())
        self.losses, self.goodput = metrics.Losses(), goodput
        self.speed, self.paused, self.late = metrics.Throughput(begun.totals), {}, None
        self.learning_rate = learning_rate_schedule(cfg.optimizer, cfg.train.num_steps)
        self.bar = tqdm(total=cfg.train.num_steps, initial=first, desc=workdir.name, unit="step",
                        mininterval=1.0, dynamic_ncols=True)

    def add(self, step: int, losses, totals, waited: float) -> None:
        """Counts a step that is under way; waits for nothing."""
        self.losses.add(step, losses)
        self.speed.add(totals, waited)
        self.bar.update()

    @contextlib.contextmanager
    def pause(self, name: str, part: str):
        """What runs inside is no part of the steps' time; the next line has its seconds, under `name`."""
        began = time.perf_counter()
        with self.goodput.part(part):
            yield
        seconds = time.perf_counter() - began
        self.speed.pause(seconds)
        self.paused[name] = self.paused.get(name, 0.0) + seconds

    def values(self, step: int) -> dict:
        """Waits for the step's losses: all since the last line. Raises UserError on a NaN."""
        values = self.losses.means("train/")
        values |= self.speed.report()
        values |= self.rows.stats(self.rows_before + step * self.cfg.train.batch_size - 1)
        values["train/learning_rate"] = float(self.learning_rate(step - 1))
        values |= metrics.device_memory(jax.local_devices())
        return values | distributed.most({name: values[name] for name in metrics.COMPARED if name in values})

    def write(self, step: int, values: dict) -> None:
        self.writer.write(step, values | self.paused | self.goodput.values())
        self.paused = {}
        self.bar.set_postfix({k: f"{values['train/' + k]:.3f}" for k in self.objective.weights
                              if values.get("train/" + k) is not None}, refresh=False)

    def write_late(self) -> None:
        """The line of a step that was put off until the next one is under way: the device never waits."""
        if self.late:
            self.write(self.late, self.values(self.late))
            self.late = None

    def close(self) -> None:
        self.bar.close()
        self.writer.close()


class Trace:
    """A trace of n steps from `step` on, of the writing process, in `<workdir>/profile`. profile: (step, n) or
    None."""

    def __init__(self, profile, first: int, workdir: Path):
        profile = profile if distributed.is_writer() else None
        if profile and profile[0] < first:  # the same command again after a crash must go on
            tqdm.write(f"no trace: --profile={profile[0]}:{profile[1]} begins before step {first}")
            profile = None
        self._begin, self._end = (profile[0], sum(profile)) if profile else (None, None)
        self._folder = workdir / "profile"

    def before(self, step: int, state) -> None:
        if step == self._begin:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)

    def after(self, done: int, state) -> None:
        if done == self._end:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()


def fetch(batches, goodput: Goodput):
    """(the next batch, the seconds that it was waited for)"""
    began = time.perf_counter()
    with goodput.part("data"):
        return next(batches), time.perf_counter() - began


def looks(step: int, t: config.TrainConfig) -> tuple[bool, bool]:
    """Whether a step is one to evaluate at, and one to look at gradients at."""
    return due(step, t.eval_every, t.num_steps), due(step, t.diagnostics_every, t.num_steps)


def look(run: "Run", state, frozen, evaluating: bool, diagnosing: bool, ended) -> dict | None:
    """What held-out rows say of a state; the log has how long it took. None where `ended` had it abandoned."""
    values = {}
    if evaluating:
        with run.log.pause("time/eval_s", "eval"):
            values = run.held.evaluate(state, frozen, ended)
    if diagnosing and values is not None:
        with run.log.pause("time/diagnostics_s", "eval"):
            values |= run.held.diagnose(state, frozen)
    return values


def finish(workdir: Path, state, first: int, num_steps: int, totals: dict, seconds: float) -> None:
    """Writes timing.json and, last of all, summary.json: who finds it finds all."""
    if not distributed.is_writer():
        return
    params = sum(x.size for x in jax.tree.leaves(state.params))
    summary = {"num_params": params, "steps": num_steps, **totals}
    metrics.write_timing(workdir, f"train from step {first}" if first else "train", seconds)
    paths.replace_text(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")


class Run(NamedTuple):
    """What the loop works with. Closed with the stack that it was opened on, in the end the checkpoints first:
    what was saved is whole before anything else ends."""

    objective: Objective
    tx: Any
    rows: Any
    held: Held
    log: Log
    saver: Saver
    trace: Trace
    watchdog: Watchdog
    preemption: distributed.Preemption
    before: list  # the losses of the step or batch before

    def ended(self, losses) -> bool:
        """Whether all processes are to save and end; losses: of the step or batch that is under way. The one
        before is waited for: a notice comes to a queue of two, and the device still has one to do."""
        self.watchdog.watch(losses)
        jax.block_until_ready(self.before)
        self.before[:] = [losses]
        return self.preemption.due()


def open_run(closing: contextlib.ExitStack, cfg: config.RunConfig, workdir: Path, mesh, profile, wandb,
             resume_from, process_began) -> tuple[Run, resume.Start]:
    """As `train`; and where it begins."""
    goodput = closing.enter_context(contextlib.closing(Goodput(workdir, process_began)))
    t = cfg.train
    watchdog, preemption = Watchdog(t.watchdog_minutes), distributed.Preemption()
    for each in (watchdog, preemption):
        closing.callback(each.close)
    objective, tx = kind_of(cfg).make(cfg), make_optimizer(cfg.optimizer, t.num_steps)
    rows = kind_of(cfg).open_rows(cfg)
    distributed.check_alike(flatten_dict(cfg.to_dict(), sep=".") | rows.identity | {"--resume": resume_from})
    held = Held(cfg, objective, mesh, rows)
    checkpoints = Checkpoints(workdir, writing=True, keep=Keep(t.keep_last, t.keep_every, t.keep_best))
    begun = resume.start(cfg, objective, tx, mesh, checkpoints, rows, workdir, resume_from)
    goodput.resume(begun.goodput, writing=distributed.is_writer())
    watchdog.beat()
    log = closing.enter_context(contextlib.closing(Log(cfg, objective, rows, workdir, begun, goodput, wandb)))
    saver = closing.enter_context(Saver(cfg, checkpoints, rows, begun.frozen, log))
    trace = Trace(profile, int(begun.state.step), workdir)
    return Run(objective, tx, rows, held, log, saver, trace, watchdog, preemption, []), begun


def train(cfg: config.RunConfig, workdir: Path, mesh, profile=None, wandb: str | None = None,
          resume_from: str = resume.LATEST, process_began: float | None = None) -> states.TrainState:
    """Trains to cfg.train.num_steps, from where training/resume.py says.

    profile: (step, n) writes a trace of n steps to `<workdir>/profile`, for TensorBoard or xprof. wandb: a
    project of Weights & Biases to log to as well. resume_from: what is done about a damaged checkpoint.
    process_began: Unix time; the run's time counts from there.
    """
    if wandb:
        writers.import_wandb()  # raises where it is missing, before any work
    began, t, kind = time.perf_counter(), cfg.train, kind_of(cfg)
    with contextlib.ExitStack() as closing:
        run, begun = open_run(closing, cfg, workdir, mesh, profile, wandb, resume_from, process_began)
        log, (state, frozen, next_row) = run.log, begun[:3]
        first = int(state.step)
        if begun.unwritten is not None:
            looked = look(run, state, frozen, *looks(first, t), lambda losses: False)
            log.write(first, begun.unwritten | looked)
            run.saver.checkpoints.note_late(first, looked)
        train_step, count = None, jax.jit(lambda batch: kind.totals(cfg, batch))
        batches = pipeline.batches(run.rows, next_row, t.num_steps - first, t.batch_size,
                                   sharding.local_rows(mesh, t.batch_size))
        for step in range(first, t.num_steps):
            run.trace.before(step, state)
            batch, waited = fetch(batches, log.goodput)
            placed = sharding.put_batch(batch, mesh, t.batch_size)
            if train_step is None:  # compiled for the first batch
                train_step, waited = compile_step(run, cfg, state, frozen, placed, count), 0.0
                log.speed.begin()  # no rate holds the compilation, nor the start of the readers
            state, losses = train_step(state, frozen, placed)
            next_row += t.batch_size
            log.write_late()
            done = step + 1
            log.add(done, losses, count(placed), waited)
            run.trace.after(done, state)

            logging, saving = (due(done, every, t.num_steps) for every in (t.log_every, t.checkpoint_every))
            saving |= logging and run.saver.timer.due()
            if run.ended(losses) or saving or any(looks(done, t)) or done == t.num_steps:
                values = log.values(done)  # raises on a NaN before a broken state replaces a good checkpoint
                looked = look(run, state, frozen, *looks(done, t), run.ended)
                if looked is not None:
                    log.write(done, values | looked)
                if saving or run.preemption.came:
                    run.saver.save(state, done, next_row, values if looked is None else None, looked or {})
                    run.watchdog.beat()
                if run.preemption.came and (done < t.num_steps or looked is None):
                    raise run.saver.stopped(done, run.preemption.of_the_user())
            elif logging:
                log.late = done
    finish(workdir, state, first, t.num_steps, log.speed.total, time.perf_counter() - began)
    return state


def compile_step(run: Run, cfg: config.RunConfig, state, frozen, placed, count):
    """The training step, compiled for this state and batch; and all else that the loop will call. From here on
    steps can be lost: a preemption saves first, and the watchdog waits for each."""
    with run.log.goodput.part("compile"):
        step = steps.jit_train_step(*run[:2], cfg, state)
        run.watchdog.beat()  # the first batch is there
        compiled = step.lower(state, frozen, placed).compile()
        run.watchdog.beat()
        distributed.wait_for_all()  # the first exchange waits half a minute at most for who compiles longer
        run.held.compile(state, frozen, cfg.train.eval_every > 0, cfg.train.diagnostics_every > 0)
        run.saver.compile(state)
        jax.block_until_ready(count(placed))
        distributed.return_freed_memory()
    run.log.goodput.enter("step")
    run.preemption.listen()
    run.watchdog.start()
    return compiled
