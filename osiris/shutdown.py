"""A bound on uvicorn's shutdown.

It waits without end for connections to close, and one whose client no longer reads never does.
"""

from __future__ import annotations

import signal

from uvicorn import Server


def bound_shutdown(seconds: float) -> None:
    """Gives the running uvicorn a timeout for its graceful shutdown, unless it was started with one
    (https://uvicorn.dev/settings/#timeouts); does nothing under another server."""
    handler = signal.getsignal(signal.SIGTERM)
    server = getattr(handler, "__self__", None)
    if isinstance(server, Server) and server.config.timeout_graceful_shutdown is None:
        # It is passed on to asyncio, so fractions of a second are fine; 0 would mean none.
        server.config.timeout_graceful_shutdown = max(seconds, 0.1)  # type: ignore[assignment]
