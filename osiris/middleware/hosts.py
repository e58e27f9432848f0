"""Allowed hosts: protection against DNS rebinding.

If an attacker's host name resolves to this machine, a page from that host can call the server as
its own origin. Neither CORS nor a loopback address prevents this. But its requests have that host
name in the header Host.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from llm_sidecar.host_names import host_name
from osiris.paths import is_probe_or_metrics
from osiris.refusals import refusal

_DETAIL: Final = (
    "Host: this host name is not allowed; use one that is in ALLOWED_HOSTS, or add this one to it."
)


class AllowedHosts:
    """Answers 400 to a request whose Host is not allowed; ports do not count.

    Probes and metrics are exempt: orchestrators request them at the address of each instance.

    Args:
        hosts: `*.desk.example` stands for every name below `desk.example`, and `*` for every name;
            see `llm_sidecar.host_names.allowed_host`.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self._app = app
        self._names = frozenset(hosts)
        self._suffixes = tuple(host[1:] for host in hosts if host.startswith("*."))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_probe_or_metrics(scope) or self._allows(scope):
            await self._app(scope, receive, send)
            return
        await refusal(scope, 400, _DETAIL)(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        if "*" in self._names:
            return True
        sent = Headers(scope=scope).getlist("host")
        # If there are two, a proxy and this server may each use a different one.
        name = host_name(sent[0]) if len(sent) == 1 else None
        return name is not None and (name in self._names or name.endswith(self._suffixes))
