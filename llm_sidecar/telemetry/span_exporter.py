"""A span exporter that logs an outage once, and removes the texts of requests."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Final
from urllib.parse import urlsplit

from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanContext, SpanKind, Status
from opentelemetry.util.types import AttributeValue

log = logging.getLogger(__name__)

RETRY_AFTER: Final = 5.0
"""Seconds after a failed delivery in which spans are dropped without another try."""

_SDK_LOGGERS: Final = ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal")
"""Loggers that write at least one line for every failed delivery."""
_TEXTS: Final = frozenset({"exception.message", "exception.stacktrace"})
_SENT: Final = frozenset(
    {
        *("http.url", "http.target", "url.full", "url.path", "url.query"),
        *("http.host", "http.server_name", "server.address"),
        *("http.user_agent", "user_agent.original"),
    }
)
"""Attributes with a request's address and headers, by their old and new names in OpenTelemetry's
conventions. `http.route` stays."""


class CarefulExporter(SpanExporter):
    """Wraps another exporter.

    Args:
        exporter: delivers within a short timeout.
        endpoint: its URL, whose host the log names.
    """

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter = exporter
        self._host = urlsplit(endpoint).netloc.rpartition("@")[2]
        self._failing = False
        self._not_before = 0.0
        for name in _SDK_LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Delivers the spans, or drops them."""
        if time.monotonic() < self._not_before:
            return SpanExportResult.FAILURE
        result = self._exporter.export([scrubbed(span) for span in spans])
        self._note(result is SpanExportResult.SUCCESS)
        return result

    def shutdown(self) -> None:
        """Ends a running retry."""
        self._exporter.shutdown()

    def _note(self, delivered: bool) -> None:
        if delivered and self._failing:
            log.info("traces are delivered to %s again", self._host)
        elif not delivered and not self._failing:
            log.warning("traces are lost until %s accepts them", self._host)
        self._failing = not delivered
        if not delivered:
            self._not_before = time.monotonic() + RETRY_AFTER


def scrubbed(span: ReadableSpan) -> ReadableSpan:
    """A copy of the span without anything that may quote a request: its address and headers, the
    caller's `tracestate`, and the texts of exceptions."""
    context = span.context
    if context is not None:
        context = SpanContext(
            context.trace_id, context.span_id, context.is_remote, context.trace_flags
        )
    return ReadableSpan(
        name=span.name,
        context=context,
        parent=span.parent,
        resource=span.resource,
        attributes=_without(span.attributes, _SENT if span.kind is SpanKind.SERVER else ()),
        events=[
            Event(event.name, _without(event.attributes, _TEXTS), event.timestamp)
            for event in span.events
        ],
        links=span.links,
        kind=span.kind,
        status=Status(span.status.status_code),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def _without(
    attributes: Mapping[str, AttributeValue] | None, names: Collection[str]
) -> dict[str, AttributeValue]:
    return {name: value for name, value in (attributes or {}).items() if name not in names}
