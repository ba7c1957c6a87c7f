"""`python -m tests.skewed MODULE FLAGS`: a verb on two hosts, of which that of process 1 has another JAX."""

import os
import runpy
import sys

import jax

if os.environ.get("JAX_PROCESS_ID") == "1":
    jax.__version__ = "0.0.1"
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
