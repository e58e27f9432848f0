"""Selects the process that the kernel kills when memory runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_SCORE: Final = Path("/proc/self/oom_score_adj")
"""See proc_pid_oom_score_adj(5): -1000 is never, 1000 before all other processes."""


@contextlib.contextmanager
def ended_first(*, with_children: bool = False) -> Iterator[None]:
    """If memory runs out inside this context, the kernel kills this process, or a child that it has
    started there, before any other.

    Does nothing where the kernel is not Linux.

    Args:
        with_children: whether this ends for the children too, and not only for this process.
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
        if with_children:
            _set_scores_of_children(before)


def _set_scores_of_children(score: str) -> None:
    for listed in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread or the child has ended
            for child in listed.read_text().split():
                Path("/proc", child, _SCORE.name).write_text(score)
