"""Whether a model's files exist, cached for a fraction of a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.models.files import ModelFiles

_CACHE_SECONDS: Final = 0.2


class FileCheck:
    """Looks for a model's files; cached, because every health probe calls it."""

    def __init__(self, locate: Callable[[], ModelFiles]) -> None:
        self._locate = locate
        self._expires = 0.0
        self._missing: str | None = None

    def missing(self) -> str | None:
        """Why the model cannot be loaded; None if its files exist."""
        now = time.monotonic()
        if now >= self._expires:
            self._expires = now + _CACHE_SECONDS
            try:
                self._locate()
            except ModelUnavailable as error:
                self._missing = error.detail
            else:
                self._missing = None
        return self._missing
