"""Returns memory to the system: code that only the start ran, and freed memory of the C library."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import sys
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

_DONTNEED: Final = 4
"""MADV_DONTNEED of madvise(2)."""
_MAPPING: Final = re.compile(r"([\da-f]+)-([\da-f]+) (\S{4}) \S+ \S+ \d+\s*(.*)")
_CHANGED: Final = re.compile(r"Anonymous: +[1-9]")


def release_code() -> None:
    """Unmaps the pages of code that this process has from files; what runs again comes back.

    It comes back from the page cache, sixteen pages at a time. Mappings that hold anything but what
    is in their file are left alone. Where the kernel does not let go, or is not Linux, all stays.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        for first, last in _code(Path("/proc/self/smaps").read_text()):
            if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONTNEED):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except OSError as error:
        log.info("code that only the start ran stays in memory: %s", error)


def trim_heap() -> None:
    """Returns memory that the C library has freed but keeps to the system (malloc_trim(3)).

    It takes milliseconds. Does nothing where the C library is not glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _code(smaps: str) -> list[tuple[int, int]]:
    """First and last address of the mappings that hold a file's code, and nothing else."""
    found: list[tuple[int, int]] = []
    is_code = False
    for line in smaps.splitlines():
        if mapping := _MAPPING.fullmatch(line):
            first, last, access, path = mapping.groups()
            is_code = access == "r-xp" and path.startswith("/")
            if is_code:
                found.append((int(first, 16), int(last, 16)))
        elif is_code and _CHANGED.match(line):
            found.pop()
            is_code = False
    return found
