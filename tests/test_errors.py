"""A user's mistake ends in one line on stderr that begins with `error:`, status 1, no traceback.

The verbs are run as a user runs them, but forked from one process that has imported jax and the rest
already: the first import takes seconds, a mistake milliseconds.
"""

import errno
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest
from absl import app

from tests.conftest import tiny_config
from tfusion import config, errors, sharding
from tfusion.checkpoint import Checkpoints
from tfusion.objectives import kind_of, make_objective
from tfusion.training import state as states
from tfusion.training.optimizer import make_optimizer
from tfusion.workdir import LOCK, hold

ROOT = Path(__file__).parents[1]
ALONE = ("broken_checkpoint",)  # starts Orbax's threads, which a fork of the driver can trip over
FOLDERS = ("TMP", "PREPARED", "BROKEN")  # in arguments: replaced by paths

DRIVER = """
import json, os, runpy, sys
import jax
import ml_collections.config_flags, tfusion.objectives
import tfusion.inference.pictures, tfusion.inference.transfusion, tfusion.reporting.data_page
import tfusion.training.loop

for name, verb, args in json.load(sys.stdin):
    pid = os.fork()
    if not pid:
        for stream in (1, 2):
            os.dup2(os.open(f"{sys.argv[1]}/{name}.{stream}", os.O_WRONLY | os.O_CREAT), stream)
        if args and args[0].startswith("JAX_PLATFORMS="):
            jax.config.update("jax_platforms", args.pop(0).split("=")[1])
        sys.argv = [verb, *args]
        runpy.run_module(f"tfusion.{verb}", run_name="__main__", alter_sys=True)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    open(f"{sys.argv[1]}/{name}.status", "w").write(str(status))
"""

TRAIN = ["--config=experiments/quickstart.py", "--workdir=TMP/run"]
SMALL = [*TRAIN, "--config.data.tokenizer=byte", "--config.model.text_vocab_size=260",
         "--config.data.prepared=PREPARED"]
