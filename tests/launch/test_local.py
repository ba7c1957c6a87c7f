"""A sweep on this machine, for real: killed in the middle, run again, mended and tried again."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests import processes
from tests.launch.tiny import STEPS
from tests.test_resume import lines, saved_steps
from tfusion import workdir

FILE = "tests/launch/tiny.py"


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_bit_for_bit_and_a_broken_point_hurts_no_other(tmp_path):
    out, whole, given, log = (tmp_path / name for name in ("tiny", "whole", "given", "log"))

    def start(*words: str) -> subprocess.Popen:
        with log.open("w") as file:
            return subprocess.Popen(words, cwd=processes.ROOT, stdout=file, stderr=file,
                                    env=processes.environment(JAX_DISABLE_MOST_OPTIMIZATIONS="1"))

    def python(*words: str) -> subprocess.Popen:
        return start(sys.executable, "-m", *words)

    def local(*flags: str) -> subprocess.Popen:
        return start("launch/local.sh", f"--sweep={out}", *flags)

    assert python("tfusion.sweep", f"--config={FILE}:{given}", f"--out={out}").wait(120) == 0, log.read_text()
    launcher = local()
    until = time.monotonic() + 300
    while not ((out / "long/checkpoints").is_dir() and saved_steps(out / "long")):
        assert launcher.poll() is None and time.monotonic() < until, log.read_text()
        time.sleep(0.05)
    launcher.kill()
    os.kill(int(re.search(r"process (\d+)", (out / "long" / workdir.LOCK).read_text())[1]), signal.SIGKILL)
    assert launcher.wait(60) == -signal.SIGKILL and max(saved_steps(out / "long")) < STEPS

    assert local().wait(600) == 1
    said = log.read_text()
    assert "1 of 3 points failed (broken)" in said and "short: finished" in said and "long: finished" in said
    assert "resumed from step" in (out / "long" / "sweep.log").read_text()
    shutil.copytree(out / "short", given)
    assert local("--retry").wait(300) == 0, log.read_text()
    assert "3 of 3 points are finished" in log.read_text() and "long: train" not in log.read_text()

    assert python("tfusion.train", f"--config={FILE}", f"--workdir={whole}").wait(300) == 0, log.read_text()
    assert lines(out / "long") == lines(whole)
