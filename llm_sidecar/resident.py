"""Lets go of code that only the start ran: half of what the libraries map is never run again."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path
from typing import Final

_DONTNEED: Final = 4
"""MADV_DONTNEED of madvise(2)."""
_MAPPING: Final = re.compile(r"([\da-f]+)-([\da-f]+) (\S{4}) \S+ \S+ \d+\s*(.*)")
_CHANGED: Final = re.compile(r"Anonymous: +[1-9]")


def release_code() -> None:
    """Unmaps the pages of code that this process has from files; what runs again comes back.

    It comes back from the page cache, in which the kernel keeps it as long as there is room, at
    about a microsecond for sixteen pages. Mappings that hold anything but what is in their file are
    left alone. Does nothing but on Linux.

    Raises:
        OSError: the kernel refuses.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for first, last in _code(Path("/proc/self/smaps").read_text()):
        if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONTNEED):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _code(smaps: str) -> list[tuple[int, int]]:
    """Addresses of the mappings of files that can be run, not written, and are as in the file."""
    found: list[tuple[int, int]] = []
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
