"""Will it fit, how long will it take, what will it cost: answered without the accelerator.

topology.py  a mesh over a slice that is not there        walk.py         what the traced step executes
compile.py   the real train step, compiled for that mesh  collectives.py  bytes between chips, from shardings
memory.py    HBM per chip by part                         roofline.py     an ESTIMATE of time, and dollars
search.py    other meshes, remat, micro-batches           plan.py, text.py  the plan, as a dict and for people
cache.py     plans that were made before                  several.py      those of a sweep's points
"""
