"""The client's parser of a generation's events, and when it retries a stream."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from osiris.llm_client import Assessment, Done, LLMClientError, Proposal, Token
from osiris.llm_client.generation_events import GenerationFailed, GenerationParser

ANSWER = {"generated_text": "It is thin."}


def parser(content_type: str = "text/event-stream; charset=utf-8") -> GenerationParser:
    return GenerationParser(httpx.Response(200, headers={"Content-Type": content_type}))


def event(name: str, data: Any) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"event: {name}\r\ndata: {text}\r\n\r\n".encode()


STREAM = b"".join(
    (
        b": ping\r\n\r\n",
        event("token", {"text": "It is\u2028", "model": "phi3"}),
        event("token", {"text": "It", "model": "phi3", "restart": True}),
        event("proposal", {"ticker": "ABC"}),
        event("news", "not JSON"),
        event("assessment", {"text": "It is thin.", "score": 0.75}),
        event("headers", {"X-Model": "hermes/fake"}),
        event("done", ANSWER),
    )
)
PARSED = [
    Token("It is\u2028", "phi3"),
    Token("It", "phi3", restart=True),
    Proposal({"ticker": "ABC"}),
    Assessment("It is thin.", 0.75),
    Done(ANSWER, {"X-Model": "hermes/fake"}),
]


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_each_event_has_its_type_and_an_unknown_one_is_ignored(size: int) -> None:
    parsing = parser()
    found: list[Any] = []
    for start in range(0, len(STREAM), size):
        assert parsing.done is False
        found += parsing.feed(STREAM[start : start + size])
    assert found == PARSED
    assert parsing.done is True


def test_an_answer_without_headers_has_none() -> None:
    assert list(parser().feed(event("done", ANSWER))) == [Done(ANSWER, {})]


@pytest.mark.parametrize("content_type", ["", "application/json", "text/html"])
def test_another_answer_is_no_stream(content_type: str) -> None:
    with pytest.raises(LLMClientError, match=r"^the answer is not a stream of events$"):
        parser(content_type)


@pytest.mark.parametrize(
    "broken",
    [
        event("token", "{"),
        event("token", "[1]"),
        event("token", {"text": "It"}),
        event("assessment", "null"),
        event("error", {"detail": "It has no status."}),
        event("error", {"detail": "It is a text.", "status": "503"}),
        event("error", {"detail": "It is no error.", "status": 200}),
        event("done", "[" * 100_000),
    ],
)
def test_an_event_that_cannot_be_parsed_is_an_error(broken: bytes) -> None:
    with pytest.raises(LLMClientError, match=r"^an event of the stream cannot be parsed$"):
        list(parser().feed(broken))


def test_an_error_is_the_same_as_the_answer_without_a_stream() -> None:
    data = {"detail": "hermes is late.", "status": 504, "transaction_id": "t-1", "retry_after": 3}
    with pytest.raises(GenerationFailed) as caught:
        list(parser().feed(event("error", data)))
    answer = caught.value.answer
    assert (answer.status_code, answer.json()) == (504, data)
    assert answer.headers["Retry-After"] == "3"
    with pytest.raises(GenerationFailed) as caught:
        list(parser().feed(event("error", {"detail": "It failed.", "status": 500})))
    assert "Retry-After" not in caught.value.answer.headers


def test_a_stream_is_whole_with_its_last_event() -> None:
    parsing = parser()
    early = pytest.raises(httpx.RemoteProtocolError, match=r"^the stream ended before its last")
    with early, parsing.whole():
        list(parsing.feed(event("proposal", {})))
    with pytest.raises(httpx.ReadError, match="reset"), parsing.whole():
        raise httpx.ReadError("reset")
    with parsing.whole():
        list(parsing.feed(event("done", ANSWER)))
        raise httpx.ReadError("reset")