PREPARE = ["--config=experiments/quickstart.py", "--config.data.prepared=TMP/data"]
FEW = ["--config.data.sources.scenes.num_records=64"]
OWN = ["--config=experiments/own_data.py:smoke,autoencoder", "--workdir=TMP/own"]
CASES = {  # name: (verb, arguments, what the line says)
    "unknown_key": ("train", [*TRAIN, "--config.model.num_layrs=3"],
                    ["unknown config key 'num_layrs' Did you mean \"num_layers\""]),
    "kind_by_flag": ("train", [*OWN, "--config.data.sources.photos.kind=jsonl"],
                     ["--config.data.sources.photos.kind: a kind brings keys of its own",
                      "of experiments/own_data.py, at most one of each: objective", "photos=folder, notes="]),
    "inspect_pictures_alone": (
        "prepare", ["--config=experiments/quickstart.py:autoencoder", "--inspect=TMP/x.html"],
        ["trains on data.sources as they are: there is nothing to prepare"]),
    "inspect_a_folder": ("prepare", [*PREPARE, "--inspect=TMP"], ["--inspect=TMP must name a page to write"]),
    "inspect_a_picture": ("prepare", [*PREPARE, "--inspect=TMP/x.png"],
                          ["--inspect=TMP/x.png must name a page to write, such as data.html"]),
    "inspect_below_a_file": ("prepare", [*PREPARE, "--inspect=TMP/file/x.html"],
                             ["--inspect=TMP/file/x.html cannot be written"]),
    "tokens_of_no_rows": (
        "plan", ["--config=experiments/quickstart.py:autoencoder", "--topology=h100-8", "--tokens=1e9"],
        ["--tokens and --flops count positions of rows", "set --config.train.num_steps"]),
    "no_folder_of_pictures": ("train", [*OWN, "--config.data.sources.photos.path=TMP/none"],
                              ["TMP/none not found", "--config.data.sources.NAME.path=DIR"]),
    "no_pictures": ("train", [*OWN, "--config.data.sources.photos.path=TMP/held"],
                    ["TMP/held holds no pictures"]),
    "unknown_group": ("train", [*TRAIN, "--config.modl.num_layers=3"], ["modl"]),
    "wrong_type": ("train", [*TRAIN, "--config.seed=x"], ["seed", "x"]),
    "wrong_float": ("train", [*TRAIN, "--config.optimizer.learning_rate=fast"], ["learning_rate", "fast"]),
    "bad_choice": ("train", [*TRAIN, "--config.model.remat=half"],
                   ["remat = 'half'; choices: none, attention, dots, full"]),
    "plan_tokens_nan": ("plan", ["--config=experiments/transfusion.py:0.16b", "--topology=h100-8",
                                 "--tokens=nan"], ["--tokens = nan must be positive and finite"]),
    "profile_one_number": ("train", [*TRAIN, "--profile=5"], ["--profile=5 must be START:N", "--profile=10:3"]),
    "profile_no_number": ("train", [*TRAIN, "--profile=5:²"], ["--profile=5:² must be START:N"]),
    "seed_beyond_32_bits": ("train", [*TRAIN, "--config.seed=4294967296"],
                            ["seed = 4294967296 must be at most 4294967295"]),
    "sampling_seed_beyond_32_bits": ("sample", ["--workdir=TMP/none", "--num_documents=1", "--seed=4294967296"],
                                     ["--seed=4294967296", "4294967295"]),
    "sampling_seed_negative": ("sample", ["--workdir=TMP/none", "--num_documents=1", "--seed=-1"],
                               ["--seed=-1"]),
    "evaluation_seed_negative": ("evaluate", ["--workdir=TMP/none", "--seed=-1"], ["--seed=-1"]),
    "profile_no_steps": ("train", [*TRAIN, "--profile=5:0"], ["--profile=5:0 must be START:N"]),
    "profile_past_the_end": ("train", [*TRAIN, "--config.train.num_steps=20", "--profile=18:3"],
                             ["--profile=18:3", "at most train.num_steps = 20"]),
    "bad_mesh": ("train", [*TRAIN, "--config.mesh.data=3"], ["mesh data=3", "does not fit 1 devices"]),
    "no_config": ("train", ["--workdir=TMP/run"], ["--config", "--workdir"]),
    "no_workdir": ("train", TRAIN[:1], ["--config", "--workdir"]),
    **{f"no_such_file_{verb}": (verb, ["--config=experiments/nope.py:a", *args], [
        "error: experiments/nope.py not found: experiments/FILE.py[:variant] is wanted"])
       for verb, args in (("train", ["--workdir=TMP/run"]), ("prepare", []), ("plan", ["--topology=h100-8"]))},
    "report_below_a_file": ("report", ["--scaling=TMP/none", "--out=TMP/file/x"],
                            ["error: --out=TMP/file/x is not writable (Not a directory); choose another"]),
    "results_below_a_file": ("report", ["--scaling=TMP/none", "--results=TMP/file/x"],
                             ["error: --results=TMP/file/x is not writable (Not a directory); choose another"]),
    "sweep_below_a_file": ("sweep", ["--config=experiments/ablations.py", "--out=TMP/file/x"],
                           ["error: --out=TMP/file/x is not writable (Not a directory); choose another"]),
    "export_below_a_file": ("export", ["--workdir=TMP/none", "--out=TMP/file/x"],
                            ["error: --out=TMP/file is not writable (Not a directory); choose another folder"]),
    "unknown_variant": ("train", ["--config=experiments/quickstart.py:huge", "--workdir=TMP/run"],
                        ["unknown variant 'huge'; at most one of each: objective: transfusion, autoencoder"]),
    "two_of_a_group": ("train", ["--config=experiments/transfusion.py:7b,0.16b", "--workdir=TMP/run"],
                       ["variants '7b' and '0.16b': at most one size can be chosen"]),
    "unknown_flag": ("train", [*TRAIN, "--wrkdir=x"], ["wrkdir"]),
    "loose_argument": ("train", [*TRAIN, "workdir=x"], ["unexpected argument 'workdir=x'"]),
    "below_a_file": ("train", [TRAIN[0], "--workdir=TMP/file/run"], ["TMP/file/run is not writable"]),
    "in_the_home_folder": ("train", [TRAIN[0], "--workdir=~/file/run"], ["TMP/file/run is not writable"]),
    **{f"url_{verb}_{flag}": (verb, [f"--{flag}=http://host/x"], [f"--{flag}=http://host/x: a local path"])
       for verb, flag in (("train", "workdir"), ("sample", "workdir"), ("sample", "image"), ("sample", "out"),
                          ("evaluate", "workdir"), ("prepare", "codec"), ("prepare", "inspect"),
                          ("report", "workdir"), ("report", "out"))},
    **{f"no_device_{verb}": (verb, ["JAX_PLATFORMS=abacus", *args],
                             ["JAX_PLATFORMS=abacus cannot be used", "; unset it, or install JAX for that"])
       for verb, args in (("train", TRAIN), ("prepare", [*PREPARE, "--codec=TMP/none"]),
                          ("sample", ["--workdir=TMP/none", "--num_documents=1"]),
                          ("evaluate", ["--workdir=TMP/none"]))},
    "url_in_the_config": ("train", [*TRAIN, "--config.data.prepared=file:///x"],
                          ["data.prepared = 'file:///x': a local path"]),
    "no_prepared": ("train", [*TRAIN, "--config.data.prepared=TMP/none"],
                    ["TMP/none/meta.json not found", "tfusion.prepare"]),
    "other_latents": ("train", SMALL, ["PREPARED holds latents of shape (4, 4, 4)", "(8, 8, 8)"]),
    "unknown_source": ("train", [*SMALL, "--config.model.adapter.latent_size=4",
                                 "--config.model.adapter.latent_channels=4",
                                 "--config.data.sources.scenes.share=0",
                                 "--config.data.sources.stories.share=0",
                                 "--config.data.prepared=TMP/half"], ["names 'glosses'"]),
    "broken_checkpoint": ("train", ["--config=TMP/tiny.py", "--workdir=BROKEN"],
                          ["BROKEN/checkpoints/0 cannot be read", "move that folder away to start again"]),
    "other_model": ("train", ["--config=TMP/tiny.py", "--workdir=BROKEN", "--config.model.num_layers=3"],
                    ["saved with model.num_layers = 2, the config has 3"]),
    "other_tokenizer": ("prepare", [*PREPARE, "--codec=TMP/none", "--config.data.tokenizer=byte"],
                        ["data.tokenizer = 'byte' has 260 pieces, model.text_vocab_size = 1022"]),
    "no_tokenizer": ("prepare", [*PREPARE, "--codec=TMP/none", "--config.data.tokenizer=TMP/none.model"],
                     ["TMP/none.model"]),
    "no_autoencoder": ("prepare", [*PREPARE, "--codec=TMP/none"], ["TMP/none/config.json not found"]),
    "no_config_to_prepare": ("prepare", ["--codec=TMP/none"], ["--config=experiments/FILE.py is needed"]),
    "autoencoder_not_given": ("prepare", [*PREPARE, *FEW], ["names a source with pictures", "--codec"]),
    "prepare_over_what_is_yours": ("prepare", ["--config=experiments/quickstart.py", "--codec=TMP/none",
                                               "--config.data.prepared=TMP"],
                                   ["TMP holds ", " that `python -m tfusion.prepare` did not make"]),
    "two_writers": ("train", ["--config=TMP/tiny.py", "--workdir=TMP/held"],
                    ["TMP/held is being written by another process (process"]),
    "evaluate_elsewhere": ("evaluate", ["--workdir=BROKEN", "--config.data.prepard=x"], ["prepard"]),
    "sample_no_such_mesh": ("sample", ["--workdir=BROKEN", "--num_documents=1", "--mesh=rows=2"],
                            ["--mesh=rows=2 must name sizes of data, fsdp, sequence, tensor"]),
    "inspect_nothing_prepared": ("prepare", [*PREPARE, "--inspect=TMP/data.html"],
                                 ["TMP/data/meta.json not found", "written by `python -m tfusion.prepare`"]),
    "sample_no_run": ("sample", ["--workdir=TMP/none", "--num_documents=1"], ["TMP/none"]),
    "evaluate_no_run": ("evaluate", ["--workdir=TMP/none"], ["TMP/none"]),
    "report_no_run": ("report", ["--workdir=TMP/none"], ["TMP/none"]),
}


