"""Returns freed memory of the C library to the system."""

from __future__ import annotations

import ctypes


def trim_heap() -> None:
    """Returns memory that the C library has freed but keeps to the system (malloc_trim(3)).

    It takes milliseconds. Does nothing if the C library is not glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
