"""Traces as a real server delivers them to a local OTLP receiver."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import use_span

from llm_sidecar.telemetry.traces import TraceIdFilter
from tests.live_server import ROOT, LiveServer, free_port, serve
from tests.receiver import Receiver

SECRET = "ZXQSECRET"
PROMPT = {"prompt": f"Long {SECRET} from 100, now 112.5.", "max_length": 256}
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PATIENT = {"MODEL_LOAD_WAIT_SECONDS": "60"}
SCORED = {"proposal": {"ticker": "ABC"}}
TRACEPARENT = {"traceparent": f"00-{TRACE}-{CALLER}-01"}


def spans(receiver: Receiver) -> list[Span]:
    found = []
    for request in list(receiver.requests):
        message = ExportTraceServiceRequest.FromString(request.body)
        for resource in message.resource_spans:
            attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
            assert attributes["service.name"] == "sidecar-under-test"
            found += [span for scope in resource.scope_spans for span in scope.spans]
    return found


def attributes(span: Span) -> dict[str, Any]:
    def value(attribute: Any) -> Any:
        kind = attribute.value.WhichOneof("value")
        found = getattr(attribute.value, kind)
        return [item.string_value for item in found.values] if kind == "array_value" else found

    return {attribute.key: value(attribute) for attribute in span.attributes}


def named(found: list[Span], name: str) -> list[Span]:
    return [span for span in found if span.name == name]


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with Receiver() as running:
        yield running


@pytest.fixture(scope="module")
def traced(
    receiver: Receiver,
    redis_url: str,
    random_models: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LiveServer]:
    environ = {
        **random_models,
        **PATIENT,
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
        "OTEL_SERVICE_NAME": "sidecar-under-test",
    }
    with serve(tmp_path_factory.mktemp("traced"), REDIS_URL=redis_url, **environ) as running:
        running.wait_until_ready()

        def are_connected() -> bool:
            return all(health["event_bus"]["connected"] for health in running.healths())

        running.wait_until(are_connected)
        yield running


def trace_of(server: LiveServer, receiver: Receiver, trace_id: str) -> list[Span]:
    """The spans of a trace, once the span of the request, which ends last, is there."""

    def whole() -> list[Span]:
        found = [span for span in spans(receiver) if span.trace_id.hex() == trace_id]
        return found if any(span.kind == Span.SPAN_KIND_SERVER for span in found) else []

    result: list[Span] = server.wait_until(whole)
    return result


def test_a_proposal_is_a_request_with_three_model_calls_and_two_events(
    traced: LiveServer, receiver: Receiver, redis_url: str
) -> None:
    answer = traced.client.post(
        f"/propose_trade_adjustments/?note={SECRET}", json=PROMPT, headers=TRACEPARENT
    )
    assert answer.status_code == 200
    found = trace_of(traced, receiver, TRACE)
    names = sorted(span.name for span in found)
    assert names == [
        "POST /propose_trade_adjustments/",
        "chat hermes",
        "chat phi3",
        "score hermes",
    ]
    (request,) = [span for span in found if span.kind == Span.SPAN_KIND_SERVER]
    assert request.parent_span_id.hex() == CALLER
    assert all(span.parent_span_id == request.span_id for span in found if span is not request)
    assert answer.headers["traceresponse"] == f"00-{TRACE}-{request.span_id.hex()}-01"
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        traced.wait_until(lambda: client.xlen("osiris.events") == 2)
        events = {fields["type"]: fields for _, fields in client.xrange("osiris.events")}
    assert set(events) == {"phi3.proposal.created", "phi3.proposal.assessed"}
    for fields in events.values():
        assert fields["traceparent"] == answer.headers["traceresponse"]


def test_a_model_call_has_the_attributes_of_the_conventions_and_its_phases(
    traced: LiveServer, receiver: Receiver
) -> None:
    answer = traced.client.post("/generate/hermes/", json=PROMPT)
    trace_id = answer.headers["traceresponse"].split("-")[1]
    (span,) = named(trace_of(traced, receiver, trace_id), "chat hermes")
    found = attributes(span)
    # The prompt shares its beginning with those of other tests.
    cached = found.pop("gen_ai.usage.cache_read.input_tokens", 0)
    assert 0 <= cached < found["gen_ai.usage.input_tokens"]
    assert found == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "osiris",
        "gen_ai.request.model": "hermes",
        "gen_ai.response.model": answer.headers["X-Model"],
        "gen_ai.usage.input_tokens": int(answer.headers["X-Prompt-Tokens"]),
        "gen_ai.usage.output_tokens": int(answer.headers["X-Completion-Tokens"]),
        "gen_ai.response.finish_reasons": [answer.headers["X-Finish-Reason"]],
    }
    assert [event.name for event in span.events] == ["queue", "prefill", "decode"]
    times = [event.time_unix_nano for event in span.events]
    assert span.start_time_unix_nano == times[0] < times[1] < times[2] < span.end_time_unix_nano
    seconds = sum(event.attributes[0].value.double_value for event in span.events)
    lasted = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    assert seconds == pytest.approx(lasted, abs=1e-3)


def test_a_score_is_a_request_and_one_model_call_without_tokens(
    traced: LiveServer, receiver: Receiver
) -> None:
    answer = traced.client.post(
        "/score/hermes", json={"proposal": {"ticker": SECRET}, "context": SECRET}
    )
    trace_id = answer.headers["traceresponse"].split("-")[1]
    found = trace_of(traced, receiver, trace_id)
    assert sorted(span.name for span in found) == ["POST /score/hermes", "score hermes"]
    (call,) = named(found, "score hermes")
    assert [event.name for event in call.events] == ["queue", "prefill"]
    assert "gen_ai.usage.input_tokens" not in attributes(call)


def test_a_call_that_fails_names_its_error(traced: LiveServer, receiver: Receiver) -> None:
    answer = traced.client.post("/generate/hermes/", json=PROMPT | {"max_length": 100_000})
    assert answer.status_code == 422
    trace_id = answer.headers["traceresponse"].split("-")[1]
    found = trace_of(traced, receiver, trace_id)
    for span in named(found, "chat hermes"):
        assert attributes(span)["error.type"] == "InvalidRequest"
        assert span.status.code == span.status.STATUS_CODE_ERROR


def test_the_callers_decision_not_to_sample_is_respected(
    traced: LiveServer, receiver: Receiver
) -> None:
    unsampled = "1" * 32
    header = {"traceparent": f"00-{unsampled}-{CALLER}-00"}
    assert traced.client.post("/score/hermes", json=SCORED, headers=header).is_success
    answer = traced.client.post("/score/hermes", json=SCORED)
    # Spans of a later request have been delivered, so those of the first never will be.
    trace_of(traced, receiver, answer.headers["traceresponse"].split("-")[1])
    assert unsampled not in {span.trace_id.hex() for span in spans(receiver)}


def test_probes_are_not_traced_and_no_span_contains_a_prompt(
    traced: LiveServer, receiver: Receiver
) -> None:
    """Reads the spans of all tests above."""
    trace_id = traced.client.post("/generate/phi3", json=PROMPT).headers["traceresponse"]
    trace_of(traced, receiver, trace_id.split("-")[1])
    for path, name in ((f"/feedback/{SECRET}", "/feedback/{feedback_id"), (f"/{SECRET}", None)):
        trace_id = traced.client.delete(path).headers["traceresponse"]
        (span,) = trace_of(traced, receiver, trace_id.split("-")[1])
        assert name is None or name in span.name
    assert {request.path for request in receiver.requests} == {"/v1/traces"}
    assert SECRET.encode() not in receiver.bytes
    assert not [span.name for span in spans(receiver) if "/health" in span.name]


@pytest.mark.own_process("stops the server, which then sends its spans")
def test_an_unexpected_error_is_recorded_without_its_text(
    random_models: dict[str, str], tmp_path: Path
) -> None:
    with Receiver() as receiver:
        environ = {
            **random_models,
            **PATIENT,
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "OTEL_SERVICE_NAME": "sidecar-under-test",
        }
        with serve(tmp_path, app="tests.failing_app:app", **environ) as server:
            assert server.client.post("/fail/x", json={"prompt": SECRET}).status_code == 500
            # No wait: the shutdown delivers the remaining spans.
            server.stop()
        (request,) = named(spans(receiver), "POST /fail/{what}")
        assert [event.name for event in request.events] == ["exception"]
        assert request.status.code == request.status.STATUS_CODE_ERROR
        assert request.status.message == ""
        assert SECRET.encode() not in receiver.bytes


@pytest.mark.own_process("reads the log")
def test_an_unreachable_endpoint_costs_one_warning_and_no_time(tmp_path: Path) -> None:
    """One that hangs and one that is down, at the same time."""
    down = f"http://127.0.0.1:{free_port()}"
    with Receiver(hanging=True) as hanging, contextlib.ExitStack() as stack:
        servers = []
        for name, url in (("hanging", hanging.url), ("down", down)):
            (tmp_path / name).mkdir()
            started = serve(tmp_path / name, OTEL_EXPORTER_OTLP_ENDPOINT=url)
            servers.append(stack.enter_context(started))
        for server in servers:
            server.wait_until_database_is_open()
            assert answers(server)
        began = time.monotonic()
        for server in servers:
            server.wait_until(functools.partial(answers_and_has_warned, server), interval=0.1)
        assert time.monotonic() - began < 30
        for server in servers:
            assert answers(server)
            began = time.monotonic()
            server.stop()
            # This includes the end of the database.
            assert time.monotonic() - began < 15
    for server in servers:
        assert_one_warning(server.log.read_text())


def answers(server: LiveServer) -> bool:
    return server.client.get("/examples/").is_success


def answers_and_has_warned(server: LiveServer) -> bool:
    return answers(server) and "traces are lost" in server.log.read_text()


def assert_one_warning(said: str) -> None:
    assert said.count("traces are lost") == 1
    lines = [json.loads(line) for line in said.splitlines()]
    ours = [line for line in lines if line["logger"].startswith("llm_sidecar.telemetry")]
    assert [line["level"] for line in ours] == ["WARNING"]
    assert "opentelemetry" not in said
    assert "Traceback" not in said


def test_a_log_record_within_a_trace_has_its_id() -> None:
    record = logging.LogRecord("x", logging.INFO, "x", 1, "x", None, None)
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("x")
    with tracer.start_as_current_span("x") as span:
        assert TraceIdFilter().filter(record)
    assert record.__dict__["trace_id"] == f"{span.get_span_context().trace_id:032x}"
    outside = logging.LogRecord("x", logging.INFO, "x", 1, "x", None, None)
    assert TraceIdFilter().filter(outside)
    assert "trace_id" not in outside.__dict__


def test_a_log_record_after_the_end_of_a_span_has_no_id() -> None:
    # In the context of a connection, the span of the request that opened it stays current.
    span = TracerProvider(shutdown_on_exit=False).get_tracer("x").start_span("x")
    record = logging.LogRecord("x", logging.INFO, "x", 1, "x", None, None)
    with use_span(span):
        span.end()
        assert TraceIdFilter().filter(record)
    assert "trace_id" not in record.__dict__


@pytest.mark.own_process("starts the app in a process of its own")
def test_what_is_off_is_not_imported(tmp_path: Path) -> None:
    script = """
import asyncio, json, sys
from llm_sidecar.settings import Settings
from osiris.server import create_app

async def main():
    app = create_app(Settings.from_environ())
    async with app.router.lifespan_context(app):
        pass

asyncio.run(main())
print(json.dumps([name for name in sys.modules]))
"""
    environ = {"REDIS_URL": "memory://", "LANCEDB_URI": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    # FastAPI and redis-py import parts of OpenTelemetry, but no part that is active.
    costly = ("opentelemetry.sdk.trace", "opentelemetry.exporter", "opentelemetry.instrumentation")
    loaded = json.loads(done.stdout)
    assert not [n for n in loaded if n.startswith((*costly, "sentry_sdk", "pyinstrument"))]