def broken_run(cfg, workdir: Path) -> None:
    """A workdir whose only checkpoint lost half of its largest file."""
    mesh = sharding.make_mesh(config.MeshConfig(1, 1, 1, 1), jax.devices()[:1])
    tx = make_optimizer(cfg.optimizer, cfg.train.num_steps)
    with jax.set_mesh(mesh):
        state = states.init_state(make_objective(cfg), tx, True, 0, mesh)
        checkpoints = Checkpoints(workdir, writing=True)
        identity = kind_of(cfg).open_rows(cfg).identity
        meta = {"next_row": 0, "totals": {}, "identity": identity, "config": cfg.to_dict()}
        checkpoints.save(0, states.items(state), meta)
        checkpoints.close()
    largest = max((p for p in (workdir / "checkpoints").rglob("*") if p.is_file()),
                  key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def write_experiment(folder: Path, cfg) -> None:
    """`folder`/tiny.py, an experiment file with this config."""
    tree = json.dumps(cfg.to_dict())
    (folder / "tiny.py").write_text("import json\nfrom ml_collections import ConfigDict\n\n\n"
                                    f"def get_config(arg=None):\n    return ConfigDict(json.loads({tree!r}))\n")


@pytest.fixture(scope="module")
def outcomes(prepared_root, tmp_path_factory):
    """{name: (status, stdout, stderr, function that puts paths into a text)} of every case."""
    tmp, logs, broken = (tmp_path_factory.mktemp(x) for x in ("tmp", "logs", "broken"))
    cfg = tiny_config(prepared_root)
    broken_run(cfg, broken)
    (tmp / "file").touch()
    (tmp / "held").mkdir()
    held = hold(tmp / "held" / LOCK)
    (tmp / "half").mkdir()
    (tmp / "half" / "meta.json").write_text((prepared_root / "meta.json").read_text())
    write_experiment(tmp, cfg)
    paths = dict(zip(FOLDERS, map(str, (tmp, prepared_root, broken))))

    def filled(text: str) -> str:
        for name, path in paths.items():
            text = text.replace(name, path)
        return text

    cases = [(name, verb, [filled(x) for x in args]) for name, (verb, args, _) in CASES.items()
             if name not in ALONE]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "HOME": str(tmp)}
    done = subprocess.run([sys.executable, "-c", DRIVER, str(logs)], input=json.dumps(cases), cwd=ROOT,
                          env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    outcomes = {name: (int((logs / f"{name}.status").read_text()),
                       *((logs / f"{name}.{x}").read_text() for x in (1, 2)), filled) for name, _, _ in cases}
    for name in ALONE:
        verb, args, _ = CASES[name]
        run = subprocess.run([sys.executable, "-m", f"tfusion.{verb}", *(filled(x) for x in args)], cwd=ROOT,
                             env=env, capture_output=True, text=True, timeout=300)
        outcomes[name] = run.returncode, run.stdout, run.stderr, filled
    held.close()
    return outcomes


@pytest.mark.parametrize("name", CASES)
def test_mistake_is_one_line(outcomes, name):
    status, stdout, stderr, filled = outcomes[name]
    assert status == 1, stderr
    assert "Traceback" not in stderr + stdout
    assert [line for line in stderr.splitlines() if line.strip()] == [stderr.strip()], "more than one line"
    assert stderr.startswith("error: ")
    for words in CASES[name][2]:
        assert filled(words) in stderr


PRINT = "from tfusion.errors import run; run(lambda: print('caf\\u00e9 ' * {}))"


def printing(words: int, shell: str, **env):
    """The shell's command with $PRINT in it a verb that prints so many words."""
    code = f'{sys.executable} -c "{PRINT.format(words)}"'
    return subprocess.run(["bash", "-c", "set -o pipefail; " + shell.replace("$PRINT", code)], cwd=ROOT,
                          env={**os.environ, **env}, capture_output=True, timeout=60)


@pytest.mark.parametrize(("words", "shell", "status", "out", "err"), [
    (1, "$PRINT", 0, b"caf?", b""),  # the verb's own work is not lost by a letter
    (1, "$PRINT >&-", 0, b"", b""),
    (1, "$PRINT | true", 0, b"", b""),  # nobody reads: all is done by then
    (99_999, "$PRINT | true", 1, b"", b""),
    (1, "$PRINT > /dev/full", 1, b"", b"error: [Errno 28] No space left on device\n")])
def test_output_that_goes_nowhere(words, shell, status, out, err):
    done = printing(words, shell, PYTHONIOENCODING="ascii", PYTHONUNBUFFERED="")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (status, out, err)


FULL = """
import resource, runpy, sys
from tfusion import checkpoint

save = checkpoint.Checkpoints.save

def full(self, step, *rest, **more):
    if step > 1:
        self._settle()
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, resource.RLIM_INFINITY))
    return save(self, step, *rest, **more)

checkpoint.Checkpoints.save = full
runpy.run_module("tfusion.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_saves_that_fail_are_a_line_each_and_leave_the_older_whole(prepared_root, tmp_path):
    """The system refuses more than 16 KiB a file from the second checkpoint on, as a full disk would. Training
    goes on to its end, which is an error, for its state is not there."""
    cfg = tiny_config(prepared_root)
    write_experiment(tmp_path, cfg)
    args = [f"--config={tmp_path / 'tiny.py'}", f"--workdir={tmp_path / 'run'}", "--config.train.num_steps=4",
            "--config.train.checkpoint_every=1", "--config.train.eval_every=0",
            "--config.train.diagnostics_every=0"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
           "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run([sys.executable, "-c", FULL, *args], cwd=ROOT, env=env, capture_output=True,
                          text=True, timeout=300)
    said = [line for line in done.stderr.replace("\r", "\n").splitlines()
            if line.strip() and "step/s" not in line and "s/step" not in line]
    where = tmp_path / "run" / "checkpoints"
    assert done.returncode == 1 and len(said) == 4, done.stderr
    for step, line in zip((2, 3, 4), said):
        assert line.startswith(f"warning: the checkpoint of step {step} cannot be written to {where} (")
        assert "File too large" in line and "training goes on, the last one is of step 1: make room" in line
    assert said[3].startswith(f"error: a checkpoint, of step 4, cannot be written to {where} (")
    assert "File too large" in said[3] and said[3].endswith("make room, and the same command goes on")
    assert not (tmp_path / "run" / "summary.json").exists()
    saved = Checkpoints(tmp_path / "run")
    assert saved.steps() == [1] and saved.meta(1)["next_row"] == cfg.train.batch_size
    mesh = sharding.parse_mesh(None)
    tx = make_optimizer(cfg.optimizer, 4)
    saved.restore(1, states.items(states.restore_target(make_objective(cfg), tx, True, mesh)))


def failing_with(error, monkeypatch, capsys) -> tuple[int, str]:
    def main():
        raise error

    monkeypatch.setattr(app, "run", lambda guarded, flags_parser: guarded(["verb"]))
    with pytest.raises(SystemExit) as e:
        errors.run(main)
    return e.value.code, capsys.readouterr().err


def after(first, error, told=False):
    """An error that was raised in clearing up after another; told: by `raise ... from`, which says more."""
    error.__context__, error.__suppress_context__ = first, told
    return error


@pytest.mark.parametrize(("error", "line"), [
    (errors.UserError("what,\n  where"), "error: what, where\n"),
    (errors.UserError(), "error: \n"),
    (FileNotFoundError(2, "No such file or directory", "x.npy"),
     "error: [Errno 2] No such file or directory: 'x.npy'\n"),
    (PermissionError(13, "Permission denied", "/x"), "error: [Errno 13] Permission denied: '/x'\n"),
    (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device: what was saved before "
     "is whole; make room, and the same command goes on\n"),
    (after(errors.UserError("what, where"), OSError(28, "x")), "error: what, where\n"),
    (after(errors.UserError("what"), errors.UserError("where: what"), told=True), "error: where: what\n"),
    (KeyboardInterrupt(), "error: interrupted; run the same command again to go on from the last checkpoint\n"),
])
def test_errors_of_the_user(error, line, monkeypatch, capsys):
    assert failing_with(error, monkeypatch, capsys) == (1, line)


def test_a_run_that_was_stopped_is_one_that_launchers_restart(monkeypatch, capsys):
    assert failing_with(errors.Stopped("stopped"), monkeypatch, capsys) == (42, "stopped\n")


UNANSWERED = [OSError(errno.EIO, "x"), OSError(errno.ESTALE, "x"), ConnectionResetError(), TimeoutError(),
              ValueError("UNAVAILABLE: gs://x"), ValueError("opening /x: Input/output error [5]"),
              type("HttpError", (Exception,), {"code": 503})(), type("ClientPayloadError", (Exception,), {})()]
ANSWERED = [FileNotFoundError(2, "x"), PermissionError(13, "x"), ValueError("bad checksum"), KeyError("x"),
            type("HttpError", (Exception,), {"code": 403})(), None]


@pytest.mark.parametrize(("error", "so"), [*((e, True) for e in UNANSWERED), *((e, False) for e in ANSWERED)],
                         ids=repr)
def test_storage_that_did_not_answer_is_told_from_what_it_says(error, so):
    assert errors.unanswered(error) == so
    later = ValueError("cannot be read")
    later.__cause__ = error
    assert errors.unanswered(later) == so


def test_what_did_not_answer_may_answer_the_next_attempt(monkeypatch, capsys):
    assert failing_with(OSError(errno.EIO, "Input/output error", "/data/x"), monkeypatch, capsys) == (
        errors.HUNG, "error: [Errno 5] Input/output error: '/data/x'\n")


INTERRUPTED = """
import os, signal, time
from tfusion.errors import run
class Dies:
    def __del__(self):
        raise KeyboardInterrupt
def main():
    Dies()  # what a signal in a callback becomes
    time.sleep(20)
    os._exit(7)
run(main)
"""


@pytest.mark.slow
def test_ctrl_c_in_a_callback_is_not_lost():
    """Orbax's other unraisable exceptions are: they say nothing."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1, "error: interrupted; run the same command again to go on from the last checkpoint\n")


def told_by_one_that_raises(error, monkeypatch) -> tuple:
    """(error, status, text) that a process leaves with, of several."""
    left = []

    def main():
        raise error

    monkeypatch.setattr(app, "run", lambda guarded, flags_parser: guarded(["verb"]))
    monkeypatch.setattr(errors, "leave", lambda *told: left.append(told))
    errors.run(main)
    told, = left
    return told


def test_an_interrupted_process_tells_the_others(monkeypatch):
    error, status, text = told_by_one_that_raises(KeyboardInterrupt(), monkeypatch)
    assert isinstance(error, errors.UserError) and status == 1 and text.startswith("interrupted; run the same")


def test_of_several_processes_one_whose_output_is_closed_tells_the_others(monkeypatch):
    """It would leave them waiting in a collective."""
    assert told_by_one_that_raises(BrokenPipeError(), monkeypatch) == (None, 1, "its output was closed")


def test_what_orbax_leaves_behind_is_not_heard(monkeypatch):
    """A broken checkpoint's other reads: Python 3.13 warns of those that were never begun."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        errors._hush_orbax()
        warnings.warn("coroutine '_read' was never awaited", RuntimeWarning, stacklevel=1)
        warnings.warn("something else", RuntimeWarning, stacklevel=1)
    assert [str(warning.message) for warning in heard] == ["something else"]


def test_errors_of_ours_keep_their_traceback(monkeypatch, capsys):
    """A bug is not dressed up as a user's mistake."""
    monkeypatch.setattr(app, "run", lambda guarded, flags_parser: guarded(["verb"]))
    with pytest.raises(ZeroDivisionError):
        errors.run(lambda: 1 / 0)
