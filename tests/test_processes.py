"""Several real processes share one run: what they compute is one's, and they end together."""

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import processes
from tests.conftest import tiny_dict
from tests.test_errors import write_experiment
from tests.test_prepare import tree
from tests.test_resume import saved_steps
from tfusion import config
from tfusion.inference import trained
from tfusion.workdir import LOCK, hold

pytestmark = pytest.mark.slow

TOY = ("--config=tests/toy.py", "--config.train.num_steps=120", "--config.train.checkpoint_every=20",
       "--config.train.eval_documents=32")
FAST = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"}


def losses(workdir: Path) -> dict[int, float]:
    """{step: training loss}: of the same rows and noise, or not the same."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: next(line[name] for name in ("train/error", "train/lm_loss") if name in line)
            for line in map(json.loads, lines)}


def assert_same_numbers(a: Path, b: Path) -> None:
    assert losses(a).keys() == losses(b).keys()
    np.testing.assert_allclose(list(losses(a).values()), list(losses(b).values()), rtol=1e-4)


def train(n: int, devices: int, *flags: str) -> None:
    with processes.running(n, "tfusion.train", *flags, devices_per_process=devices, **FAST) as started:
        processes.succeed(started)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of one process on four devices."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train(1, 4, *TOY, f"--workdir={workdir}")
    return workdir


def local(*flags: str, log: Path, devices: int = 2) -> subprocess.Popen:
    """`launch/local.sh --processes=2 -- FLAGS`, in a group of its own."""
    with log.open("w") as file:
        return subprocess.Popen(["launch/local.sh", "--processes=2", "--", *flags], cwd=processes.ROOT,
                                env=processes.environment(devices, **FAST), stdout=file, stderr=file,
                                start_new_session=True)


@contextlib.contextmanager
def launched(*flags: str, workdir: Path):
    """Yields (the launcher, its log), once there is a checkpoint; none of the group is left behind."""
    log = workdir.with_suffix(".log")
    shell = local(*flags, f"--workdir={workdir}", log=log)
    try:
        deadline = time.monotonic() + 300
        while not ((workdir / "checkpoints").is_dir() and saved_steps(workdir)):
            assert shell.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield shell, log
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()


def test_two_processes_killed_go_on_as_one_and_as_four(whole, tmp_path):
    """On the same mesh of four devices, with the same rows and the same noise."""
    one, four = tmp_path / "one", tmp_path / "four"
    with launched(*TOY, workdir=one):
        pass  # killed
    killed_at = saved_steps(one)[-1]
    assert killed_at < 120
    shutil.copytree(one, four)
    train(1, 4, *TOY, f"--workdir={one}")
    assert_same_numbers(one, whole)
    with processes.running(4, "tfusion.train", *TOY, f"--workdir={four}", **FAST) as started:
        processes.succeed(started)
    assert_same_numbers(four, whole)
    assert f"resumed from step {killed_at} of 120" in started[0].stdout()
    assert not any(process.stdout() or process.errors() for process in started[1:]), "one talks"
    assert len(list((four / "tensorboard").iterdir())) == 2, "one writes"
    with processes.running(2, "tests.toy", "evaluate", f"--workdir={four}", **FAST) as started:
        processes.succeed(started)
    after = json.loads((four / "metrics.jsonl").read_text().splitlines()[-1])
    (figure,) = json.loads((four / "evaluation" / "metrics.json").read_text())["metrics"].values()
    assert figure["value"] == pytest.approx(after["eval/error"], rel=1e-4)


def test_sigterm_to_the_launcher_ends_all(tmp_path):
    flags = (*TOY, "--config.train.num_steps=100000")
    with launched(*flags, workdir=tmp_path / "run") as (shell, log):
        shell.send_signal(signal.SIGTERM)
        assert shell.wait(120) == 42, log.read_text()
    assert "preempted at step" in log.read_text() and "error:" not in log.read_text()


def test_a_process_that_dies_ends_the_other_which_says_so(tmp_path):
    """kill -9: nothing is said, its heartbeats stay away."""
    flags = (*TOY, "--config.train.num_steps=1000000", f"--workdir={tmp_path}")
    with processes.running(2, "tfusion.train", *flags, **FAST) as started:
        processes.wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and losses(tmp_path), started)
        began = time.monotonic()
        started[1].kill()
        assert started[0].wait(120) == 134
        assert time.monotonic() - began < 60
        assert re.search(r"tasks are unhealthy \(stopped sending heartbeats\):\s+1\b", started[0].stderr())


def test_a_mistake_that_one_process_sees_ends_both(tmp_path):
    """The lock of a workdir is for process 0 to take; the other waits for it to restore."""
    tmp_path.joinpath("run").mkdir()
    held = hold(tmp_path / "run" / LOCK)
    with processes.running(2, "tfusion.train", *TOY, f"--workdir={tmp_path / 'run'}", **FAST) as started:
        assert [process.wait(120) for process in started] == [1, 1]
    held.close()
    (own,), (told,) = (process.errors() for process in started)
    assert "is being written by another process" in own
    assert told == own.replace("error: ", "error: process 0 of 2 ended: ")


def test_processes_that_were_started_unlike_are_refused(tmp_path):
    flags = (*TOY, f"--workdir={tmp_path}", "--config.seed={process}")
    with processes.running(2, "tfusion.train", *flags, **FAST) as started:
        assert [process.wait(120) for process in started] == [1, 1]
    (own,) = started[1].errors()
    assert own.startswith("error: process 1 was started unlike process 0: seed = 1, not 0: start all with")


def test_processes_of_other_software_are_refused(tmp_path):
    """Before JAX's runtimes speak to each other, and so that both know why."""
    flags = ("tfusion.train", *TOY, f"--workdir={tmp_path}")
    with processes.running(2, "tests.skewed", *flags, **FAST) as started:
        assert [process.wait(120) for process in started] == [1, 1]
    (told,), (own,) = (process.errors() for process in started)
    assert own == (f"error: process 1, on {platform.node()}, has other software than process 0: jax = 0.0.1, "
                   f"not {jax.__version__}: install the same everywhere, and start all with the same command")
    assert told == own.replace("error: ", "error: process 1 of 2 ended: ")
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_a_worker_cannot_write_to(tmp_path):
    """The folder is the same, as the token in it says; but this process has no right to write there. (Here a
    name is taken: tests may run as root.)"""
    (tmp_path / "run" / ".writable.1").mkdir(parents=True)
    with processes.running(2, "tfusion.train", *TOY, f"--workdir={tmp_path}/run", **FAST) as started:
        assert [process.wait(120) for process in started] == [1, 1]
    (told,), (own,) = (process.errors() for process in started)
    assert own == (f"error: --workdir={tmp_path}/run is not writable by process 1, on {platform.node()}, (Is a "
                   "directory); choose another folder")
    assert told == own.replace("error: ", "error: process 1 of 2 ended: ")


