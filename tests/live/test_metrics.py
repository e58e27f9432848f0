"""The metrics: exact values of calls that a test makes, and those of a real server."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from llm_sidecar.engines.batch import MAX_ROWS
from llm_sidecar.settings import Settings
from llm_sidecar.telemetry.calls import ModelCall
from osiris.middleware.metrics import HttpMetrics, sidecar_metrics
from osiris.server import create_app
from tests.live_server import LiveServer, serve
from tests.metrics_text import MetricsText
from tests.unit.asgi import Call, http_scope

ON = {"ENABLE_METRICS": "true"}
SECRET = "Zebra-4711"
PROMPT = {"prompt": f"Long ABC from 100, now 112.5, RSI 81. {SECRET}"}


@pytest.fixture(scope="module")
def measured(
    random_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server whose metrics are on."""
    folder = tmp_path_factory.mktemp("measured")
    with serve(folder, PRELOAD_MODELS="true", **ON, **random_models) as running:
        running.wait_until_ready()
        yield running


def rise(before: MetricsText, after: MetricsText, name: str, **labels: str) -> float:
    return after.value(name, **labels) - before.value(name, **labels)


def client_of(app: FastAPI) -> httpx.AsyncClient:
    # As in a server, an unexpected error is answered and not raised here.
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


# Off, and two apps


@pytest.mark.parametrize("path", ["/metrics", "/metrics/"])
async def test_the_metrics_are_404_unless_they_are_on(path: str) -> None:
    async with client_of(create_app(Settings.from_environ({}))) as client:
        assert (await client.get(path)).status_code == 404
    async with client_of(create_app(Settings.from_environ(ON))) as client:
        response = await client.get(path)
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_metrics_that_are_off_add_no_middleware() -> None:
    off = create_app(Settings.from_environ({})).user_middleware
    on = create_app(Settings.from_environ(ON)).user_middleware
    assert len(on) == len(off) + 1


async def test_two_apps_in_one_process_count_separately() -> None:
    apps = [create_app(Settings.from_environ(ON)) for _ in range(2)]
    texts = []
    for app, count in zip(apps, (3, 1), strict=True):
        async with client_of(app) as client:
            for _ in range(count):
                await client.get("/nowhere")
            texts.append(MetricsText((await client.get("/metrics")).text))
    assert [text.value("http_requests_total") for text in texts] == [3, 1]


# HTTP


async def test_unknown_paths_and_methods_create_no_series() -> None:
    async with client_of(create_app(Settings.from_environ(ON))) as client:
        for number in range(5):
            await client.get(f"/nowhere/{number}")
            await client.request(f"BREW{number}", "/health/")
        text = MetricsText((await client.get("/metrics")).text)
    assert text.label_values("http_requests_total", "handler") == {"none", "/health/"}
    assert text.label_values("http_requests_total", "method") == {"GET", "other"}
    assert text.value("http_requests_total", handler="none", method="GET", status="4xx") == 5
    assert text.value("http_request_duration_seconds_count", method="other") == 5


async def test_probes_and_metrics_are_not_counted() -> None:
    async with client_of(create_app(Settings.from_environ(ON))) as client:
        for path in ("/health/live", "/health/live/", "/metrics", "/metrics/", "/nowhere"):
            await client.get(path)
        text = MetricsText((await client.get("/metrics")).text)
    # The counted request shows that counting works.
    (counted,) = text.samples("http_requests_total")
    assert (counted.labels["handler"], counted.value) == ("none", 1)


async def test_an_unexpected_error_counts_as_5xx() -> None:
    app = create_app(Settings.from_environ(ON))

    @app.get("/broken/{name}")
    async def broken(name: str) -> None:
        raise KeyError(name)

    async with client_of(app) as client:
        assert (await client.get(f"/broken/{SECRET}")).status_code == 500
        text = (await client.get("/metrics")).text
    found = MetricsText(text)
    assert found.value("http_requests_total", handler="/broken/{name}", status="5xx") == 1
    assert SECRET not in text


async def test_a_cancelled_request_counts_as_4xx_unless_it_has_an_answer() -> None:
    """Ray Serve cancels the request of a client that disconnects."""
    metrics = sidecar_metrics()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/begun":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise asyncio.CancelledError

    for path in ("/begun", "/not-begun"):
        call = Call()
        with pytest.raises(asyncio.CancelledError):
            await HttpMetrics(app, metrics)(http_scope(path), call.receive, call.send)
    text = MetricsText(metrics.render().decode())
    assert text.value("http_requests_total", method="POST", status="2xx") == 1
    assert text.value("http_requests_total", method="POST", status="4xx") == 1
    assert text.value("http_requests_total") == 2


# Exact values of calls


def call(**outcome: object) -> ModelCall:
    made = ModelCall("phi3", "generate", queued=10.0)
    for name, value in outcome.items():
        setattr(made, name, value)
    return made


