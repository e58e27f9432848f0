"""Generations as server-sent events: the events of each path, keys, errors and early ends."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.types import Scope

from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import DatabaseUnavailable, DeadlineExceeded, ModelUnavailable, QueueFull
from llm_sidecar.models.base import ChoiceScores, Delta, GenerationRequest
from llm_sidecar.models.fake import FakeModel
from llm_sidecar.settings import Settings
from osiris.server import create_app
from tests.unit.asgi import Reader, events_in, http_scope
from tests.unit.fakes import FakeSidecar, PausedModel, until
from tests.unit.services.samples import (
    CRITIQUE,
    PROPOSAL,
    SURE,
    UNGROUNDED,
    WRITTEN,
    fake_sidecar,
)
from tests.unit.test_idempotency import KEY, PROMPT, PROPOSE, app_with, asking, prepared

STREAM = {"Accept": "text/event-stream"}
BODY = json.dumps(PROMPT, separators=(",", ":")).encode()
"""The bytes that httpx sends."""
HALF = len(WRITTEN.text) // 2
"""Where the fake model splits its answer."""
WRITES = [
    ("token", {"text": WRITTEN.text[:HALF], "model": "phi3"}),
    ("token", {"text": WRITTEN.text[HALF:], "model": "phi3"}),
]
OF_PROPOSAL = {
    "X-Model": "phi3/fake",
    "X-Finish-Reason": "stop",
    "X-Prompt-Tokens": "7",
    "X-Completion-Tokens": "40",
    "X-Grounded": "true",
}
OF_ASSESSMENT = {
    "X-Hermes-Score": "0.750000",
    "X-Hermes-Answer-Mass": "1.000000",
    "X-Hermes-Score-Reliable": "true",
}


async def stream(made: FakeSidecar, path: str, headers: dict[str, str] | None = None) -> Any:
    """The events of a response with status 200."""
    async with asking(made) as asked:
        response = await asked.post(path, json=PROMPT, headers=STREAM | (headers or {}))
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events_in(response.content)


@pytest.mark.parametrize("path", ["/generate/", "/generate", "/generate/hermes/"])
async def test_free_text_streams_as_it_is_written(path: str) -> None:
    made = prepared("/generate/")
    assert await stream(made, path) == [
        ("token", {"text": "The targe", "model": "hermes"}),
        ("token", {"text": "t is thin.", "model": "hermes"}),
        (
            "headers",
            {
                "X-Model": "hermes/fake",
                "X-Finish-Reason": "stop",
                "X-Prompt-Tokens": "7",
                "X-Completion-Tokens": "9",
            },
        ),
        ("done", {"generated_text": "The target is thin."}),
    ]


@pytest.mark.parametrize("path", ["/generate/phi3/", "/generate/?model_id=phi3"])
async def test_a_proposal_streams_and_comes_whole_once_it_is_valid(path: str) -> None:
    assert await stream(fake_sidecar(), path) == [
        *WRITES,
        ("proposal", PROPOSAL),
        ("headers", OF_PROPOSAL),
        ("done", PROPOSAL),
    ]


async def test_a_proposal_with_its_critique_streams_both() -> None:
    made = fake_sidecar()
    events = await stream(made, PROPOSE)
    done = events[-1][1]
    assert events == [
        *WRITES,
        ("proposal", PROPOSAL),
        ("token", {"text": "The target is thin.", "model": "hermes"}),
        ("assessment", {"text": "The target is thin.", "score": 0.75}),
        ("headers", OF_PROPOSAL | OF_ASSESSMENT),
        ("done", done),
    ]
    assert done == {
        "transaction_id": str(uuid.UUID(done["transaction_id"])),
        "phi3_proposal": PROPOSAL,
        "hermes_assessment": "The target is thin.",
    }


@pytest.mark.parametrize("path", ["/generate/hermes/", "/generate/phi3/", PROPOSE])
async def test_the_last_events_are_the_answer_without_a_stream(path: str) -> None:
    made = prepared(path)
    made.hermes.answers *= 2
    made.phi3.answers = [UNGROUNDED, UNGROUNDED]
    made.store.full = DatabaseUnavailable("The disk is full.")
    events = await stream(made, path)
    async with asking(made) as asked:
        plain = await asked.post(path, json=PROMPT)
    (_, headers), (name, answer) = events[-2:]
    assert name == "done"
    assert answer | {"transaction_id": None} == plain.json() | {"transaction_id": None}
    assert answer.keys() == plain.json().keys()
    own = {name for name in plain.headers if name.startswith("x-")}
    left_out = {"x-request-id", "x-content-type-options"}
    assert {name.lower() for name in headers} == own - left_out
    assert all(plain.headers[name] == value for name, value in headers.items())


async def test_a_second_proposal_is_marked_where_it_begins() -> None:
    made = fake_sidecar(proposals={"grounding": "retry"})
    made.phi3.answers = [UNGROUNDED, WRITTEN]
    half = len(UNGROUNDED.text) // 2
    events = await stream(made, "/generate/phi3/")
    assert events[:-2] == [
        ("token", {"text": UNGROUNDED.text[:half], "model": "phi3"}),
        ("token", {"text": UNGROUNDED.text[half:], "model": "phi3"}),
        ("token", {"text": WRITTEN.text[:HALF], "model": "phi3", "restart": True}),
        ("token", {"text": WRITTEN.text[HALF:], "model": "phi3"}),
        ("proposal", PROPOSAL),
    ]


@pytest.mark.parametrize("late", [[], [Delta("", "phi3/fake")]])
async def test_a_second_proposal_that_has_no_text_marks_nothing(late: list[Delta]) -> None:
    made = fake_sidecar(proposals={"grounding": "retry"})
    made.phi3.answers = [UNGROUNDED, late or ModelUnavailable("phi3 is gone.")]
    events = await stream(made, PROPOSE)
    assert [name for name, _ in events] == [
        *("token", "token", "proposal", "token", "assessment", "headers", "done")
    ]
    assert all("restart" not in data for _, data in events)
    assert events[2][1]["ticker"] == "NEW"


async def test_a_delta_without_text_is_no_event() -> None:
    made = fake_sidecar()
    last = Delta("", "hermes/fake", finish_reason="stop")
    made.hermes.answers = [[Delta("", "hermes/fake"), Delta("A\r\nb", "hermes/fake"), last]]
    events = await stream(made, "/generate/hermes/")
    assert events[0] == ("token", {"text": "A\r\nb", "model": "hermes"})
    assert [name for name, _ in events] == ["token", "headers", "done"]


# Errors


@pytest.mark.parametrize("path", ["/generate/hermes/", "/generate/phi3/", PROPOSE])
async def test_an_error_before_the_first_event_has_its_own_status(path: str) -> None:
    made = fake_sidecar()
    full = QueueFull("The queue is full.", retry_after=7)
    made.hermes.answers, made.phi3.answers = [full], [full]
    async with asking(made) as asked:
        response = await asked.post(path, json=PROMPT, headers=STREAM)
    assert (response.status_code, response.headers["Retry-After"]) == (429, "7")
    assert response.json() == {"detail": "The queue is full."}


async def test_invalid_input_has_its_own_status() -> None:
    made = fake_sidecar(limits={"max_prompt_chars": 100})
    async with asking(made) as asked:
        for body in ({}, PROMPT | {"prompt": "x" * 101}):
            response = await asked.post(PROPOSE, json=body, headers=STREAM)
            assert response.status_code == 422
            assert response.headers["content-type"] == "application/json"


async def test_an_error_after_the_proposal_names_it() -> None:
    made = fake_sidecar()
    made.hermes.answers = [DeadlineExceeded("hermes is late.", retry_after=3)]
    events = await stream(made, PROPOSE)
    assert events[:-1] == [*WRITES, ("proposal", PROPOSAL)]
    name, error = events[-1]
    assert name == "error"
    (run,) = [row for kind, row in made.happened.of("row") if kind == "OrchestratorRunSchema"]
    assert error == {
        "detail": "hermes is late.",
        "transaction_id": run["run_id"],
        "status": 504,
        "retry_after": 3,
    }


async def test_an_error_without_a_stored_proposal_names_none() -> None:
    made = fake_sidecar()
    made.store.full = DatabaseUnavailable("The disk is full.")
    made.hermes.answers = [ModelUnavailable("hermes is gone.")]
    events = await stream(made, PROPOSE)
    assert events[-1] == ("error", {"detail": "hermes is gone.", "status": 503})


async def test_an_unexpected_error_says_no_more_than_its_id() -> None:
    made = fake_sidecar()
    made.hermes.answers = [KeyError("a secret")]
    reader = Reader(BODY)
    with pytest.raises(KeyError):
        await serving(made, reader, PROPOSE)
    assert events_in(reader.body)[-1] == (
        "error",
        {"detail": "An unexpected error occurred; the log has it under r-1.", "status": 500},
    )


async def test_a_shutdown_ends_a_stream_with_its_own_error() -> None:
    made, reader = FakeSidecar(phi3=PausedModel()), Reader(BODY)
    app = create_app(Settings.from_environ({}))
    called = scope(made, "/generate/phi3/", {})
    app.state.sidecar = made.sidecar
    running = asyncio.ensure_future(app(called, reader.receive, reader.send))
    await until(lambda: events_in(reader.body))
    app.state.shutdown.draining = True
    running.cancel()
    await running
    error = {"detail": "The server is shutting down; try again.", "status": 503, "retry_after": 5}
    assert events_in(reader.body) == [
        ("token", {"text": "{", "model": "phi3"}),
        ("error", error),
    ]
    assert reader.has_all


async def test_no_log_line_has_a_text(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    await stream(fake_sidecar(), PROPOSE)
    for text in ("The target is thin.", "Long ABC", "ticker"):
        assert text not in caplog.text


# Keys


async def test_a_stream_that_is_sent_again_gets_its_last_events() -> None:
    made = fake_sidecar()
    first = await stream(made, PROPOSE, KEY)
    happened = list(made.happened.log)
    async with asking(made) as asked:
        response = await asked.post(PROPOSE, json=PROMPT, headers=STREAM | KEY)
        plain = await asked.post(PROPOSE, json=PROMPT, headers=KEY)
    assert response.headers["Idempotent-Replayed"] == "true"
    (name, headers), done = events_in(response.content)
    assert (name, done) == ("headers", first[-1])
    assert headers == OF_PROPOSAL | OF_ASSESSMENT | {"Idempotent-Replayed": "true"}
    assert plain.headers["Idempotent-Replayed"] == "true"
    assert plain.json() == done[1]
    assert {name: plain.headers[name] for name in OF_ASSESSMENT} == OF_ASSESSMENT
    assert made.happened.log == [*happened, *[("metric", "replayed", None)] * 2]


async def test_a_stream_of_a_plain_answer_gets_its_last_events() -> None:
    made = fake_sidecar()
    async with asking(made) as asked:
        plain = await asked.post("/generate/phi3/", json=PROMPT, headers=KEY)
    events = await stream(made, "/generate/phi3/", KEY)
    replayed = {"Idempotent-Replayed": "true"}
    assert events == [("headers", OF_PROPOSAL | replayed), ("done", plain.json())]
    assert len(made.phi3.calls) == 1


async def test_another_request_with_the_same_key_is_422() -> None:
    made = fake_sidecar()
    await stream(made, PROPOSE, KEY)
    async with asking(made) as asked:
        other = PROMPT | {"max_length": 301}
        response = await asked.post(PROPOSE, json=other, headers=STREAM | KEY)
    assert response.status_code == 422


async def test_a_stream_after_a_failure_continues_with_the_stored_proposal() -> None:
    made = fake_sidecar()
    made.hermes.answers = [DeadlineExceeded("hermes is late."), CRITIQUE, SURE]
    late = await stream(made, PROPOSE, KEY)
    again = await stream(made, PROPOSE, KEY)
    assert [name for name, _ in again] == [*("proposal", "token", "assessment", "headers", "done")]
    assert again[1] == ("token", {"text": "The target is thin.", "model": "hermes"})
    assert again[-1][1]["transaction_id"] == late[-1][1]["transaction_id"]
    assert len(made.phi3.calls) == 1


async def test_a_stream_is_answered_even_if_its_key_is_not_kept() -> None:
    made = fake_sidecar()
    made.store.full = DatabaseUnavailable("The disk is full.")
    events = await stream(made, PROPOSE, KEY)
    (_, headers), (name, _) = events[-2:]
    assert (headers["X-Stored"], name) == ("false", "done")


class Steps(FakeModel):
    """Writes a text in four parts once `go` is set.

    Attributes:
        begun, closed: how many generations have begun, and have ended in any way.
        go: set it to continue.
    """

    def __init__(self, text: str = WRITTEN.text) -> None:
        super().__init__()
        self.begun = self.closed = 0
        self.go = asyncio.Event()
        self._text = text

    async def stream(
        self,
        request: GenerationRequest,
        deadline: Deadline | None = None,
        *,
        allow_partial: bool = False,
    ) -> AsyncGenerator[Delta, None]:
        self.begun += 1
        try:
            size = -(-len(self._text) // 4)
            for start in range(0, len(self._text), size):
                await self.go.wait()
                reason: Any = "stop" if start + size >= len(self._text) else None
                part = self._text[start : start + size]
                yield Delta(part, "steps/fake", finish_reason=reason)
                await asyncio.sleep(0)
        finally:
            self.closed += 1

    async def score_choices(self, *_: object) -> ChoiceScores:
        return SURE


def scope(made: FakeSidecar, path: str, headers: dict[str, str]) -> Scope:
    """The scope of a stream's request; the app gets this sidecar."""
    app_with("").state.sidecar = made.sidecar
    sent = STREAM | {"Content-Type": "application/json", "X-Request-ID": "r-1"} | headers
    raw = [(name.lower().encode(), value.encode()) for name, value in sent.items()]
    return http_scope(path, headers=raw)


