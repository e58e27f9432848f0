"""A server below a root path, behind a proxy that strips its prefix or keeps it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.live_server import LiveServer, serve
from tests.metrics_text import MetricsText
from tests.receiver import Receiver

pytestmark = pytest.mark.own_process("tests the options of the command")

KEY = "a-key-of-the-tests-0123"
WITH_KEY = {"X-API-Key": KEY}
PREFIXES = ("", "/llm")
QUIET = ("/health", "/health/live", "/health/ready/", "/metrics", "/debug/prof")
"""Routes that are neither traced nor profiled."""


@dataclass
class Seen:
    """The answers and the log of the server.

    Attributes:
        statuses: by path.
        metrics: at the end.
        log: lines of the access log, as their routes.
        spans, events: what OpenTelemetry and Sentry have sent.
    """

    statuses: dict[str, int]
    metrics: MetricsText
    log: list[str]
    spans: bytes
    events: bytes


@pytest.fixture(scope="module", params=["/llm", "/llm/"])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    with Receiver() as traces, Receiver() as sentry:
        environ = {
            "SIDECAR_API_KEYS": KEY,
            "ENABLE_METRICS": "true",
            "ENABLE_PROFILING": "true",
            "LOG_FORMAT": "json",
            "OTEL_EXPORTER_OTLP_ENDPOINT": traces.url,
            "SENTRY_DSN": f"http://key@127.0.0.1:{sentry.port}/42",
            "SENTRY_TRACES_SAMPLE_RATE": "1",
        }
        folder = tmp_path_factory.mktemp("below")
        with serve(folder, "--root-path", request.param, **environ) as server:
            statuses = dict(ask_everything(server))
            metrics = MetricsText(server.client.get("/metrics").text)
            server.stop()
        lines = map(json.loads, server.log.read_text().splitlines())
        routes = [line["route"] for line in lines if line["logger"] == "osiris.access"]
        return Seen(statuses, metrics, routes, traces.bytes, sentry.bytes)


def ask_everything(server: LiveServer) -> Iterator[tuple[str, int]]:
    for prefix in PREFIXES:
        for path in QUIET:
            headers = WITH_KEY if path == "/debug/prof" else {}
            yield prefix + path, server.client.get(prefix + path, headers=headers).status_code
        for path in ("/examples/", "/llmother/"):
            yield prefix + path, server.client.get(prefix + path, headers=WITH_KEY).status_code
    with server.client.stream("GET", "/llm/stream/audio", headers=WITH_KEY) as stream:
        yield "/llm/stream/audio", stream.status_code
    for route in ("/examples/", "/stream/audio"):
        profile = server.client.get("/debug/prof", params={"path": route}, headers=WITH_KEY)
        yield f"profile of {route}", profile.status_code
    yield "no key", server.client.get("/llm/examples/").status_code


def test_every_route_answers_with_the_prefix_and_without(seen: Seen) -> None:
    by_path = {"/health": 200, "/health/live": 200, "/health/ready/": 503, "/metrics": 200}
    # No request has been profiled before.
    by_path |= {"/debug/prof": 404, "/examples/": 200, "/llmother/": 404}
    expected = {prefix + path: status for prefix in PREFIXES for path, status in by_path.items()}
    # Now one has.
    expected |= {"/llm/debug/prof": 200, "/llm/stream/audio": 200, "no key": 401}
    expected |= {"profile of /examples/": 200, "profile of /stream/audio": 404}
    assert seen.statuses == expected


def test_probes_metrics_and_streams_are_not_measured(seen: Seen) -> None:
    handlers = seen.metrics.label_values("http_requests_total", "handler")
    assert handlers == {"/health", "/debug/prof", "/examples/", "none", "/stream/audio"}
    logged = {"/debug/prof": 4, "/examples/": 3, "unmatched": 2, "/stream/audio": 1}
    assert Counter(seen.log) == logged
    for sent in (seen.spans, seen.events):
        # Spans of other requests have arrived, so these would have arrived too.
        assert b"/examples/" in sent
        for path in (b"/health", b"/metrics", b"/debug/prof"):
            assert path not in sent
