"""What a process does before the first computation."""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

import tfusion
from tests.conftest import import_verb
from tfusion import distributed
from tfusion.errors import UserError

MIB = 2**20


def resident_mib() -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of Linux")
def test_freed_memory_goes_back_to_the_system():
    """100 MiB in small pieces, freed but for the last: the allocator would keep them all."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [
        ctypes.c_void_p]
    pieces = [libc.malloc(8192) for _ in range(100 * MIB // 8192)]
    for piece in pieces:
        ctypes.memset(piece, 1, 8192)
    for piece in pieces[:-1]:
        libc.free(piece)
    kept = resident_mib()
    distributed.return_freed_memory()
    assert resident_mib() < kept - 60
    libc.free(pieces[-1])


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (*distributed.OURS, *distributed.NUM_PROCESSES, "TPU_WORKER_HOSTNAMES", "JAX_LOCAL_DEVICE_IDS"):
        monkeypatch.delenv(name, raising=False)


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[3-4],x", "SLURM_NTASKS": "8", "SLURM_PROCID": "5",
         "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"}


@pytest.mark.parametrize(("environment", "place"), [
    ({}, None),
    ({"JAX_NUM_PROCESSES": "1"}, None),
    ({"JAX_NUM_PROCESSES": "1", "JAX_COORDINATOR_ADDRESS": "localhost:1234"}, None),
    ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, ("h:1", 2, 1, None)),
    ({"SLURM_STEP_NUM_TASKS": "1"}, None), ({"SLURM_NTASKS": "8"}, None),
    (SLURM, ("node3:61447", 8, 5, [1])),
    (SLURM | {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
     ("h:1", 2, 0, None)),
    (SLURM | {"JAX_COORDINATOR_ADDRESS": "h:1"}, ("h:1", 8, 5, [1])),
    (SLURM | {"JAX_LOCAL_DEVICE_IDS": "2,3"}, ("node3:61447", 8, 5, None)),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, None)], ids=lambda x: next(iter(x), "none") if x else "-")
def test_where_a_process_stands(monkeypatch, environment, place):
    """What is said explicitly stands before what JAX finds."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.find_place() == place


@pytest.mark.parametrize(("environment", "says"), [
    ({"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "localhost:1234"}, "one of several processes needs"),
    ({"JAX_COORDINATOR_ADDRESS": "localhost:1234"}, "needs JAX_COORDINATOR"),
    ({"JAX_PROCESS_ID": "0"}, "needs JAX_COORDINATOR"),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "needs"), ({"PMI_SIZE": "4"}, "needs"), ({"WORLD_SIZE": "2"}, "needs"),
    ({"SLURM_STEP_NUM_TASKS": "8"}, "needs"), ({"TPU_WORKER_HOSTNAMES": "a,b"}, "needs"),
    ({"JAX_PROCESS_ID": "x", "JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2"}, "whole number"),
    ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "count from 0")],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "-")
def test_several_processes_that_are_half_said_are_refused(monkeypatch, environment, says):
    """Each would train alone in the same workdir, or wait for ever."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        distributed.find_place()


@pytest.mark.parametrize(("address", "says"), [
    ("nobody.invalid:1234", "name 'nobody.invalid' .* is unknown here"), ("localhost", "must be HOST:PORT"),
    (":1234", "must be HOST:PORT"), ("localhost:x", "must be HOST:PORT")])
def test_a_coordinator_that_cannot_be_found(monkeypatch, address, says):
    """JAX would wait for five minutes in silence."""
    monkeypatch.setattr(distributed, "RESOLVE_S", 0)
    with pytest.raises(UserError, match=says):
        distributed.resolve(address)


def test_a_coordinators_name_may_come_late(monkeypatch):
    """As that of a pod does."""
    answers = iter([OSError("unknown"), OSError("unknown"), []])

    def look_up(host, port):
        if isinstance(answer := next(answers), OSError):
            raise answer
        assert (host, port) == ("::1", 80)

    monkeypatch.setattr(distributed.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(distributed.time, "sleep", lambda seconds: None)
    distributed.resolve("[::1]:80")


def test_alone_everything_is_as_with_one_process():
    assert distributed.is_writer() and distributed.broadcast([1, "x"]) == [1, "x"]
    distributed.wait_for_all()


def test_compiled_programs_are_kept_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert distributed.cache_folder() == tmp_path / "home/.cache/tfusion/compilations"
    assert distributed.cache_folder().is_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert distributed.cache_folder() == tmp_path / "xdg/tfusion/compilations"


def test_no_home_folder_keeps_nothing(monkeypatch):
    """A container's uid that the system does not know: `Path.home()` would raise."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(RuntimeError):
        Path.home()
    assert distributed.cache_folder() is None
    distributed.start_process()