def serving(
    made: FakeSidecar, reader: Reader, path: str, key: str = KEY["Idempotency-Key"]
) -> asyncio.Task[None]:
    """A request with a key."""
    called = scope(made, path, {"Idempotency-Key": key})
    app = app_with("")(called, reader.receive, reader.send)
    return asyncio.ensure_future(app)


async def test_a_stream_waits_for_the_same_request_that_still_runs() -> None:
    phi3, readers = Steps(), [Reader(BODY), Reader(BODY)]
    made = FakeSidecar(phi3=phi3)
    both = [serving(made, reader, "/generate/phi3/") for reader in readers]
    await until(lambda: phi3.begun)
    phi3.go.set()
    await asyncio.gather(*both)
    first, second = (events_in(reader.body) for reader in readers)
    assert phi3.closed == 1
    assert [name for name, _ in second] == ["headers", "done"]
    assert first[-1] == second[-1] == ("done", PROPOSAL)
    start = dict(readers[1].sent[0]["headers"])
    assert start[b"idempotent-replayed"] == b"true"


async def test_after_a_disconnect_the_next_request_begins() -> None:
    phi3, first, second = Steps(), Reader(BODY), Reader(BODY)
    made = FakeSidecar(phi3=phi3)
    leaving = serving(made, first, "/generate/phi3/")
    await until(lambda: phi3.begun)
    waiting = serving(made, second, "/generate/phi3/")
    first.disconnected.set()
    await leaving
    assert phi3.closed == 1
    phi3.go.set()
    await waiting
    assert events_in(second.body)[-1] == ("done", PROPOSAL)
    assert phi3.begun == 2