def test_an_answered_call_is_counted_with_all_its_times_and_tokens() -> None:
    metrics = sidecar_metrics()
    metrics.call_finished(
        call(
            begun=10.5,
            first_token=11.0,
            finished=13.0,
            prompt_tokens=7,
            completion_tokens=9,
            steps=[(1.0, 4), (1.0, 2)],
            finish_reason="stop",
        )
    )
    text = MetricsText(metrics.render().decode())
    sums = {
        "sidecar_e2e_request_latency_seconds_sum": 3.0,
        "sidecar_request_queue_time_seconds_sum": 0.5,
        "sidecar_time_to_first_token_seconds_sum": 1.0,
        "sidecar_inter_token_latency_seconds_sum": 0.75,
        "sidecar_inter_token_latency_seconds_count": 2,
        "sidecar_prompt_tokens_total": 7,
        "sidecar_generation_tokens_total": 9,
        "sidecar_request_errors_total": 0,
    }
    assert {name: text.value(name, model="phi3") for name in sums} == sums
    assert text.value("sidecar_request_success_total", model="phi3", finish_reason="stop") == 1
    assert text.value("sidecar_request_success_total") == 1
    assert text.value("sidecar_e2e_request_latency_seconds_count", model="hermes") == 0


def test_a_failed_call_counts_as_an_error_without_a_latency() -> None:
    metrics = sidecar_metrics()
    metrics.call_finished(call(begun=10.5, first_token=11.0, finished=12.0, error="Cancelled"))
    metrics.call_finished(call(finished=10.0, error="QueueFull"))
    text = MetricsText(metrics.render().decode())
    assert text.value("sidecar_request_errors_total", model="phi3", error="Cancelled") == 1
    assert text.value("sidecar_request_errors_total", model="phi3", error="QueueFull") == 1
    assert text.value("sidecar_request_success_total") == 0
    assert text.value("sidecar_e2e_request_latency_seconds_count") == 0
    assert text.value("sidecar_request_queue_time_seconds_count") == 1


def test_each_ungrounded_field_of_a_proposal_is_counted() -> None:
    metrics = sidecar_metrics()
    metrics.proposed("pass", ())
    metrics.proposed("abort", ("rationale",))
    metrics.proposed("adjust", ("ticker", "rationale"))
    text = MetricsText(metrics.render().decode())
    name = "sidecar_ungrounded_proposals_total"
    assert text.value(name, field="ticker") == 1
    assert text.value(name, field="rationale") == 2
    assert text.value("sidecar_proposals_total") == 3


# A real server


def test_a_proposal_is_counted_for_both_models(measured: LiveServer) -> None:
    before = measured.metrics()
    response = measured.client.post("/propose_trade_adjustments/", json=PROMPT)
    after = measured.metrics()
    tokens = float(response.headers["X-Completion-Tokens"])
    assert rise(before, after, "sidecar_generation_tokens_total", model="phi3") == tokens
    prompt_tokens = float(response.headers["X-Prompt-Tokens"])
    assert rise(before, after, "sidecar_prompt_tokens_total", model="phi3") == prompt_tokens
    success = "sidecar_request_success_total"
    assert rise(before, after, success, model="phi3", finish_reason="stop") == 1
    assert rise(before, after, success, model="hermes", finish_reason="length") == 1
    assert rise(before, after, success, model="hermes", finish_reason="score") == 1
    assert rise(before, after, "sidecar_time_to_first_token_seconds_count", model="hermes") == 1
    assert rise(before, after, "sidecar_request_queue_time_seconds_count", model="hermes") == 2
    action = response.json()["phi3_proposal"]["action"]
    assert rise(before, after, "sidecar_proposals_total", action=action) == 1
    assert rise(before, after, "sidecar_proposals_total") == 1
    ungrounded = response.headers["X-Grounded"].split(",")
    assert "ticker" in ungrounded
    for field in ("ticker", "rationale"):
        grew = rise(before, after, "sidecar_ungrounded_proposals_total", field=field)
        assert grew == ungrounded.count(field)
    score = pytest.approx(float(response.headers["X-Hermes-Score"]), abs=1e-6)
    assert rise(before, after, "sidecar_hermes_score_sum") == score
    handled = {"handler": "/propose_trade_adjustments/", "method": "POST", "status": "2xx"}
    assert after.value("http_requests_total", **handled) == 1
    assert rise(before, after, "sidecar_database_rows_written_total") == 3
    # Events go out after the answer.
    published = "sidecar_event_bus_published_total"
    measured.wait_until(lambda: rise(before, measured.metrics(), published) == 2)


def test_the_state_of_every_part_has_metrics(measured: LiveServer) -> None:
    measured.client.post("/score/hermes", json={"proposal": {"ticker": "ABC"}})
    # What a sidecar behind a proxy has received is known to the others in half a minute.
    for sidecar in measured.sidecars:
        assert_has_metrics(sidecar)


