"""Which process the kernel ends when memory runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_SCORE: Final = Path("/proc/self/oom_score_adj")
"""See proc_pid_oom_score_adj(5): from -1000, never, to 1000, before all others."""


@contextlib.contextmanager
def ended_first() -> Iterator[None]:
    """If memory runs out meanwhile, the kernel ends this process before any other.

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
