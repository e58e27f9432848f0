"""The path of a request as the router matches it, and the paths that telemetry excludes."""

from __future__ import annotations

from typing import Final

from starlette._utils import get_route_path
from starlette.types import Scope

_UNOBSERVED: Final = frozenset(
    {"/health", "/health/live", "/health/ready", "/metrics", "/debug/prof"}
)


def route_path(scope: Scope) -> str:
    """The path as the router matches it: without the root path."""
    # Starlette's own function, so that the two always agree.
    path: str = get_route_path(scope)
    return path


def is_observed(scope: Scope) -> bool:
    """Whether an HTTP request is traced and profiled. Frequent probes would hide the other
    requests."""
    return route_path(scope).rstrip("/") not in _UNOBSERVED
