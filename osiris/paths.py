"""Classifies paths as probes, metrics or documentation, and corrects the path of a request."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from starlette.types import Scope

from llm_sidecar.telemetry.asgi import route_path as route_path

PROBES: Final = frozenset({"/health", "/health/live", "/health/ready"})
METRICS: Final = "/metrics"
DOCS: Final = "/docs"
OPENAPI: Final = "/openapi.json"
OPENAI: Final = "/v1"
_BY_MACHINES: Final = PROBES | {METRICS}


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


def is_openai(scope: Scope) -> bool:
    """Whether the path belongs to the OpenAI API, whose errors have another format."""
    return f"{route_path(scope)}/".startswith(f"{OPENAI}/")


def is_probe_or_metrics(scope: Scope) -> bool:
    """Whether machines send this request every few seconds."""
    return route_path(scope).rstrip("/") in _BY_MACHINES


def drop_repeated_root_path(scope: Scope, first_segments: Collection[str]) -> None:
    """Removes a root path that the request contains twice.

    uvicorn puts `--root-path` in front of every path. If a proxy does not strip the prefix, the
    path has it twice, and no route would match.

    Args:
        scope: of an HTTP request; its `path` is changed.
        first_segments: the first segment of each route. A root path that begins with one of them is
            not removed: below `/v1`, a second `/v1` may belong to the route.
    """
    root_path: str = scope["root_path"]
    prefix = root_path.rstrip("/")
    if not prefix or prefix.strip("/").split("/")[0] in first_segments:
        return
    while (path := route_path(scope)).startswith(f"{prefix}/"):
        scope["path"] = root_path + path.removeprefix(prefix)
