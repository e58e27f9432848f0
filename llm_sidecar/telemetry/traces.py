"""OpenTelemetry traces: a span per HTTP request and per model call.

    traces = Traces("http://localhost:4318", "osiris_llm_sidecar")
    traces.install(app)
    traces.start()
    ...
    await traces.close()

Model calls follow the conventions for generative AI
(https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/), without any content: no prompt,
no completion, no query string and no text of an exception leaves this process. No request waits for
Redis, so its commands are not traced. An event carries the `traceparent` of its request.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.propagators import (
    TraceResponsePropagator,
    set_global_response_propagator,
)
from opentelemetry.instrumentation.utils import suppress_http_instrumentation
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, format_trace_id
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from llm_sidecar.telemetry.asgi import TrackedSend, is_observed
from llm_sidecar.telemetry.base import Instrument
from llm_sidecar.telemetry.calls import ModelCall, Operation
from llm_sidecar.telemetry.span_exporter import CarefulExporter
from llm_sidecar.telemetry.trace_context import traceparent

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

QUEUE_SPANS: Final = 2048
"""Maximum number of spans that wait to be delivered; then the oldest is dropped."""
DELIVERY_INTERVAL: Final = 1.0
"""Seconds between deliveries."""
REQUEST_TIMEOUT: Final = 2.0
"""Seconds that one delivery may take, retries included."""
FLUSH_TIMEOUT: Final = 1.0
"""Seconds that the last delivery may hold up the shutdown."""
OPERATIONS: Final[dict[Operation, str]] = {"generate": "chat", "score_choices": "score"}
"""`gen_ai.operation.name`; scoring given answers has no name in the conventions."""
_PROVIDER: Final = "osiris"
_LOGGERS: Final = ("", "uvicorn", "uvicorn.access", "uvicorn.error")
_PROPAGATOR: Final = TraceContextTextMapPropagator()


class Traces(Instrument):
    """Traces to one OTLP endpoint over HTTP."""

    def __init__(self, endpoint: str, service_name: str) -> None:
        """Connects to nothing.

        Args:
            endpoint: base URL; the path of traces is appended to it.
            service_name: `service.name` of every span.
        """
        self._endpoint = f"{endpoint.rstrip('/')}/v1/traces"
        # OpenTelemetry's own variables for resource attributes and for the sampler also apply.
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service_name}), shutdown_on_exit=False
        )
        self._tracer = self._provider.get_tracer("llm_sidecar")

    def install(self, app: FastAPI) -> None:
        """Traces the app's requests, which continue the caller's `traceparent`."""
        FastAPIInstrumentor.instrument_app(
            app,
            tracer_provider=self._provider,
            # Not used: it matches whole URLs, in which a root path looks like a route.
            excluded_urls="",
            exclude_spans=["receive", "send"],
        )
        build = app.build_middleware_stack
        app.build_middleware_stack = lambda: _Observed(build())  # type: ignore[method-assign]
        app.add_middleware(_InSpan)

    def start(self) -> None:
        """Starts to deliver, and adds the trace's id to log lines and a `traceresponse` header."""
        exporter = OTLPSpanExporter(self._endpoint, timeout=REQUEST_TIMEOUT)
        self._provider.add_span_processor(
            BatchSpanProcessor(
                CarefulExporter(exporter, self._endpoint),
                max_queue_size=QUEUE_SPANS,
                schedule_delay_millis=DELIVERY_INTERVAL * 1000,
            )
        )
        set_global_response_propagator(TraceResponsePropagator())  # type: ignore[no-untyped-call]
        for handler in {h for name in _LOGGERS for h in logging.getLogger(name).handlers}:
            handler.addFilter(TraceIdFilter())

    async def close(self) -> None:
        """Delivers pending spans, unless the endpoint takes too long."""
        set_global_response_propagator(None)  # type: ignore[no-untyped-call]
        # No longer wait: the SDK's own shutdown takes up to 30 s.
        flushing = threading.Thread(target=self._provider.shutdown, daemon=True)
        flushing.start()
        await asyncio.to_thread(flushing.join, FLUSH_TIMEOUT)

    def call_finished(self, call: ModelCall) -> None:
        """Adds the call's span as a child of the request's span."""
        operation = OPERATIONS[call.operation]
        span = self._tracer.start_span(
            f"{operation} {call.model}",
            kind=SpanKind.CLIENT,
            start_time=_unix_ns(call, call.queued),
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": _PROVIDER,
                "gen_ai.request.model": call.model,
            },
        )
        if span.is_recording():
            span.set_attributes(_outcome(call))
            for name, began, ended in call.phases():
                span.add_event(name, {"duration": ended - began}, _unix_ns(call, began))
        if call.error is not None:
            span.set_status(Status(StatusCode.ERROR))
        span.end(None if call.finished is None else _unix_ns(call, call.finished))


class _Observed:
    """ASGI middleware that turns off OpenTelemetry's own middleware for requests that are not
    observed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_observed(scope):
            await self._app(scope, receive, send)
            return
        with suppress_http_instrumentation():
            await self._app(scope, receive, send)


class _InSpan:
    """ASGI middleware inside the span of a request: events get its trace context, and an unexpected
    error is recorded before the answer is sent.

    The span ends with the answer, so OpenTelemetry's own middleware would record the error too
    late.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = TrackedSend(send)
        # Without a span, this is the client's trace context, or None.
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier)
        if "traceparent" in carrier:
            traceparent.set(carrier["traceparent"])
        try:
            await self._app(scope, receive, response)
        except Exception as error:
            if not response.started:
                span = trace.get_current_span()
                span.record_exception(error)
                span.set_status(Status(StatusCode.ERROR))
            raise


class TraceIdFilter(logging.Filter):
    """Sets `trace_id` on records that are logged within a span; drops no record."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Sets the trace's id in 32 hexadecimal digits."""
        span = trace.get_current_span()
        context = span.get_span_context()
        # Connections and timers that a request has started still have its span after the span's
        # end.
        ended = getattr(span, "end_time", None) is not None
        if context.is_valid and not ended:
            record.trace_id = format_trace_id(context.trace_id)
        return True


def _outcome(call: ModelCall) -> dict[str, Any]:
    """The attributes that are known only when the call has finished."""
    attributes = {
        "gen_ai.response.model": call.served_by,
        "gen_ai.usage.input_tokens": call.prompt_tokens or None,
        "gen_ai.usage.cache_read.input_tokens": call.cached_tokens or None,
        "gen_ai.usage.output_tokens": call.completion_tokens or None,
        "gen_ai.response.finish_reasons": call.finish_reason and [call.finish_reason],
        "error.type": call.error,
        "osiris.adapter": call.adapter,
    }
    return {name: value for name, value in attributes.items() if value is not None}


def _unix_ns(call: ModelCall, moment: float) -> int:
    return int((call.queued_unix + moment - call.queued) * 1e9)