def test_ctrl_c_in_one_of_two_ends_both(tmp_path):
    flags = (*TOY, "--config.train.num_steps=1000000", f"--workdir={tmp_path}")
    with processes.running(2, "tfusion.train", *flags, **FAST) as started:
        processes.wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and losses(tmp_path), started)
        started[1].kill(signal.SIGINT)
        assert [process.wait(60) for process in started] == [1, 1]
    saved = f"stopped at step {saved_steps(tmp_path)[-1]}: it is saved; the same command goes on from there"
    assert started[0].errors() == started[1].errors() == [saved]


@pytest.mark.parametrize("failing", [0, 1])
def test_one_that_cannot_write_its_part_of_a_checkpoint(tmp_path, failing):
    """Its error ends every save in seconds, not in Orbax's 20 minutes, and the line says where and why. What
    was saved before stays."""
    flags = (*TOY, f"--workdir={tmp_path}", "--config.width=200000", "--config.train.log_every=20")
    with processes.running(2, "tfusion.train", *flags, "--config.train.num_steps=20", **FAST) as started:
        processes.succeed(started)
    full = {"FULL": str(failing), **FAST}
    with processes.running(2, "tests.ailing", *flags, "--config.train.num_steps=60", **full) as started:
        assert [process.wait(120) for process in started] == [1, 1]
    warned = [line for line in re.split(r"[\r\n]+", started[0].stderr()) if line.startswith("warning:")]
    who = "process 1: " if failing else ""
    for step, line in zip((40, 60), warned, strict=True):
        assert line.startswith(f"warning: the checkpoint of step {step} cannot be written to {tmp_path}")
        assert f" ({who}ValueError: " in line and "File too large" in line
        assert "training goes on, the last one is of step 20" in line
    for process in started:
        (error,) = process.errors()
        assert error.startswith("error: a checkpoint, of step 60, cannot be written") and "File too" in error
    assert saved_steps(tmp_path) == [20] and 60 in losses(tmp_path)


