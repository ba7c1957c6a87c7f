"""How a process starts, alone or as one of several, and how several speak and end together."""

import atexit
import contextlib
import ctypes
import faulthandler
import functools
import hashlib
import itertools
import json
import os
import platform
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib
import numpy as np
from jax._src import clusters, xla_bridge
from jax._src import distributed as runtime
from jax.experimental import multihost_utils
from tqdm import tqdm

import tfusion
from tfusion import errors
from tfusion.errors import UserError

ADDRESS, NUMBER, PROCESS = OURS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# How launchers say that there are several: srun, Open MPI, MPICH, torchrun. JAX understands some.
NUM_PROCESSES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE")
HEARTBEAT_S = 30  # a process that is silent for so long is taken for dead, and ends the others
RESOLVE_S = 60  # how long the coordinator's name may take to appear: a pod's does
STOP_S = 60  # how long those that were stopped may take to save
ONE_NOTICE_S = 2  # launchers send SIGTERM to a process and to its group: that is one
LISTEN_S = 1  # how often it is asked whether another process ends
LEAVE_S = 5  # how long a process that failed waits for the others to have heard it
FOREVER_MS = 30 * 24 * 3600 * 1000
ENDS = "tfusion/ends"  # the key under which the first process to end before its time says why
LOST = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "Gloo", "NCCL", "onnection")  # in errors


class Place(NamedTuple):
    """Where a process stands among several."""

    address: str  # the coordinator's, host:port
    number: int  # of processes
    process: int  # this one's
    devices: list[int] | None = None  # those of its host that it takes; None: all


def start_process(alone: bool = False, saves: bool = False) -> None:
    """Joins the processes that the environment names: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, or what JAX knows of (Cloud TPU, GKE, SLURM, Open MPI); one process where it names none, or
    if it is to be `alone`. Compiled programs are kept between runs, in $JAX_COMPILATION_CACHE_DIR or
    ~/.cache/tfusion. saves: Ctrl-C is not an exception, but ends it as SIGTERM does.

    Raises UserError, before anything is written, where the environment is at odds with itself, the coordinator
    cannot be found, processes are of different software, or the devices that JAX is told to use are not there.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR") and (folder := cache_folder()):
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if not (jax.distributed.is_initialized() or xla_bridge.backends_are_initialized()):  # as in tests
        place = None if alone else find_place()
        _join(place) if place and place.number > 1 else _be_alone()
        watch_sigterm()
        if saves:
            take_sigint()
    if several := (runtime.global_state.num_processes or 1) > 1:
        errors.leave = _leave
        listener = threading.Thread(target=_listen, name="others", daemon=True)
        listener.start()
        atexit.register(_end_well, listener)
        _check_software(runtime.global_state.client, runtime.global_state.process_id)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:  # the latter where there is a plugin and no GPU
        if errors.leave is _leave and isinstance(e, jax.errors.JaxRuntimeError):
            raise  # the processes could not tell each other of their devices
        why = str(e).partition(" (set JAX_PLATFORMS")[0] or "there is none"
        raise UserError(f"JAX_PLATFORMS={jax.config.jax_platforms or ''} cannot be used here ({why}); unset "
                        "it, or install JAX for that device (README, Training at scale)") from e
    if several and not is_writer():
        _keep_quiet()


def find_place() -> Place | None:
    """What the environment says; None where it says nothing. Raises UserError where that is half of it, or
    something that JAX does not understand."""
    given = {name: os.environ[name].strip() for name in OURS if os.environ.get(name, "").strip()}
    if len(given) == len(OURS):
        place = Place(given[ADDRESS], *(_whole(name, given[name]) for name in (NUMBER, PROCESS)))
    else:
        try:
            found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
                given.get(ADDRESS), None, None, None, None, RESOLVE_S)
        except (RuntimeError, OSError, KeyError, ValueError) as e:
            raise UserError(f"JAX cannot tell which of several processes this is ({e}); set {', '.join(OURS)} "
                            "for each") from e
        place = Place(*found) if None not in found[:3] else None
        if place and os.environ.get("JAX_LOCAL_DEVICE_IDS"):  # JAX reads it; else it takes one GPU on SLURM
            place = place._replace(devices=None)
    if place is None:
        said = {} if given.get(NUMBER) == "1" else given or _said_by_launchers()
        if said:
            said = ", ".join(f"{name}={value}" for name, value in said.items())
            raise UserError(f"{said}: one of several processes needs {', '.join(OURS)}, the last from 0 on; "
                            "the only one needs that unset")
        return None
    if not 0 <= place.process < place.number:
        raise UserError(f"process {place.process} of {place.number} ({', '.join(OURS[1:])}): they count from 0")
    return place


def _said_by_launchers() -> dict[str, str]:
    """What says that there are several processes, and does not say to JAX where."""
    said = {name: os.environ[name] for name in NUM_PROCESSES if os.environ.get(name, "1").strip() != "1"}
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return said | ({"TPU_WORKER_HOSTNAMES": hosts} if "," in hosts else {})


def _whole(name: str, text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"{name}={text} must be a whole number")
    return int(text)


def resolve(address: str) -> None:
    """Raises UserError where the coordinator has no port, or a name that stays unknown: JAX would wait in
    silence."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        raise UserError(f"{ADDRESS}={address} must be HOST:PORT")
    deadline = time.monotonic() + RESOLVE_S
    while True:
        try:
            socket.getaddrinfo(host.strip("[]"), int(port))
            return
        except (OSError, OverflowError) as e:
            if time.monotonic() > deadline:
                raise UserError(f"the coordinator's name '{host}' ({ADDRESS}, or the first host of the job) is "
                                f"unknown here ({e}): name one that every host can resolve") from e
            time.sleep(min(1.0, RESOLVE_S))


