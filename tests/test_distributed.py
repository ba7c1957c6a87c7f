"""What a process does before the first computation."""

import ctypes
import sys

import pytest

from tfusion import distributed

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