def test_a_cache_that_cannot_be_written_keeps_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert distributed.cache_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert distributed.cache_folder() is None


@pytest.mark.parametrize(("error", "why"), [
    (AssertionError(), "there is none"),  # JAX_PLATFORMS=cuda with the plugin and no GPU
    (RuntimeError("Unable to initialize backend 'x': no (set JAX_PLATFORMS='' to choose)"),
     "Unable to initialize backend 'x': no")])
def test_devices_that_are_not_there(error, why, monkeypatch):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(UserError) as e:
        distributed.start_process()
    assert str(e.value).startswith("JAX_PLATFORMS=")
    assert f" cannot be used here ({why}); unset it, or install JAX" in str(e.value)


@pytest.fixture
def pipe(monkeypatch):
    """(a function that stands for SIGTERM's handler, the statuses that the process was ended with)."""
    ended, (reading, writing) = [], os.pipe()

    monkeypatch.setattr(distributed.os, "_exit", ended.append)
    monkeypatch.setattr(distributed, "ONE_NOTICE_S", 0.2)
    thread = threading.Thread(target=distributed._end_on_sigterm, args=(reading,), daemon=True)
    thread.start()
    yield lambda: os.write(writing, b"Stack (most recent call first):\n"), ended
    os.close(writing)
    thread.join(5)  # else it would end this process


def test_sigterm_before_steps_are_under_way_ends_a_process_at_once(pipe, capfd):
    sigterm, ended = pipe
    sigterm()
    wait_until(lambda: ended)
    assert ended[0] == 42
    assert capfd.readouterr().err == "stopped by SIGTERM; the same command goes on\n"


def test_a_second_sigterm_ends_a_process_that_saves(pipe):
    """Not one that came with the first: to the process, and to its group."""
    preemption, (sigterm, ended) = distributed.Preemption(), pipe
    preemption.listen()
    try:
        sigterm()
        time.sleep(0.05)
        sigterm()
        time.sleep(0.5)
        assert not ended
        sigterm()
        wait_until(lambda: ended)
    finally:
        preemption.close()
    assert ended[0] == 143


def test_ctrl_c_is_sigterm_that_no_launcher_answers(pipe, monkeypatch):
    """Its own way ends in SIGTERM's, at once or, as here, as the second signal to a process that saves."""
    preemption, (sigterm, ended), (reading, writing) = distributed.Preemption(), pipe, os.pipe()
    monkeypatch.setattr(distributed, "_interrupted", threading.Event())
    monkeypatch.setattr(distributed.os, "kill", lambda process, number: (process, number) == (
        os.getpid(), signal.SIGTERM) and sigterm())
    threading.Thread(target=distributed._pass_on, args=(reading,), daemon=True).start()
    preemption.listen()
    try:
        os.write(writing, b"x")
        time.sleep(0.6)
        assert not ended and preemption.of_the_user()
        os.write(writing, b"x")
        wait_until(lambda: ended)
    finally:
        preemption.close()
        os.close(writing)
    assert ended[0] == 130


def test_ctrl_c_before_steps_are_under_way_ends_a_process_at_once(pipe, monkeypatch, capfd):
    sigterm, ended = pipe
    monkeypatch.setattr(distributed, "_interrupted", threading.Event())
    distributed._interrupted.set()
    sigterm()
    wait_until(lambda: ended)
    assert ended[0] == 1
    assert capfd.readouterr().err == "stopped by Ctrl-C; the same command goes on\n"


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_preemption_is_asked_for_with_numbers_of_its_own_and_stays(monkeypatch):
    asked = []
    monkeypatch.setattr(distributed.multihost_utils, "reached_preemption_sync_point",
                        lambda number: asked.append(number) or len(asked) == 2)
    first = distributed.Preemption()
    assert [first.due() for _ in range(4)] == [False, True, True, True] and first.came
    distributed.Preemption().due()
    assert asked == [asked[0], asked[0] + 1, asked[0] + 2]  # JAX knows one count a process


