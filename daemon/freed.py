"""Freed: memory that nobody holds any more goes back to the system, where the C library keeps it."""

import ctypes
from collections.abc import Callable
from functools import cache


def give_back() -> None:
    """
    Return what was freed; harmless wherever the C library has no such thing.

    glibc keeps the free space between blocks that are in use: a process that runs for months would keep
    the most that it ever needed (malloc_trim(3)).
    """
    _trimmer()()


@cache
def _trimmer() -> Callable[[], object]:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return lambda: None
    return lambda: trim(ctypes.c_size_t(0))
