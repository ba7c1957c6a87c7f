"""The loop: next batch, step, log; evaluate if due, save if due. It never asks which kind it runs."""

import contextlib
import json
import time
from pathlib import Path

import jax
from tqdm import tqdm

from tfusion import config, distributed, sharding
from tfusion.checkpoint import Checkpoints, Keep
from tfusion.data import pipeline
from tfusion.errors import Stopped, UserError
from tfusion.objectives import kind_of
from tfusion.objectives.base import Aux, Objective
from tfusion.training import metrics, resume, writers
from tfusion.training import state as states
from tfusion.training import step as steps
from tfusion.training.optimizer import learning_rate_schedule, make_optimizer


class Held:
    """Held-out documents and the functions that look at them: the same documents and noise at every
    evaluation, and in every run on the same data. Gradients are looked at on the run's first rows."""

    def __init__(self, cfg: config.RunConfig, objective: Objective, mesh, rows):
        self.objective, self.mesh, self.rows = objective, mesh, rows
        self.size = cfg.train.batch_size // cfg.train.num_microbatches  # what a training step holds at once
        self.sources = kind_of(cfg).open_heldout(cfg, cfg.train.eval_documents)
        self.eval_step = jax.jit(steps.make_eval_step(objective))
        self.diagnostics_step = jax.jit(steps.make_diagnostics(objective))
        self._check(cfg.train.keep_best)

    def evaluate(self, state, frozen) -> dict:
        """{eval/name: mean over all documents}, and eval/source/name of the losses that are trained on."""
        params, total, values = states.sampling_params(state), metrics.Losses(), {}
        aux = Aux(state.step, frozen, state.buffers)
        for source, held in self.sources.items():
            alone = metrics.Losses()
            for batch in held.batches(self.size, jax.process_index(), jax.process_count()):
                losses = self.eval_step(params, aux, sharding.put_batch(batch, self.mesh))
                total.add(int(state.step), losses)
                alone.add(int(state.step), {name: losses[name] for name in self.objective.weights})
            values |= {k: v for k, v in alone.means(f"eval/{source}/").items() if v is not None}
        return total.means("eval/") | values

    def _check(self, name: str) -> None:
        """Raises UserError where an evaluation will have no such loss ("none" is none)."""
        losses = [f"eval/{where}{loss}" for where in ("", *(f"{source}/" for source in self.sources))
                  for loss in self.objective.weights]
        if name not in ("none", *losses):
            raise UserError(f"train.keep_best = {name!r}; choices: none, {', '.join(losses)}")

    def diagnose(self, state, frozen) -> dict:
        batch = next(pipeline.batches(self.rows, 0, 1, self.size, jax.process_index(), jax.process_count()))
        norms = self.diagnostics_step(state.params, Aux(state.step, frozen, state.buffers),
                                      sharding.put_batch(batch, self.mesh))
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

    def __init__(self, cfg: config.RunConfig, objective: Objective, rows, workdir: Path, first: int, totals,
                 wandb: str | None):
        self.cfg, self.objective, self.rows = cfg, objective, rows
        self.writer, self.losses = writers.open_writers(workdir, first, cfg, wandb), metrics.Losses()
        self.speed, self.paused, self.late = metrics.Throughput(totals), {}, None
        self.learning_rate = learning_rate_schedule(cfg.optimizer, cfg.train.num_steps)
        self.bar = tqdm(total=cfg.train.num_steps, initial=first, desc=workdir.name, unit="step",
                        mininterval=1.0, dynamic_ncols=True)

    def add(self, step: int, losses, totals, waited: float) -> None:
        """Counts a step that is under way; waits for nothing."""
        self.losses.add(step, losses)
        self.speed.add(totals, waited)
        self.bar.update()

    @contextlib.contextmanager
    def pause(self, name: str):
        """What runs inside is no part of the steps' time; the next line has its seconds, under `name`."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self.speed.pause(seconds)
        self.paused[name] = self.paused.get(name, 0.0) + seconds

    def values(self, step: int) -> dict:
        """Waits for the step's losses: all since the last line. Raises UserError on a NaN."""
        values = self.losses.means("train/")
        values |= self.speed.report() | self.rows.stats(step * self.cfg.train.batch_size - 1)
        values["train/learning_rate"] = float(self.learning_rate(step - 1))
        return values | metrics.device_memory(jax.local_devices())

    def write(self, step: int, values: dict) -> None:
        self.writer.write(step, values | self.paused)
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
    """A trace of n steps from `step` on, in `<workdir>/profile`. profile: (step, n) or None."""

    def __init__(self, profile, first: int, workdir: Path):
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


def fetch(batches):
    """(the next batch, the seconds that it was waited for)"""
    began = time.perf_counter()
    return next(batches), time.perf_counter() - began