class Client:
    """What the processes tell each other, as process 0 keeps it."""

    def __init__(self, **said):
        self.said = said

    def key_value_set(self, key: str, value: str) -> None:
        self.said[key] = value

    def key_value_try_get(self, key: str) -> str:
        return self.said[key]

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        return self.said[key]

    def wait_at_barrier(self, *_) -> None:
        pass


def test_sigterm_to_one_of_several_before_steps_ends_all_as_preempted(pipe, monkeypatch):
    """Nothing is under way that is lost; and it does not hear its own message."""
    client, (sigterm, ended) = Client(), pipe
    monkeypatch.setattr(distributed, "_leaving", threading.Event())
    for name, value in (("client", client), ("num_processes", 2), ("process_id", 1)):
        monkeypatch.setattr(distributed.runtime.global_state, name, value)
    sigterm()
    wait_until(lambda: ended)
    assert set(ended) == {42} and distributed._leaving.is_set()
    assert json.loads(client.said[distributed.ENDS]) == [1, 42, "stopped by SIGTERM", 0]
    monkeypatch.setattr(distributed, "_leaving", threading.Event())
    monkeypatch.setattr(distributed, "LISTEN_S", 0.01)
    monkeypatch.setattr(distributed.os, "_exit", lambda status: ended.append(f"the other: {status}"))
    distributed._listen()
    assert ended[-1] == "the other: 42"


@pytest.mark.parametrize(("error", "lost"), [
    (jax.errors.JaxRuntimeError("UNKNOWN: Gloo context initialization failed"), True),
    (jax.errors.JaxRuntimeError("UNAVAILABLE: socket closed"), True),
    (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes"), False),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
    (ValueError("UNAVAILABLE"), False), (None, False)], ids=str)
def test_what_is_taken_for_the_end_of_another_process(error, lost):
    """A fault that comes again is no reason to be restarted, nor one that the user can mend, whatever its cause
    says: a save that met a full disk."""
    assert distributed._lost_another(error) == lost
    for later, of_it in ((RuntimeError("x"), lost), (UserError("a save failed"), False)):
        later.__cause__ = error
        assert distributed._lost_another(later) == of_it


def test_who_was_started_unlike_process_0_is_told_in_what(monkeypatch):
    distributed.check_alike({"seed": 1, "shape": (1, 2)})  # alone
    monkeypatch.setattr(distributed, "broadcast", lambda mine: {"seed": 0, "shape": [1, 2], "x": 1})
    with pytest.raises(UserError, match=r"unlike process 0: seed = 1, not 0, x = None, not 1: start all with"):
        distributed.check_alike({"seed": 1, "shape": (1, 2)})


def test_other_software_is_named_with_both_values():
    client = Client()
    distributed._check_software(client, 0)
    distributed._check_software(client, 1)  # the same
    theirs = json.loads(client.said["tfusion/software"])
    assert theirs["tfusion"].startswith(f"{tfusion.__version__} (sources ") and theirs["verb"]
    client.said["tfusion/software"] = json.dumps(theirs | {"Python": "2.7", "verb": "sample"})
    with pytest.raises(UserError, match=r"process 1, on .*: Python = 3\.\d+, not 2\.7, verb = \S+, not sample"):
        distributed._check_software(client, 1)


def test_a_workdir_that_is_another_than_process_0s(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "is_writer", lambda: False)
    monkeypatch.setattr(distributed, "broadcast", lambda mine: "its token")
    (tmp_path / ".writable").write_text("its token")
    assert import_verb("train").writable_folder(str(tmp_path)) == tmp_path
    (tmp_path / ".writable").write_text("another")
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"is not the folder that process 0 writes to: name one that all"):
            import_verb("train").writable_folder(str(folder))
