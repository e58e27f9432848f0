"""The operations that the access rules of Redis deny to this bus
(https://redis.io/docs/latest/operate/oss_and_stack/management/security/acl/).

A missing permission is an error of configuration, not an outage. The bus reports the denied
operation, skips it, and retries it from time to time. All other operations continue.
"""

from __future__ import annotations

import logging
import time
from typing import Final

TRY_AGAIN: Final = 30.0
"""Seconds after which a denied operation is tried again."""

log = logging.getLogger(__name__)


class Denied:
    """The operations that Redis denies, each as text, such as `PUBLISH audio.bytes`."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def add(self, operation: str) -> None:
        """Notes that Redis has denied an operation now."""
        if operation not in self._since:
            log.error("Redis denies: %s; other operations continue", operation)
        self._since[operation] = time.monotonic()

    def remove(self, operation: str) -> None:
        """Notes that Redis has permitted an operation."""
        if self._since.pop(operation, None) is not None:
            log.info("Redis permits again: %s", operation)

    def permits(self, operation: str) -> bool:
        """Whether to try an operation: Redis has not denied it recently."""
        since = self._since.get(operation)
        return since is None or time.monotonic() - since >= TRY_AGAIN

    def operations(self) -> list[str]:
        """All that is denied now, in alphabetical order."""
        return sorted(self._since)