async def test_a_waiting_client_that_disconnects_claims_no_attempt() -> None:
    phi3, first, second = Steps(), Reader(BODY), Reader(BODY)
    made = FakeSidecar(phi3=phi3)
    running = serving(made, first, "/generate/phi3/")
    await until(lambda: phi3.begun)
    waiting = serving(made, second, "/generate/phi3/")
    for _ in range(20):
        await asyncio.sleep(0)
    second.disconnected.set()
    await waiting
    assert second.sent == []
    phi3.go.set()
    await running
    assert events_in(first.body)[-1] == ("done", PROPOSAL)
    assert made.store.claimed == set()


async def test_an_answer_is_kept_before_a_client_that_does_not_read_has_it() -> None:
    made = fake_sidecar()
    reader = Reader(BODY)
    reader.reads.clear()
    running = serving(made, reader, PROPOSE)
    await until(lambda: any(kept.response for kept in made.store.requests.values()))
    reader.disconnected.set()
    await running
    (kept,) = made.store.requests.values()
    done = (await stream(made, PROPOSE, KEY))[-1]
    assert json.loads(json.loads(kept.response or b"")["body"]) == done[1]
    assert len(made.phi3.calls) == 1


@pytest.mark.parametrize("end", ["disconnect", "cancel"])
@pytest.mark.parametrize("path", ["/generate/phi3/", PROPOSE])
async def test_whenever_a_stream_ends_its_key_is_free_and_its_models_are_closed(
    end: str, path: str
) -> None:
    phi3, hermes = Steps(), Steps(CRITIQUE.text)
    phi3.go.set()
    hermes.go.set()
    made, steps, complete = FakeSidecar(phi3=phi3, hermes=hermes), 0, False
    while not complete:
        reader = Reader(BODY)
        running = serving(made, reader, path, f"k-{steps}")
        for _ in range(steps):
            await asyncio.sleep(0)
        if end == "cancel":
            running.cancel()
        else:
            reader.disconnected.set()
        await asyncio.gather(running, return_exceptions=True)
        await made.sidecar._tasks.join()
        assert made.store.claimed == set(), steps
        assert (phi3.closed, hermes.closed) == (phi3.begun, hermes.begun), steps
        complete = b"event: done" in reader.body
        steps += 1