def _join(place: Place) -> None:
    resolve(place.address)
    waiting = threading.Timer(10, lambda: print(
        f"process {place.process} of {place.number} waits for the others, at {place.address}", file=sys.stderr))
    waiting.daemon = True
    waiting.start()
    jax.distributed.initialize(place.address, place.number, place.process, place.devices,
                               cluster_detection_method="deactivate", heartbeat_timeout_seconds=HEARTBEAT_S)
    waiting.cancel()


def _be_alone() -> None:
    """One process is a job of one, on a free port that is held until the coordinator has it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        jax.distributed.initialize(address, 1, 0, cluster_detection_method="deactivate",
                                   coordinator_bind_address=address)


def is_writer() -> bool:
    """Whether this process writes what a run leaves, and talks: process 0."""
    return jax.process_index() == 0


def _keep_quiet() -> None:
    """No output and no progress bars, where another process has the same: errors alone are heard."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)


_calls, _leaving = itertools.count(), threading.Event()


def broadcast(value=None):
    """Process 0's value (JSON), for all: every process calls it, at the same point of the program. It may
    take long to come."""
    if jax.process_count() == 1:
        return value
    client, key = runtime.global_state.client, f"tfusion/said/{next(_calls)}"
    if is_writer():
        client.key_value_set(key, json.dumps(value))
    return json.loads(client.blocking_key_value_get(key, FOREVER_MS))


def largest(value: float) -> float:
    """The largest of what the processes give; every process calls it, at the same point of the program."""
    if jax.process_count() == 1:
        return value
    return float(np.max(multihost_utils.process_allgather(np.float32(value))))


def check_alike(values: dict) -> None:
    """Raises UserError where this process has other values (JSON) than process 0; every process calls it, at
    the same point of the program."""
    mine = json.loads(json.dumps(values))
    if told := _differences(mine, broadcast(mine)):
        raise UserError(f"process {jax.process_index()} was started unlike process 0: {told}: start all with "
                        "the same command, on the same data")


def _differences(mine: dict, first: dict) -> str:
    other = [name for name in sorted({*first, *mine}) if first.get(name) != mine.get(name)]
    told = ", ".join(f"{name} = {mine.get(name)}, not {first.get(name)}" for name in other[:4])
    return told + (f" and {len(other) - 4} more" if len(other) > 4 else "")


def software() -> dict[str, str]:
    """What all processes of a job must have alike: tfusion down to its sources, of which a host may have old
    ones; and they must run the same verb."""
    sources = hashlib.sha256()
    for path in sorted(Path(tfusion.__file__).parent.rglob("*.py")):
        sources.update(path.read_bytes())
    return {"Python": ".".join(platform.python_version_tuple()[:2]), "jax": jax.__version__,
            "jaxlib": jaxlib.__version__, "numpy": np.__version__, "verb": Path(sys.argv[0]).stem,
            "tfusion": f"{tfusion.__version__} (sources {sources.hexdigest()[:8]})"}


def _check_software(client, process: int) -> None:
    """Raises UserError in processes that differ from process 0, before JAX's runtimes meet."""
    mine, key = software(), "tfusion/software"
    if process == 0:
        return client.key_value_set(key, json.dumps(mine))
    if told := _differences(mine, json.loads(client.blocking_key_value_get(key, FOREVER_MS))):
        raise UserError(f"process {process}, on {platform.node()}, has other software than process 0: {told}: "
                        "install the same everywhere, and start all with the same command")


