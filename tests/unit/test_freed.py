"""What was freed between blocks in use goes back to the system."""

import ctypes
import os
import sys
from pathlib import Path

import pytest

from daemon.freed import give_back

BLOCKS, BYTES = 600, 100_000


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
def test_free_space_below_a_block_in_use_is_given_back() -> None:
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    give_back()
    blocks = [library.malloc(BYTES) for _ in range(BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, BYTES)
    for block in blocks[:-1]:
        library.free(block)
    # The last one keeps the C library from returning what lies below it.
    held = resident()
    give_back()
    given = held - resident()
    library.free(blocks[-1])
    assert given > BLOCKS * BYTES / 2
