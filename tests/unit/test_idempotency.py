"""The header `Idempotency-Key` over HTTP, with a fake sidecar."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from starlette.requests import ClientDisconnect

from llm_sidecar.errors import DatabaseUnavailable, DeadlineExceeded
from llm_sidecar.services.idempotency import Attempt
from llm_sidecar.settings import Settings
from osiris.idempotency import answered_once, begin_once
from osiris.server import create_app
from tests.unit.asgi import Call, client, http_scope
from tests.unit.fakes import FakeSidecar, PausedModel, completion, until
from tests.unit.services.samples import CRITIQUE, PROPOSAL, SURE, WRITTEN, fake_sidecar

KEY = {"Idempotency-Key": "k-1"}
PROMPT = {"prompt": "Long ABC from 100, now 112.5.", "max_length": 300}
FEEDBACK = {"transaction_id": "t-1", "feedback_type": "rating", "feedback_content": "good"}
PROPOSE = "/propose_trade_adjustments/"
REQUESTS: dict[str, dict[str, Any]] = {
    "/generate/": PROMPT,
    "/generate/hermes/": PROMPT,
    "/generate/phi3/": PROMPT,
    PROPOSE: PROMPT,
    "/score/hermes/": {"proposal": PROPOSAL},
    "/feedback/phi3/": FEEDBACK,
    "/adapters/swap": {},
}


def prepared(path: str, **settings: Any) -> FakeSidecar:
    """A sidecar whose models have exactly one answer for this path."""
    made = fake_sidecar(**settings)
    if path in ("/generate/", "/generate/hermes/"):
        made.hermes.answers = [CRITIQUE]
    elif path == "/score/hermes/":
        made.hermes.answers = [SURE]
    return made


@functools.cache
def app_with(api_keys: str) -> FastAPI:
    """A shared app, because building one takes longer than a request."""
    return create_app(Settings.from_environ({"SIDECAR_API_KEYS": api_keys} if api_keys else {}))


def asking(made: FakeSidecar, api_keys: str = "") -> httpx.AsyncClient:
    app = app_with(api_keys)
    app.state.sidecar = made.sidecar
    return client(app)


def own_headers(response: httpx.Response) -> dict[str, str]:
    """The headers, without those that differ in every answer."""
    left_out = ("x-request-id", "idempotent-replayed")
    return {name: value for name, value in response.headers.items() if name not in left_out}


@pytest.mark.parametrize("path", REQUESTS)
async def test_a_request_that_is_sent_again_gets_the_first_answer(path: str) -> None:
    made = prepared(path)
    async with asking(made) as asked:
        first = await asked.post(path, json=REQUESTS[path], headers=KEY)
        happened = list(made.happened.log)
        # With the other form of its path, with or without a trailing slash.
        other = path.rstrip("/") if path.endswith("/") else f"{path}/"
        again = await asked.post(other, json=REQUESTS[path], headers=KEY)
    assert (first.status_code, again.status_code) == (200, 200)
    assert again.content == first.content
    assert own_headers(again) == own_headers(first)
    assert again.headers["X-Request-ID"] != first.headers["X-Request-ID"]
    assert "Idempotent-Replayed" not in first.headers
    assert again.headers["Idempotent-Replayed"] == "true"
    assert made.happened.log == [*happened, ("metric", "replayed", None)]


@pytest.mark.parametrize("path", REQUESTS)
async def test_another_request_with_the_same_key_is_422(path: str) -> None:
    async with asking(prepared(path)) as asked:
        assert (await asked.post(path, json=REQUESTS[path], headers=KEY)).is_success
        response = await asked.post(f"{path}?a=1", json=REQUESTS[path], headers=KEY)
    assert response.status_code == 422
    assert response.json() == {"detail": "This Idempotency-Key was used for another request."}


async def test_a_request_is_its_method_path_query_and_body() -> None:
    made = prepared("/feedback/phi3/")
    changed = FEEDBACK | {"feedback_content": "bad"}
    requests = [
        ("/feedback/phi3/", FEEDBACK),
        ("/feedback/phi3/", changed),
        ("/adapters/swap", {}),
        ("/feedback/phi3/?a=1&b=2", FEEDBACK),
        ("/feedback/phi3/?a=", FEEDBACK),
        ("/feedback/phi3/?b=2&a=1", FEEDBACK),
    ]
    async with asking(made) as asked:
        for number, (path, body) in enumerate(requests):
            await asked.post(path, json=body, headers={"Idempotency-Key": f"k-{number}"})
    *different, last = made.store.fingerprints.values()
    assert len(set(different)) == 5
    assert last == different[3]


@pytest.mark.parametrize(
    ("path", "key"),
    [
        *((path, "a b") for path in REQUESTS),
        *((PROPOSE, key) for key in ("", "é", "x" * 256, "\x7f")),
    ],
)
async def test_a_key_of_other_characters_is_422(path: str, key: str) -> None:
    made = prepared(path)
    headers = [("Idempotency-Key", key.encode("latin-1"))]
    async with asking(made) as asked:
        response = await asked.post(path, json=REQUESTS[path], headers=headers)  # type: ignore[arg-type]
    assert response.status_code == 422
    assert response.json()["detail"] == [
        {
            "loc": ["header", "Idempotency-Key"],
            "msg": "Input should be 1 to 255 visible ASCII characters",
            "type": "idempotency_key",
        }
    ]
    assert made.happened.log == []


async def test_two_keys_are_422() -> None:
    made = prepared(PROPOSE)
    async with asking(made) as asked:
        headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
        response = await asked.post(PROPOSE, json=PROMPT, headers=headers)
    assert response.status_code == 422
    assert response.json()["detail"] == [
        {
            "loc": ["header", "Idempotency-Key"],
            "msg": "Parameter should be sent once",
            "type": "repeated_parameter",
        }
    ]


@pytest.mark.parametrize("key", ["!", "~" * 255])
async def test_any_visible_ascii_characters_are_a_key(key: str) -> None:
    made = prepared(PROPOSE)
    async with asking(made) as asked:
        for _ in range(2):
            response = await asked.post(PROPOSE, json=PROMPT, headers={"Idempotency-Key": key})
    assert response.headers["Idempotent-Replayed"] == "true"


async def test_a_key_belongs_to_an_api_key() -> None:
    made = prepared("/feedback/phi3/")
    keys = {"desk": "first-key-0123456789", "#2": "second-key-012345678"}
    configured = f"desk={keys['desk']},{keys['#2']}"
    async with asking(made, configured) as asked:
        for key in keys.values():
            response = await asked.post(
                "/feedback/phi3/", json=FEEDBACK, headers=KEY | {"X-API-Key": key}
            )
            assert "Idempotent-Replayed" not in response.headers
    assert [request.caller for request in made.store.requests] == ["desk", "#2"]


async def test_without_api_keys_there_is_one_caller() -> None:
    made = prepared("/feedback/phi3/")
    async with asking(made) as asked:
        await asked.post("/feedback/phi3/", json=FEEDBACK, headers=KEY)
    assert [(request.caller, request.key) for request in made.store.requests] == [("", "k-1")]


async def test_a_failure_is_not_kept() -> None:
    made = prepared(PROPOSE)
    made.hermes.answers = [DeadlineExceeded("hermes is late", retry_after=1), CRITIQUE, SURE]
    async with asking(made) as asked:
        late = await asked.post(PROPOSE, json=PROMPT, headers=KEY)
        again = await asked.post(PROPOSE, json=PROMPT, headers=KEY)
    assert (late.status_code, again.status_code) == (504, 200)
    assert again.json()["transaction_id"] == late.json()["transaction_id"]
    assert "Idempotent-Replayed" not in again.headers
    assert len(made.phi3.calls) == 1


async def test_a_request_waits_for_the_same_request_that_still_runs() -> None:
    phi3 = PausedModel(WRITTEN.text, "")
    made = FakeSidecar(Settings.from_environ({"REDIS_URL": "memory://"}), phi3=phi3)
    async with asking(made) as asked:
        both = [
            asyncio.create_task(asked.post("/generate/phi3/", json=PROMPT, headers=KEY))
            for _ in range(2)
        ]
        await until(lambda: made.store.claimed)
        for _ in range(50):
            await asyncio.sleep(0)
        phi3.resumed.set()
        first, second = [await one for one in both]
    assert phi3.closed == 1
    assert first.json() == second.json() == PROPOSAL
    replayed = [one.headers.get("Idempotent-Replayed") for one in (first, second)]
    assert sorted(replayed, key=str) == [None, "true"]


async def test_a_proposal_is_answered_even_if_its_key_is_not_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = prepared(PROPOSE)
    made.store.full = DatabaseUnavailable("The disk is full.")
    async with asking(made) as asked:
        response = await asked.post(PROPOSE, json=PROMPT, headers=KEY)
    assert response.status_code == 200
    assert response.headers["X-Stored"] == "false"
    line = "a request is answered without its Idempotency-Key: The disk is full."
    assert line in caplog.messages


async def test_feedback_whose_key_is_not_kept_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepared("/feedback/phi3/")

    async def refuse(*_: object) -> None:
        raise DatabaseUnavailable("The disk is full.", retry_after=5)

    # The row itself could be stored.
    monkeypatch.setattr(made.store, "claim", refuse)
    async with asking(made) as asked:
        response = await asked.post("/feedback/phi3/", json=FEEDBACK, headers=KEY)
    assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
    assert made.happened.log == []


async def test_invalid_input_claims_nothing() -> None:
    made = prepared(PROPOSE, limits={"max_prompt_chars": 100})
    async with asking(made) as asked:
        for body in ({}, PROMPT | {"prompt": "x" * 101}):
            response = await asked.post(PROPOSE, json=body, headers=KEY)
            assert response.status_code == 422
        assert made.store.fingerprints == {}
        assert (await asked.post(PROPOSE, json=PROMPT, headers=KEY)).status_code == 200


async def test_text_of_any_language_is_repeated_as_it_was() -> None:
    made = prepared("/generate/hermes/")
    made.hermes.answers = [
        completion("Stop bei 100 €, 価格", model="hermes/é".encode().decode("latin-1"))
    ]
    async with asking(made) as asked:
        first, again = [
            await asked.post("/generate/hermes/", json=PROMPT, headers=KEY) for _ in range(2)
        ]
    assert again.json() == first.json() == {"generated_text": "Stop bei 100 €, 価格"}
    assert again.headers["X-Model"] == first.headers["X-Model"]


async def test_a_response_is_kept_as_utf8_and_repeated_with_its_status() -> None:
    made = fake_sidecar()

    async def accept(_: Attempt) -> Response:
        return Response("価格", 202, {"X-Name": "é"})

    async def ask() -> Response:
        call = Call({"type": "http.request", "body": b""})
        request = Request(http_scope("/later"), call.receive)
        return await answered_once(request, "k-1", made.sidecar.idempotency, accept)

    first, again = [await ask() for _ in range(2)]
    assert (again.status_code, again.body) == (first.status_code, first.body)
    assert again.status_code == 202
    assert again.raw_headers == [*first.raw_headers, (b"idempotent-replayed", b"true")]
    (kept,) = made.store.requests.values()
    assert (
        kept.response
        == (
            '{"status": 202, "headers": [["x-name", "é"], ["content-length", "6"]], "body": "価格"}'
        ).encode()
    )


async def test_an_attempt_that_fails_after_its_client_has_disconnected_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, problem: problems.append(problem))
    idempotency = fake_sidecar().sidecar.idempotency

    async def begin(*_: object) -> Attempt:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise DeadlineExceeded("It is too late.") from None
        raise AssertionError

    monkeypatch.setattr(idempotency, "begin", begin)
    request = Request(http_scope("/later"), Call({"type": "http.request", "body": b""}).receive)
    await request.body()
    with pytest.raises(ClientDisconnect):
        await begin_once(request, "k-1", idempotency)
    await asyncio.sleep(0)
    assert problems == []


@pytest.fixture
async def document() -> AsyncIterator[dict[str, Any]]:
    async with asking(fake_sidecar()) as asked:
        yield (await asked.get("/openapi.json")).json()


@pytest.mark.parametrize("path", REQUESTS)
def test_the_document_describes_the_header(document: dict[str, Any], path: str) -> None:
    operation = document["paths"][path]["post"]
    (header,) = [one for one in operation["parameters"] if one["in"] == "header"]
    assert (header["name"], header["required"]) == ("Idempotency-Key", False)
    assert json.dumps(header["schema"]).count("[!-~]{1,255}") == 1
    assert {"422", "503", "504"} <= set(operation["responses"])
    assert "Idempotent-Replayed" in operation["responses"]["200"]["headers"]


def test_no_other_path_has_it(document: dict[str, Any]) -> None:
    having = {
        path
        for path, methods in document["paths"].items()
        for operation in methods.values()
        for one in operation.get("parameters", ())
        if one["name"] == "Idempotency-Key"
    }
    # tests/live/test_event_routes.py has the tests of the other one.
    assert having == {*REQUESTS, "/events/dead/{id}/requeue"}
