"""A command that outlives who gave it, run by real processes."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

from tests.launch.stubs import ROOT

WAIT = "for _ in {1..1200}; do if [[ -f go ]]; then break; fi; sleep .05; done"
RUN = f"echo $$ >run.pid; echo begun; echo x >>begun; {WAIT}; echo ended; exit 42"


def begin(folder, name: str, command: str = RUN) -> subprocess.Popen:
    return subprocess.Popen([ROOT / "launch/detached.sh", name, command], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def wait_for(done) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def end_of(call: subprocess.Popen) -> tuple[int, list[str]]:
    out = call.communicate(timeout=60)[0]
    return call.returncode, out.splitlines()


def test_it_is_begun_once_and_followed_from_then_on(tmp_path):
    lost = begin(tmp_path, "a")
    wait_for((tmp_path / "begun").exists)
    os.killpg(lost.pid, signal.SIGKILL)  # all that its connection began
    lost.communicate()
    again, and_again = begin(tmp_path, "a"), begin(tmp_path, "a")
    (tmp_path / "go").touch()
    for call in (again, and_again, begin(tmp_path, "a")):  # the last one when it has ended
        assert end_of(call) == (42, ["begun", "ended"])
    assert (tmp_path / "begun").read_text() == "x\n"
    assert end_of(begin(tmp_path, "b", "echo other; exit 3")) == (3, ["other"])


def test_the_next_one_waits_until_the_one_before_has_ended(tmp_path):
    first = begin(tmp_path, "a")
    wait_for((tmp_path / "begun").exists)
    second = begin(tmp_path, "b", "cat ended; exit 3")
    time.sleep(0.5)
    assert second.poll() is None
    (tmp_path / "ended").write_text("first has\n")
    (tmp_path / "go").touch()
    assert end_of(second) == (3, ["first has"])
    first.communicate(timeout=60)


def test_what_ended_without_a_status_was_killed(tmp_path):
    """As where the host was started anew."""
    begun = begin(tmp_path, "a")
    wait_for(lambda: (tmp_path / "begun").exists())
    pid = int((tmp_path / "run.pid").read_text())
    parent = int(re.search(r"PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
    for process in (parent, pid):
        os.kill(process, signal.SIGKILL)
    assert end_of(begun)[0] == 137
    assert end_of(begin(tmp_path, "a"))[0] == 137


def test_the_status_of_a_signal_is_the_shells(tmp_path):
    status, told = end_of(begin(tmp_path, "a", "kill -SEGV $$"))
    assert status == 139, told
