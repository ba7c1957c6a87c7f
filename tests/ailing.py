"""`python -m tests.ailing FLAGS`: the toy trains in several processes, of which number $FULL can write no file
above 64 KiB, and number $SLOW waits for its data."""

import os
import resource
import runpy
import time

from tests import toy

mine, read = os.environ["JAX_PROCESS_ID"], toy.ToyRows.read


def read_slowly(self, rows):
    time.sleep(1)
    return read(self, rows)


if mine == os.environ.get("FULL"):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
if mine == os.environ.get("SLOW"):
    toy.ToyRows.read = read_slowly
runpy.run_module("tfusion.train", run_name="__main__", alter_sys=True)