def tell(name: str, value) -> None:
    """Leaves a value (JSON) for who asks what was `told`, in place of what this process told before."""
    if jax.process_count() > 1:
        key = f"tfusion/told/{name}/{jax.process_index()}"
        runtime.global_state.client.key_value_set(key, json.dumps(value), allow_overwrite=True)


def told(name: str) -> dict[int, Any]:
    """{process: what it told last}, of those that did. Waits for none."""
    if jax.process_count() == 1:
        return {}
    found = runtime.global_state.client.key_value_dir_get(f"tfusion/told/{name}/")
    return {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}


def most(values: dict[str, float]) -> dict:
    """The largest of several processes' values and whose it is, {name_max: value, name_max_process: number},
    for process 0; each tells its own and waits for none, so one that is behind is known by what it told
    before. {} where there is one process."""
    tell("values", values)
    all_told, out = told("values") if is_writer() else {}, {}
    for name in values:
        found = {theirs[name]: process for process, theirs in all_told.items() if name in theirs}
        out |= {f"{name}_max": max(found), f"{name}_max_process": found[max(found)]} if found else {}
    return out


def arrive(place: str) -> None:
    """Says that this process has come to a place of the program."""
    runtime.global_state.client.key_value_increment(f"tfusion/arrived/{place}", 1)


def arrived(place: str) -> int:
    """How many have."""
    try:
        return int(runtime.global_state.client.key_value_try_get(f"tfusion/arrived/{place}"))
    except jax.errors.JaxRuntimeError as e:
        if "NOT_FOUND" not in str(e):
            raise
        return 0


def wait_for_all() -> None:
    """Returns when every process has come here, however long that takes."""
    if jax.process_count() > 1:
        runtime.global_state.client.wait_at_barrier(f"tfusion/here/{next(_calls)}", FOREVER_MS)


def _leave(error: BaseException | None, status: int, text: str) -> None:
    """Ends this process, one of several, before its time; tells the others why, and does not wait for them in
    JAX's own barrier, as the interpreter's end would."""
    client, broken = runtime.global_state.client, _lost_another(error)
    patience = STOP_S if isinstance(error, errors.Stopped) else 0  # those that were stopped save together
    _leaving.set()
    if broken:
        print("another process seems to be gone: waiting to hear which", file=sys.stderr, flush=True)
        time.sleep(HEARTBEAT_S + 15)  # within that the runtime ends this process, and says it
        status = errors.HUNG
    with contextlib.suppress(Exception):  # another was first, or process 0 is gone
        client.key_value_set(ENDS, json.dumps([runtime.global_state.process_id, status, text, patience]))
    _part(status, patience)


def _listen() -> None:
    """Ends this process when another says that it ends, in whatever call the main thread is; not where it is
    about to end by itself."""
    said = None
    while said is None:  # not in a call that waits: the interpreter's end would cut it off
        if _leaving.wait(LISTEN_S):
            return
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            said = runtime.global_state.client.key_value_try_get(ENDS)
    process, status, text, patience = json.loads(said)
    if not _leaving.wait(patience):
        how = "" if status == errors.PREEMPTED else "error: "
        number = runtime.global_state.num_processes
        tqdm.write(f"{how}process {process} of {number} ended: {text}", sys.stderr)
        sys.stderr.flush()
        _part(status, patience)


def _part(status: int, patience: int) -> None:
    """Ends this process together with the others, who lose their coordinator with process 0: it goes last."""
    with contextlib.suppress(Exception):
        runtime.global_state.client.wait_at_barrier(ENDS, 1000 * (patience + LEAVE_S))
        time.sleep(0.5 * (runtime.global_state.process_id == 0))
    os._exit(status)


def _end_well(listener: threading.Thread) -> None:
    """At the interpreter's end, before JAX's own barrier, which waits five minutes: process 0 may write on."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        runtime.global_state.client.wait_at_barrier("tfusion/done", FOREVER_MS)
    _leaving.set()
    listener.join()


def _lost_another(error: BaseException | None) -> bool:
    """Whether an error began in JAX's runtime, where it did not reach another process. A user's error is told
    by who knew why."""
    while error is not None and not isinstance(error, UserError):
        if isinstance(error, jax.errors.JaxRuntimeError):
            return any(word in str(error) for word in LOST)
        error = error.__cause__ or error.__context__
    return False


def cache_folder(name: str = "compilations") -> Path | None:
    """Where compiled programs are kept; None where there is no home folder or it cannot be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "tfusion", name)
    try:
        if folder.is_absolute():  # else `~` is still there
            folder.mkdir(parents=True, exist_ok=True)
            return folder if os.access(folder, os.W_OK) else None
    except OSError:
        pass
    return None