def test_who_waits_for_data_is_named(tmp_path):
    """Though process 0 writes, and does not wait: the others of one that waits wait in their steps."""
    flags = (*TOY, "--config.train.num_steps=30", f"--workdir={tmp_path}")
    with processes.running(2, "tests.ailing", *flags, SLOW="1", **FAST) as started:
        processes.succeed(started)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["data/wait_fraction_max_process"] == 1
    assert last["data/wait_fraction_max"] > 0.3 > 2 * last["data/wait_fraction"]


def test_two_processes_prepare_what_one_does(tmp_path):
    for n in (1, 2):
        tree_ = tiny_dict(tmp_path / str(n) / "data")
        tree_.data.sources.scenes.share = tree_.data.sources.stories.share = 0.0
        folder = tmp_path / str(n)
        folder.mkdir()
        write_experiment(folder, config.from_dict(tree_))
        with processes.running(n, "tfusion.prepare", f"--config={folder / 'tiny.py'}", **FAST) as started:
            processes.succeed(started)
        assert "glosses/train: " in started[0].stdout()
    alone, shared = (tree(tmp_path / str(n) / "data") for n in (1, 2))
    assert alone == shared


def train_split(axis: str, prepared_root, folder: Path) -> None:
    """A transformer split over two devices, of one process (folder/1) and of two (folder/2)."""
    tree_ = tiny_dict(prepared_root)
    tree_.model.update(num_layers=1, d_model=16, d_ff=32)
    tree_.mesh[axis] = 2
    tree_.train.update(num_steps=3, log_every=1, eval_every=3, eval_documents=8, diagnostics_every=0,
                       checkpoint_every=3)
    tree_.sampling.num_inference_steps = 2
    write_experiment(folder, config.from_dict(tree_))
    for n in (1, 2):
        train(n, 2 // n, f"--config={folder / 'tiny.py'}", f"--workdir={folder / str(n)}")
    assert_same_numbers(folder / "1", folder / "2")


def test_rows_split_over_two_processes(prepared_root, tmp_path):
    """sequence = 2: both hold the same rows, and half of their positions."""
    train_split("sequence", prepared_root, tmp_path)


def verb_of_both(verb: str, folder: Path, *flags: str) -> list:
    """Runs it on folder/2 as one process, then as two, with --out=folder/VERB1 and 2; returns the last ones."""
    for n in (1, 2):
        out = () if verb == "evaluate" else (f"--out={folder / f'{verb}{n}'}",)
        with processes.running(n, f"tfusion.{verb}", f"--workdir={folder / '2'}", "--mesh=fsdp=2", *flags, *out,
                               devices_per_process=2 // n, **FAST) as started:
            processes.succeed(started)
        if verb == "evaluate":
            shutil.move(folder / "2/evaluation", folder / f"evaluate{n}")
    return started


def test_a_model_split_over_two_processes(prepared_root, tmp_path):
    """tensor = 2: both hold the same rows, and half of each matrix. It trains, and is used, as in one."""
    train_split("tensor", prepared_root, tmp_path)
    sampled = verb_of_both("sample", tmp_path, "--num_documents=2", "--max_images=0")
    told = [(tmp_path / f"sample{n}" / "documents.jsonl").read_text() for n in (1, 2)]
    assert told[0] == told[1] and not sampled[1].stdout()
    verb_of_both("evaluate", tmp_path, "--number=2")
    found = [json.loads((tmp_path / f"evaluate{n}/metrics.json").read_text())["metrics"] for n in (1, 2)]
    assert found[0].keys() == found[1].keys() and {"scenes_lm_loss", "diffusion_loss"} <= found[0].keys()
    for name in ("scenes_lm_loss", "glosses_lm_loss", "diffusion_loss"):
        assert found[0][name]["n"] == found[1][name]["n"]
        np.testing.assert_allclose(found[0][name]["value"], found[1][name]["value"], rtol=1e-5)
    verb_of_both("export", tmp_path)
    exports = [trained.load(tmp_path / f"export{n}").params for n in (1, 2)]
    for a, b in zip(*map(jax.tree.leaves, exports), strict=True):
        np.testing.assert_array_equal(a, b)