def look(held: Held, log: Log, state, frozen, evaluating: bool, diagnosing: bool) -> dict:
    """What held-out rows say of a state; the log has how long it took."""
    values = {}
    if evaluating:
        with log.pause("time/eval_s"):
            values |= held.evaluate(state, frozen)
    if diagnosing:
        with log.pause("time/diagnostics_s"):
            values |= held.diagnose(state, frozen)
    return values


def finish(workdir: Path, state, first: int, num_steps: int, totals: dict, seconds: float) -> None:
    """Writes timing.json and, last of all, summary.json: who finds it finds all."""
    params = sum(x.size for x in jax.tree.leaves(state.params))
    summary = {"num_params": params, "steps": num_steps, **totals}
    metrics.write_timing(workdir, f"train from step {first}" if first else "train", seconds)
    config.replace_text(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")


def stopped(done: int, saved: int) -> Stopped:
    """saved: the step of the last checkpoint, 0 where there is none."""
    lost = f"the last checkpoint is of step {saved}, the {done - saved} since are lost" if saved else (
        "there is no checkpoint yet")
    return Stopped(f"stopped by SIGTERM at step {done}: {lost}; the same command goes on from there")


def train(cfg: config.RunConfig, workdir: Path, mesh, profile=None, wandb: str | None = None,
          resume_from: str = resume.LATEST) -> states.TrainState:
    """Trains to cfg.train.num_steps, from where training/resume.py says.

    profile: (step, n) writes a trace of n steps to `<workdir>/profile`, for TensorBoard or xprof. wandb: a
    project of Weights & Biases to log to as well. resume_from: what is done about a damaged checkpoint.
    """
    if wandb:
        writers.import_wandb()  # raises where it is missing, before any work
    began, t, kind = time.perf_counter(), cfg.train, kind_of(cfg)
    objective, tx, rows = kind.make(cfg), make_optimizer(cfg.optimizer, t.num_steps), kind.open_rows(cfg)
    held, count = Held(cfg, objective, mesh, rows), jax.jit(lambda batch: kind.totals(cfg, batch))
    checkpoints = Checkpoints(workdir, writing=True, keep=Keep(t.keep_last, t.keep_every, t.keep_best))
    state, frozen, next_row, totals = resume.start(
        cfg, objective, tx, mesh, checkpoints, rows, workdir, resume_from)
    first = saved = int(state.step)
    trace, sigterm = Trace(profile, first, workdir), distributed.Sigterm()
    log = Log(cfg, objective, rows, workdir, first, totals, wandb)
    train_step = None  # compiled for the first batch
    batches = pipeline.batches(rows, next_row, t.num_steps - first, t.batch_size,
                               jax.process_index(), jax.process_count())
    try:
        for step in range(first, t.num_steps):
            trace.before(step, state)
            batch, waited = fetch(batches)
            placed = sharding.put_batch(batch, mesh)
            if train_step is None:
                train_step = compile_step(objective, tx, cfg, state, frozen, placed)
                sigterm.listen()
                waited = 0.0
                log.speed.begin()  # no rate holds the compilation, nor the start of the readers
            state, losses = train_step(state, frozen, placed)
            next_row += t.batch_size
            log.write_late()
            done = step + 1
            log.add(done, losses, count(placed), waited)
            trace.after(done, state)

            saving, evaluating, diagnosing = (due(done, every, t.num_steps) for every in (
                t.checkpoint_every, t.eval_every, t.diagnostics_every))
            if saving or evaluating or diagnosing or done == t.num_steps:
                values = log.values(done)  # raises on a NaN before a broken state replaces a good checkpoint
                log.write(done, values | (seen := look(held, log, state, frozen, evaluating, diagnosing)))
                if saving:
                    with log.pause("time/save_s"):
                        checkpoints.save(done, states.items(state), {
                            "next_row": next_row, "totals": dict(log.speed.total), "identity": rows.identity,
                            "config": cfg.to_dict()}, frozen=frozen, measured=seen)
                    saved = done
            elif due(done, t.log_every, t.num_steps):
                log.late = done
            if sigterm.came and done < t.num_steps:
                raise stopped(done, saved)
    finally:
        sigterm.close()
        with contextlib.closing(log):
            checkpoints.close()
    finish(workdir, state, first, t.num_steps, log.speed.total, time.perf_counter() - began)
    return state


def compile_step(objective: Objective, tx, cfg: config.RunConfig, state, frozen, placed):
    """The training step, compiled for this state and batch."""
    compiled = steps.jit_train_step(objective, tx, cfg, state).lower(state, frozen, placed).compile()
    distributed.return_freed_memory()
    return compiled
