"""Data of an ASGI request for telemetry and the HTTP server: its path, its method, and the start of
its response."""

from __future__ import annotations

from typing import Final

from starlette._utils import get_route_path
from starlette.types import Message, Scope, Send

_UNOBSERVED: Final = frozenset(
    {"/health", "/health/live", "/health/ready", "/metrics", "/debug/prof"}
)
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def route_path(scope: Scope) -> str:
    """The path as the router matches it: without the root path."""
    # Starlette's own function, so that the two always agree.
    path: str = get_route_path(scope)
    return path


def is_observed(scope: Scope) -> bool:
    """Whether an HTTP request is traced and profiled.

    Probes are not: they would outnumber the other requests.
    """
    return route_path(scope).rstrip("/") not in _UNOBSERVED


def known_method(method: str) -> str:
    """An HTTP method as telemetry shows it: `other` for any that is not standard."""
    return method if method in _METHODS else "other"


class TrackedSend:
    """An ASGI `send` that records the start of the response.

    Attributes:
        status: of the response; None until it starts.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None

    @property
    def started(self) -> bool:
        """Whether the response has started: it can no longer be replaced."""
        return self.status is not None

    async def __call__(self, message: Message) -> None:
        """Sends a message."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)
