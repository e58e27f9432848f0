"""The trace that the current request belongs to (https://www.w3.org/TR/trace-context/)."""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import Final

traceparent: ContextVar[str | None] = ContextVar("traceparent", default=None)
"""The trace context of the current request: that of its span if tracing is on, otherwise the one
that the client sent; None without either."""

_TRACEPARENT: Final = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def is_traceparent(value: str) -> bool:
    """Whether the value of a `traceparent` header is valid, in version 00 of its format."""
    return _TRACEPARENT.fullmatch(value) is not None
