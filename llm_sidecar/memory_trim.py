"""Keeps a process from holding much memory that it has freed."""

from __future__ import annotations

import ctypes
import os
from typing import Final

_M_ARENA_MAX: Final = -8
_ARENAS: Final = 2


def keep_little() -> None:
    """Makes threads share the memory that they free; call it before the threads start.

    By default glibc has eight arenas for each core, and pyarrow an allocator of its own. LanceDB
    allocates in dozens of threads, and each arena keeps the most that it has ever needed. Variables
    of the environment go before: MALLOC_ARENA_MAX (mallopt(3)) and ARROW_DEFAULT_MEMORY_POOL.
    """
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and os.environ.get("MALLOC_ARENA_MAX") is None:
        mallopt(_M_ARENA_MAX, _ARENAS)


def trim_heap() -> None:
    """Returns memory that the C library has freed but keeps to the system (malloc_trim(3)).

    It takes milliseconds. Does nothing if the C library is not glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
