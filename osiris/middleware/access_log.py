"""The access log: one line per request."""

from __future__ import annotations

import functools
import ipaddress
import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from llm_sidecar.telemetry.asgi import TrackedSend, known_method
from osiris.middleware.access import caller
from osiris.paths import is_probe_or_metrics, route_path

log = logging.getLogger("osiris.access")
_CLIENT_CLOSED_REQUEST: Final = 499
_SERVER_ERROR: Final = 500


class AccessLog:
    """Logs method, route, status, duration, client address and the name of the API key of each
    request, except for probes and metrics.

    Args:
        routes: the documented spelling of each path or template, by its spelling without the last
            slash. No other path is logged, because a client can put anything into it.
    """

    def __init__(self, app: ASGIApp, routes: Callable[[], Mapping[str, str]]) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_probe_or_metrics(scope):
            await self._app(scope, receive, send)
            return
        response = TrackedSend(send)
        failed = False
        began = time.perf_counter()
        try:
            await self._app(scope, receive, response)
        except Exception:
            # If the response had started, its own status does not show the failure.
            failed = True
            raise
        finally:
            # If no response has started, the client has disconnected.
            status = _SERVER_ERROR if failed else response.status or _CLIENT_CLOSED_REQUEST
            self._log(scope, status, round(1000 * (time.perf_counter() - began), 1))

    def _log(self, scope: Scope, status: int, duration_ms: float) -> None:
        method = known_method(scope["method"])
        # A request that is refused before routing has no template.
        path = getattr(scope.get("route"), "path_format", None) or route_path(scope)
        route = self._routes().get(path.rstrip("/"), "unmatched")
        # None for a client on a Unix socket.
        client = scope.get("client")
        known = caller(scope)
        fields = {
            "client": client and _address(client[0]),
            "key": known and known.label,
        }
        log.info(
            "%s %s %d in %.1f ms%s%s",
            method,
            route,
            status,
            duration_ms,
            f" for {fields['client']}" if fields["client"] else "",
            f" with key {fields['key']}" if fields["key"] else "",
            extra={
                "method": method,
                "route": route,
                "status": status,
                "duration_ms": duration_ms,
                **{name: value for name, value in fields.items() if value},
            },
        )


@functools.lru_cache(maxsize=1024)
def _address(host: str) -> str:
    """The host if it is an IP address; a proxy may forward any text that a client has sent."""
    try:
        # Without the zone of an IPv6 address, which may be any text.
        return str(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        return "unknown"
