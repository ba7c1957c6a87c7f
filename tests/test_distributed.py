"""What a process does before the first computation."""

import ctypes
import os
import signal
import sys
import threading
from pathlib import Path

import jax
import pytest

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


@pytest.fixture
def alone(monkeypatch):
    for name in (*distributed.NUM_PROCESSES, "JAX_COORDINATOR_ADDRESS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("environment", [
    {"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "localhost:1234"},
    {"JAX_COORDINATOR_ADDRESS": "localhost:1234"}, {"SLURM_STEP_NUM_TASKS": "8"}, {"OMPI_COMM_WORLD_SIZE": "4"},
    {"PMI_SIZE": "4"}, {"WORLD_SIZE": "2"}, {"TPU_WORKER_HOSTNAMES": "a,b"}], ids=lambda e: next(iter(e)))
def test_one_of_several_processes_is_refused(alone, monkeypatch, environment):
    """Two of them would write into one workdir; srun's step counts, not what the whole job was given."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{next(iter(environment))}.* several processes cannot share a run"):
        distributed.start_process()


def test_jax_that_was_started_in_several_processes_is_refused(alone, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"^jax\.process_count\(\) = 2"):
        distributed.start_process()


@pytest.mark.parametrize("environment", [
    {}, {"JAX_NUM_PROCESSES": "1", "JAX_COORDINATOR_ADDRESS": "localhost:1234"}, {"SLURM_STEP_NUM_TASKS": "1"},
    {"SLURM_NTASKS": "8"}, {"TPU_WORKER_HOSTNAMES": "localhost"}], ids=lambda e: next(iter(e), "none"))
def test_one_process_is_one(alone, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    distributed.refuse_several_processes()


def test_sigterm_is_noted_between_listen_and_close():
    before, sigterm = signal.getsignal(signal.SIGTERM), distributed.Sigterm()
    sigterm.listen()
    assert not sigterm.came
    os.kill(os.getpid(), signal.SIGTERM)
    assert sigterm.came and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one ends it
    sigterm.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_the_main_thread_nothing_is_listened_to():
    sigterm, before = distributed.Sigterm(), signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=sigterm.listen)
    thread.start()
    thread.join()
    sigterm.close()
    assert signal.getsignal(signal.SIGTERM) == before


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
