"""Delays between restarts, which grow while the failures follow each other."""

from __future__ import annotations

import random
from typing import Final

_FIRST: Final = 0.5
_MAX: Final = 30.0
_MOST_DOUBLINGS: Final = 6
"""After so many, a delay is longer than the maximum; 2 to the power of 1024 is no float."""
_HEALTHY: Final = 60.0
"""If a worker lived longer than these seconds, its failure counts as the first one again."""


class Backoff:
    """Exponential backoff with 20 % of jitter, from 0.5 to 30 seconds."""

    def __init__(self) -> None:
        self._failures = 0

    def delay(self, lived: float) -> float:
        """Seconds to wait after a failure.

        Args:
            lived: seconds from the last start to this failure; after more than 60 seconds the
                restart is immediate and the delays begin anew.
        """
        self._failures = 0 if lived > _HEALTHY else self._failures + 1
        if not self._failures:
            return 0.0
        doublings = min(self._failures - 1, _MOST_DOUBLINGS)
        delay = min(_MAX, _FIRST * 2.0**doublings)
        return delay * random.uniform(0.8, 1.2)