class Preemption:
    """Whether SIGTERM, or a notice of the platform's, came to any of a run's processes; or SIGINT, where that
    does the same.

    Until `listen` and after `close` it ends its process at once: nothing is lost. Between them `due` says so,
    to all processes at the same call, and they save and end; a second signal ends one at once.
    """

    _listening = threading.Event()
    _calls = itertools.count(1)  # JAX wants them numbered, alike in all processes

    def __init__(self):
        self.came = False

    def listen(self) -> None:
        self._listening.set()

    def close(self) -> None:
        self._listening.clear()

    def due(self) -> bool:
        """Asked by all processes equally often; it stays true."""
        self.came = self.came or multihost_utils.reached_preemption_sync_point(next(self._calls))
        return self.came

    def of_the_user(self) -> bool:
        """Whether it is SIGINT that came, to any; every process asks, at the same point of the program."""
        return bool(largest(_interrupted.is_set()))


_interrupted = threading.Event()


def watch_sigterm() -> None:
    """Call after jax.distributed.initialize, whose handler of SIGTERM tells all processes: it stays in place.

    A thread learns of the signal too, even while the main thread is in a compiler.
    """
    threading.Thread(target=_end_on_sigterm, args=(_pipe(signal.SIGTERM, chain=True),), name="SIGTERM",
                     daemon=True).start()


def take_sigint() -> None:
    """From here on SIGINT is SIGTERM, but that a launcher shall not start again what a user stopped. In Python
    it would be an exception, anywhere: in a callback that swallows it, or in the middle of a compiler."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # a shell's background job, which ignores it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # else asyncio takes it, and gives it back to Python
    threading.Thread(target=_pass_on, args=(_pipe(signal.SIGINT, chain=False),), name="SIGINT",
                     daemon=True).start()


def _pipe(number: int, chain: bool) -> int:
    """A pipe in which something stands once the signal has come: faulthandler's handler, the one that runs no
    Python, writes to it. chain: and calls the handler before it."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    faulthandler.register(number, writing, all_threads=False, chain=chain)
    return reading


def _pass_on(reading: int) -> None:
    while os.read(reading, 2**16):
        _interrupted.set()
        os.kill(os.getpid(), signal.SIGTERM)


def _end_on_sigterm(reading: int) -> None:
    os.read(reading, 2**16)
    listened = Preemption._listening.is_set()
    if listened:
        time.sleep(ONE_NOTICE_S)
        os.set_blocking(reading, False)
        with contextlib.suppress(BlockingIOError):
            os.read(reading, 2**16)  # what is left of the first, and what came with it
        os.set_blocking(reading, True)
        os.read(reading, 2**16)
    name, number, status = ("Ctrl-C", signal.SIGINT, 1) if _interrupted.is_set() else (
        "SIGTERM", signal.SIGTERM, errors.PREEMPTED)
    status = 128 + number if listened else status  # it saved nothing, though there was something to save
    os.write(2, f"stopped by {name}; the same command goes on\n".encode())
    state = runtime.global_state
    if state.num_processes > 1:
        _leaving.set()  # else this process hears itself
        threading.Timer(ONE_NOTICE_S, os._exit, (status,)).start()  # whatever becomes of the others
        with contextlib.suppress(Exception):  # they cannot go on, and there is no save to wait for
            state.client.key_value_set(ENDS, json.dumps([state.process_id, status, f"stopped by {name}", 0]))
            time.sleep(ONE_NOTICE_S)  # process 0 is whom they hear it from
    os._exit(status)


def return_freed_memory() -> None:
    """Gives the system what the allocator keeps of freed memory (glibc only): XLA's CPU compiler leaves behind
    several hundred MiB."""
    if trim := _libc("malloc_trim"):
        trim(0)


def limit_heaps() -> None:
    """Call before a compiler starts its threads, of which there are more than 30: glibc would give each a heap
    of its own, and keep in it what that thread freed; for the 7B step a tenth of the peak."""
    arena_max, mmap_threshold = -8, -3  # malloc.h: M_ARENA_MAX, M_MMAP_THRESHOLD
    if mallopt := _libc("mallopt"):
        mallopt(arena_max, 2)
        mallopt(mmap_threshold, 256 * 1024)  # else it grows to 32 MiB: large blocks would not be given back


def _libc(name: str):
    """A function of glibc; None where there is none."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