def assert_has_metrics(sidecar: LiveServer) -> None:
    name = "sidecar_mean_hermes_score_last_24h"
    sidecar.wait_until(lambda: list(sidecar.metrics().samples(name)))
    text, health = sidecar.metrics(), sidecar.client.get("/health").json()
    assert 0 <= text.value(name) <= 1
    for model in ("phi3", "hermes"):
        assert text.value("sidecar_model_state", model=model) == 1
        assert text.value("sidecar_model_state", model=model, state="ready") == 1
        assert text.value("sidecar_model_replicas", model=model) == 1
        assert text.value("sidecar_model_replicas", model=model, state="ready") == 1
        (info,) = text.samples("sidecar_model_info", model=model)
        assert info.labels["served_by"] == health["models"][model]["model"]
        assert info.labels["adapter"] == ""
        assert text.value("sidecar_requests_limit", model=model) == 64
        for phase in ("prefill", "decode"):
            speed = text.value("sidecar_model_tokens_per_second", model=model, phase=phase)
            assert speed == health["models"][model]["speed"][phase]
    forecast = health["forecast"]
    parts = (forecast[f"{part}_seconds"] for part in ("proposal", "critique", "score"))
    share = sum(parts) / forecast["timeout_seconds"]
    assert text.value("sidecar_forecast_of_timeout_ratio") == share
    assert text.value("sidecar_database_state", state="open") == 1
    assert text.value("sidecar_database_state") == 1
    assert text.label_values("sidecar_database_fragments", "table") == set(
        health["database"]["fragments"]
    )
    assert text.value("sidecar_event_bus_connected") == 1
    assert text.value("sidecar_speech_available") == 1
    assert text.value("sidecar_speech_voice", voice="espeak") == 1


def test_running_and_waiting_calls_are_counted_and_a_disconnect_is_not_a_success(
    measured: LiveServer,
) -> None:
    long = PROMPT | {"max_length": 7500}
    cancelled = {"model": "hermes", "error": "Cancelled"}
    handled = {"handler": "/generate/hermes", "status": "4xx"}
    sidecars = len(measured.sidecars)
    sent = sidecars * (MAX_ROWS + 2)

    async def hang_up_midway() -> None:
        async with httpx.AsyncClient(base_url=measured.url, timeout=60) as client:
            asking = [
                asyncio.create_task(client.post("/generate/hermes", json=long)) for _ in range(sent)
            ]
            seen = (0.0, 0.0)
            while seen != (sidecars * MAX_ROWS, sidecars * 2):
                text = await asyncio.to_thread(measured.metrics)
                seen = (
                    text.value("sidecar_requests_running", model="hermes"),
                    text.value("sidecar_requests_waiting", model="hermes"),
                )
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)

    before = measured.metrics()
    asyncio.run(asyncio.wait_for(hang_up_midway(), 60))
    errors = "sidecar_request_errors_total"
    measured.wait_until(lambda: rise(before, measured.metrics(), errors, **cancelled) == sent)
    after = measured.metrics()
    assert rise(before, after, "sidecar_request_success_total", model="hermes") == 0
    assert after.value("sidecar_requests_waiting", model="hermes") == 0
    assert after.value("http_requests_total", **handled) == sent


def test_a_worker_that_dies_is_counted_as_a_restart(measured: LiveServer) -> None:
    before = measured.metrics()
    os.kill(measured.workers("phi3")[0], signal.SIGKILL)
    restarts = "sidecar_worker_restarts_total"
    measured.wait_until(lambda: rise(before, measured.metrics(), restarts, model="phi3") == 1)
    assert rise(before, measured.metrics(), restarts, model="hermes") == 0
    measured.wait_until_ready()


def test_every_label_value_is_bounded(measured: LiveServer) -> None:
    responses = [
        measured.client.post("/generate/phi3", json=PROMPT | {"max_length": 1}),
        measured.client.post("/generate/hermes", json={"prompt": f"{SECRET} " * 2900}),
        measured.client.post("/generate", json=PROMPT | {"max_length": 5}),
        measured.client.get(f"/{SECRET}"),
    ]
    assert [response.status_code for response in responses] == [422, 422, 200, 404]
    for sidecar in measured.sidecars:
        assert SECRET not in sidecar.client.get("/metrics/").text
    text = measured.metrics()
    errors = "sidecar_request_errors_total"
    assert text.label_values(errors, "error") == {
        "QueueFull",
        "ModelUnavailable",
        "DeadlineExceeded",
        "InvalidRequest",
        "Cancelled",
        "Unexpected",
    }
    assert text.value(errors, model="hermes", error="InvalidRequest") == 1
    assert text.value(errors, error="Unexpected") == 0
    assert text.label_values("sidecar_request_success_total", "finish_reason") == {
        "stop",
        "length",
        "deadline",
        "score",
    }
    assert text.label_values("sidecar_proposals_total", "action") == {"adjust", "pass", "abort"}
    fields = text.label_values("sidecar_ungrounded_proposals_total", "field")
    assert fields == {"ticker", "rationale"}
    assert text.label_values("http_requests_total", "status") <= {"2xx", "4xx", "5xx"}
