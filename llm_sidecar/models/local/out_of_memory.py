"""Selects the process that the kernel kills when memory runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_SCORE: Final = Path("/proc/self/oom_score_adj")
"""See proc_pid_oom_score_adj(5): -1000 is never, 1000 before all other processes."""


@contextlib.contextmanager
def ended_first() -> Iterator[None]:
    """If memory runs out inside this context, the kernel kills this process before any other.

    Does nothing where the kernel is not Linux.
    """
    try:
        before = _SCORE.read_text()
        _SCORE.write_text("1000")
    except OSError:
        yield
        return
    try:
        yield
    finally:
        _SCORE.write_text(before)
