"""Which paths are probes, metrics or documentation, and root paths."""

from __future__ import annotations

import pytest

from osiris import paths
from tests.unit.asgi import http_scope

PROBES = ["/health", "/health/", "/health/live", "/health/live/", "/health/ready"]
METRICS = ["/metrics", "/metrics/"]
OTHERS = [
    "/",
    "",
    "/healthy",
    "/healthX",
    "/health/readyX",
    "/metricsX",
    "/health/dead",
    "/health/../docs",
    "/metrics/x",
    "/Health",
    "/METRICS",
    "/docs",
    "health",
    "/proxy/health",
]


@pytest.mark.parametrize("path", PROBES)
def test_each_probe_is_a_probe(path: str) -> None:
    scope = http_scope(path)
    assert paths.is_probe(scope) is True
    assert paths.is_metrics(scope) is False
    assert paths.is_probe_or_metrics(scope) is True


@pytest.mark.parametrize("path", METRICS)
def test_the_metrics_are_not_a_probe(path: str) -> None:
    scope = http_scope(path)
    assert paths.is_probe(scope) is False
    assert paths.is_metrics(scope) is True
    assert paths.is_probe_or_metrics(scope) is True


@pytest.mark.parametrize("path", OTHERS)
def test_another_path_is_neither_a_probe_nor_the_metrics(path: str) -> None:
    scope = http_scope(path)
    assert paths.is_probe(scope) is False
    assert paths.is_metrics(scope) is False
    assert paths.is_probe_or_metrics(scope) is False


@pytest.mark.parametrize("path", ["/docs", "/docs/", "/docs/a/b", "/openapi.json/"])
def test_the_documentation_is_not_a_probe(path: str) -> None:
    scope = http_scope(path)
    assert paths.is_documentation(scope) is True
    assert paths.is_documentation(http_scope(f"/desk{path}", root_path="/desk")) is True
    assert paths.is_probe_or_metrics(scope) is False


@pytest.mark.parametrize("path", [*PROBES, *METRICS, "/", "/docsX", "/health/../docs", "/Docs"])
def test_another_path_is_not_documentation(path: str) -> None:
    assert paths.is_documentation(http_scope(path)) is False


@pytest.mark.parametrize(
    ("scope", "path"),
    [
        ({"path": "/health"}, "/health"),
        ({"path": "/desk/health", "root_path": "/desk"}, "/health"),
        ({"path": "/health", "root_path": "/desk"}, "/health"),
        ({"path": "/health/desk", "root_path": "/desk"}, "/health/desk"),
        ({"path": "/desk/desk", "root_path": "/desk"}, "/desk"),
        ({"path": "/desk/health", "root_path": ""}, "/desk/health"),
        ({"path": "/deskhealth", "root_path": "/desk"}, "/deskhealth"),
        ({"path": "/desk//health", "root_path": "/desk/"}, "/health"),
        ({"path": "/desk", "root_path": "/desk"}, ""),
    ],
)
def test_the_root_path_is_removed(scope: dict[str, str], path: str) -> None:
    assert paths.route_path(scope) == path


def test_a_probe_below_a_root_path_is_a_probe() -> None:
    scope = http_scope("/desk/health/ready/", root_path="/desk")
    assert paths.is_probe(scope) is True
    assert paths.is_probe_or_metrics(http_scope("/desk/metrics", root_path="/desk")) is True


@pytest.mark.parametrize(
    ("path", "root_path", "route"),
    [
        ("/desk/desk/health", "/desk", "/health"),
        ("/desk//desk/health", "/desk/", "/health"),
        ("/a/b/a/b/health/live", "/a/b", "/health/live"),
        ("deskdesk/health", "desk", "deskdesk/health"),
        ("/desk/health", "/desk", "/health"),
        ("/desk/deskhealth", "/desk", "/deskhealth"),
        ("/desk/desk", "/desk", "/desk"),
        ("/health", "/desk", "/health"),
        ("/health", "", "/health"),
        ("/v1/v1/models", "/v1", "/v1/models"),
        ("/v1/desk/v1/desk/health", "/v1/desk", "/v1/desk/health"),
        ("/v1X/v1X/health", "/v1X", "/health"),
        ("/deskX/deskX/health", "/deskX", "/health"),
    ],
)
def test_a_root_path_that_is_sent_twice_counts_once(path: str, root_path: str, route: str) -> None:
    scope = http_scope(path, root_path=root_path)
    paths.drop_repeated_root_path(scope, {"v1", "health"})
    assert paths.route_path(scope) == route
    assert scope["root_path"] == root_path
