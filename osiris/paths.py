"""Which paths are open to everybody, and how a request's path is read."""

from __future__ import annotations

from typing import Final

from starlette.types import Scope

PROBES: Final = frozenset({"/health", "/health/live", "/health/ready"})
METRICS: Final = "/metrics"
DOCS: Final = "/docs"
OPENAPI: Final = "/openapi.json"
_BY_MACHINES: Final = PROBES | {METRICS}


def route_path(scope: Scope) -> str:
    """The path as the routes know it: without what a proxy in front of the server adds."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def is_probe(scope: Scope) -> bool:
    """Whether the request is for a probe."""
    return route_path(scope).rstrip("/") in PROBES


def is_metrics(scope: Scope) -> bool:
    """Whether the request is for the metrics."""
    return route_path(scope).rstrip("/") == METRICS


def is_documentation(scope: Scope) -> bool:
    """Whether the request is for the documentation's page, one of its files, or the document."""
    path = route_path(scope).rstrip("/")
    return path in (DOCS, OPENAPI) or path.startswith(f"{DOCS}/")


def is_probe_or_metrics(scope: Scope) -> bool:
    """Whether the request is one that machines send every few seconds."""
    return route_path(scope).rstrip("/") in _BY_MACHINES
