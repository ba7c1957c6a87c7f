"""`python -m tests.ailing FLAGS`: a run in several processes, of which number $FULL can write no file of more
than 64 KiB, and number $SLOW waits for its data."""

import os
import resource
import runpy
import time

from tfusion.data import pipeline

mine, batches = os.environ["JAX_PROCESS_ID"], pipeline.batches


def slow_batches(*args):
    for batch in batches(*args):
        time.sleep(0.1)
        yield batch


if mine == os.environ.get("FULL"):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
if mine == os.environ.get("SLOW"):
    pipeline.batches = slow_batches
runpy.run_module("tfusion.train", run_name="__main__", alter_sys=True)
