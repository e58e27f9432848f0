"""Text from every way in, over HTTP, from Redis and from scripts, is checked at the edge."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import redis
from pydantic import ValidationError

from llm_sidecar import db
from llm_sidecar.db import HermesScoreSchema, OrchestratorRunSchema, Phi3FeedbackSchema
from llm_sidecar.errors import InvalidRequest, SettingsError
from llm_sidecar.event_bus import EventBus
from llm_sidecar.hermes_plugin import score_with_hermes
from llm_sidecar.tts import ChatterboxTTS
from tests.live_server import LiveServer, serve
from tests.redis_server import RedisServer, require_redis

LIMIT: Final = 300
"""MAX_PROMPT_CHARS of this module's server."""
CHANNEL: Final = "phi3.feedback.submitted"
NO_TEXT: Final = {
    "NUL": "Short XYZ\0 at 244",
    "escape": "शॉर्ट \x1b[31m XYZ",
    "delete": "價格\x7f",
    "next line": "اشترِ\x85 XYZ",
    "vertical tab first": "\x0bXYZ",
    "high surrogate": "🚀 \ud83d XYZ",
    "low surrogate last": "XYZ \ude80",
}
TEXTS: Final = {
    "lines": "one\r\n\ttwo\n",
    "bidirectional": "\u202eXYZ\u202c \u2066ABC\u2069",
    "unassigned": "XYZ \u0378 \U000e0fff",
    "scripts": "शॉर्ट XYZ, 價格 244, اشترِ, 🚀👩\u200d💻",
}
Make = Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class Way:
    """A field of a route.

    Attributes:
        make: the body with a text in that field.
        location: of an error in it.
        accepted: the status of a good text; this server has no models.
    """

    path: str
    make: Make
    location: tuple[str | int, ...]
    accepted: int


def feedback(**changes: Any) -> dict[str, Any]:
    given = {"transaction_id": "t", "feedback_type": "rating", "feedback_content": "good"}
    return given | changes


WAYS: Final = {
    "generate": Way("/generate/", lambda t: {"prompt": t}, ("prompt",), 503),
    "hermes": Way("/generate/hermes", lambda t: {"prompt": t}, ("prompt",), 503),
    "phi3": Way("/generate/phi3", lambda t: {"prompt": t}, ("prompt",), 503),
    "propose": Way("/propose_trade_adjustments", lambda t: {"prompt": t}, ("prompt",), 503),
    "context": Way(
        "/score/hermes", lambda t: {"proposal": {"a": 1}, "context": t}, ("context",), 503
    ),
    "scored field": Way(
        "/score/hermes", lambda t: {"proposal": {"rationale": t}}, ("proposal", "rationale"), 503
    ),
    "scored list": Way(
        "/score/hermes", lambda t: {"proposal": {"a": ["", {"b": t}]}}, ("proposal", "*", 1, "*"),
        503,
    ),
    "scored key": Way("/score/hermes", lambda t: {"proposal": {t: 1}}, ("proposal", "*"), 503),
    "transaction": Way(
        "/feedback/phi3", lambda t: feedback(transaction_id=t), ("transaction_id",), 200
    ),
    "feedback": Way(
        "/feedback/phi3", lambda t: feedback(feedback_content=t), ("feedback_content",), 200
    ),
    "feedback object": Way(
        "/feedback/phi3",
        lambda t: feedback(feedback_content={"a": [{"b": t}]}),
        ("feedback_content", "*", 0, "*"),
        200,
    ),
    "feedback key": Way(
        "/feedback/phi3",
        lambda t: feedback(feedback_content={"a": {t: None}}),
        ("feedback_content", "*", "*"),
        200,
    ),
    "correction": Way(
        "/feedback/phi3",
        lambda t: feedback(corrected_proposal={"ticker": "A", "rationale": t}),
        ("corrected_proposal", "rationale"),
        200,
    ),
    "version": Way(
        "/feedback/phi3", lambda t: feedback(schema_version=t), ("schema_version",), 200
    ),
    "speech": Way("/speak", lambda t: {"text": t}, ("text",), 200),
}  # fmt: skip


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    require_redis()
    with RedisServer() as running:
        yield running


@pytest.fixture(scope="module")
def server(
    redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server without models."""
    environ = {"REDIS_URL": redis_server.url, "MAX_PROMPT_CHARS": str(LIMIT)}
    with serve(tmp_path_factory.mktemp("edges"), **environ) as running:
        running.wait_until_database_is_open()
        yield running


def post(server: LiveServer, path: str, body: Any) -> tuple[int, list[dict[str, Any]]]:
    """The status, and the entries of an error."""
    # Half surrogate pairs are escaped, as a client may well send them.
    content = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    answer = server.client.post(path, content=content, headers=headers)
    return answer.status_code, answer.json()["detail"] if answer.status_code == 422 else []


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_is_no_text_is_422_and_names_the_field(server: LiveServer, way: Way) -> None:
    for text in NO_TEXT.values():
        status, entries = post(server, way.path, way.make(text))
        assert (status, [entry["loc"] for entry in entries]) == (422, [["body", *way.location]])


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_text_of_every_script_is_taken(server: LiveServer, way: Way) -> None:
    assert {post(server, way.path, way.make(text))[0] for text in TEXTS.values()} == {way.accepted}


@pytest.mark.parametrize(
    "name", ["generate", "propose", "context", "feedback", "speech", "scored field", "correction"]
)
def test_a_text_and_an_object_may_be_as_long_as_the_limit(server: LiveServer, name: str) -> None:
    way = WAYS[name]
    body = way.make("價")
    field = str(way.location[0])
    longest = LIMIT - (0 if len(way.location) == 1 else len(dumped(body[field])) - 1)
    assert post(server, way.path, way.make("價" * longest))[0] == way.accepted
    status, (entry,) = post(server, way.path, way.make("價" * (longest + 1)))
    assert (status, entry["loc"]) == (422, ["body", field])
    assert f"takes {LIMIT} characters" in entry["msg"]


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def test_a_key_of_the_callers_is_not_shown(server: LiveServer) -> None:
    body = {"proposal": {"SECRET": {"SECRET": "\0"}}, "SECRET": 1}
    status, entries = post(server, "/score/hermes", body)
    assert status == 422
    assert [entry["loc"] for entry in entries] == [["body", "proposal", "*", "*"], ["body", "*"]]
    assert "SECRET" not in str(entries)


@pytest.mark.parametrize(
    ("content", "location"),
    [
        (b'{"proposal": {"a": NaN}}', ["body", "proposal", "*"]),
        (b'{"proposal": {"a": [-1e999]}}', ["body", "proposal", "*", 0]),
        (b'{"proposal": {"a": "\xed\xa0\xbd"}}', ["body", "proposal", "*"]),
        (b'{"proposal": %s1%s}' % (b'{"a":' * 65, b"}" * 65), ["body", "proposal"]),
    ],
    ids=["not finite", "infinite", "surrogates in UTF-8", "nested"],
)
def test_what_python_reads_and_json_does_not_know_is_422(
    server: LiveServer, content: bytes, location: list[str | int]
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = server.client.post("/score/hermes", content=content, headers=headers)
    assert answer.status_code == 422
    assert [entry["loc"] for entry in answer.json()["detail"]] == [location]


# Redis


def bad_messages() -> dict[str, Any]:
    longest = LIMIT - len(dumped({"a": ""}))
    return {
        **{f"text, {name}": feedback(feedback_content=text) for name, text in NO_TEXT.items()},
        **{f"key, {name}": feedback(feedback_content={text: 1}) for name, text in NO_TEXT.items()},
        "correction": feedback(corrected_proposal={"rationale": "\0"}),
        "id": feedback(transaction_id="\0"),
        "a text too long": feedback(feedback_content="價" * (LIMIT + 1)),
        "an object too long": feedback(feedback_content={"a": "價" * (longest + 1)}),
        "an id too long": feedback(transaction_id="t" * (LIMIT + 1)),
        "a message too long": feedback(feedback_content="x" * (1 << 20)),
        "a number": feedback(feedback_content=7),
        "a list": [feedback()],
        "not finite": feedback(feedback_content={"a": float("inf")}),
        "an unknown field": feedback(other=1),
    }


def test_bad_messages_on_redis_are_refused_counted_and_logged_without_their_content(
    server: LiveServer, redis_server: RedisServer
) -> None:
    def counts() -> list[tuple[int, int, int]]:
        """Of each sidecar: the messages that it has refused, the errors, and its rows."""
        return [
            (
                health["event_bus"]["refused"],
                health["event_bus"]["handler_errors"],
                health["database"]["rows_written"],
            )
            for health in server.healths()
        ]

    def said(sidecar: LiveServer) -> list[str]:
        return [line["message"] for line in sidecar.log_lines() if CHANNEL in line["message"]]

    longest = {"a": "價" * (LIMIT - len(dumped({"a": ""})))}
    good = feedback(feedback_content="🚀" * LIMIT, corrected_proposal=longest)
    with contextlib.closing(redis.Redis(port=redis_server.port)) as stranger:
        sidecars = server.sidecars
        server.wait_until(lambda: stranger.pubsub_numsub(CHANNEL)[0][1] == len(sidecars))
        before, said_before = counts(), [len(said(sidecar)) for sidecar in sidecars]
        bad = bad_messages()
        for message in bad.values():
            stranger.publish(CHANNEL, json.dumps(message))
        stranger.publish(CHANNEL, "SECRET")
        # They are taken in order, so that the good one is the last.
        stranger.publish(CHANNEL, json.dumps(good))
        # Every sidecar has received all of them.
        expected = [(refused + len(bad) + 1, 0, rows + 1) for refused, _, rows in before]
        server.wait_until(lambda: counts() == expected)

    def have_said() -> bool:
        more = zip(sidecars, said_before, strict=True)
        return all(len(said(sidecar)) > earlier + len(bad) for sidecar, earlier in more)

    # Ray collects the logs of its processes.
    server.wait_until(have_said)
    for sidecar, earlier in zip(sidecars, said_before, strict=True):
        lines = said(sidecar)[earlier:]
        assert len(lines) == len(bad) + 1
        assert lines[0] == (
            f"a message on {CHANNEL} is refused: feedback_content: Text should have no control "
            "characters but tab, newline and carriage return; its character 10 is one"
        )
        assert lines[list(bad).index("a message too long")].endswith("is refused: it is too long")
    assert "SECRET" not in server.logged()


# Scripts

RUN: Final = {"run_id": "r", "input_query": "q", "final_output": "{}", "status": "success"}
SCORE: Final = {"run_id": "r", "score": 0.5}
HELPERS: Final[list[tuple[Callable[[Any], None], Any, dict[str, Any], str]]] = [
    (db.append_feedback, Phi3FeedbackSchema, feedback(), "transaction_id"),
    (db.append_feedback, Phi3FeedbackSchema, feedback(), "feedback_id"),
    (db.append_feedback, Phi3FeedbackSchema, feedback(), "feedback_content"),
    (db.append_feedback, Phi3FeedbackSchema, feedback(), "schema_version"),
    (db.log_run, OrchestratorRunSchema, RUN, "run_id"),
    (db.log_run, OrchestratorRunSchema, RUN, "input_query"),
    (db.log_run, OrchestratorRunSchema, RUN, "final_output"),
    (db.log_run, OrchestratorRunSchema, RUN, "status"),
    (db.log_run, OrchestratorRunSchema, RUN, "error_message"),
    (db.log_hermes_score, HermesScoreSchema, SCORE, "run_id"),
    (db.log_hermes_score, HermesScoreSchema, SCORE, "rationale"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where scripts would make a database."""
    monkeypatch.setenv("LANCEDB_URI", str(tmp_path / "db"))
    monkeypatch.setenv("MAX_PROMPT_CHARS", "20")
    return tmp_path / "db"


@pytest.mark.parametrize(("helper", "schema", "given", "field"), HELPERS)
def test_a_script_cannot_store_what_is_no_text(
    folder: Path, helper: Callable[[Any], None], schema: Any, given: dict[str, Any], field: str
) -> None:
    for text in NO_TEXT.values():
        with pytest.raises(ValidationError) as caught:
            helper(given | {field: text})
        assert [entry["loc"] for entry in caught.value.errors()] == [(field,)]
        with pytest.raises(ValidationError):
            schema(**given | {field: text})
    assert not folder.exists()


@pytest.mark.parametrize(("helper", "schema", "given", "field"), HELPERS)
def test_a_script_cannot_store_a_text_that_is_too_long(
    folder: Path, helper: Callable[[Any], None], schema: Any, given: dict[str, Any], field: str
) -> None:
    too_long = given | {field: "價" * 21}
    for row in (too_long, schema(**too_long)):
        with pytest.raises(ValidationError, match="takes 20 characters"):
            helper(row)
    assert not folder.exists()


def test_a_script_cannot_store_an_object_that_is_no_text_or_too_long(folder: Path) -> None:
    for content in ({"a": "\0"}, {"\x85": 1}, {"a": ["\ud83d"]}, {"a": "價" * 13}):
        for field in ("feedback_content", "corrected_proposal"):
            with pytest.raises(ValidationError, match=field):
                db.append_feedback(feedback(**{field: content}))
    assert not folder.exists()


def test_a_script_can_store_text_as_long_as_the_limit(folder: Path) -> None:
    text = "🚀價شॉ" * 4
    db.append_feedback(feedback(feedback_content=text, corrected_proposal={"a": "價" * 12}))
    assert (folder / "phi3_feedback.lance").is_dir()


def test_a_script_is_told_of_a_limit_that_is_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_PROMPT_CHARS", "many")
    # A bad value of another variable does no harm here.
    monkeypatch.setenv("QUEUE_LENGTH", "many")
    with pytest.raises(SettingsError, match=r"^MAX_PROMPT_CHARS='many' is not valid"):
        db.append_feedback(feedback())


def test_rows_of_the_server_itself_may_be_longer() -> None:
    long = "價" * (1 << 20)
    run = OrchestratorRunSchema(**RUN | {"final_output": long, "error_message": long})
    assert run.final_output == long


@pytest.mark.parametrize(
    ("proposal", "context", "where"),
    [
        ({"SECRET": "SECRET\0"}, None, "proposal.*"),
        ({"ticker": "A"}, "SECRET\ud83d", "context"),
        ({"ticker": "A"}, "SECRET" * 10_000, "context"),
    ],
)
def test_a_script_cannot_have_scored_what_is_no_text(
    caplog: pytest.LogCaptureFixture, proposal: dict[str, Any], context: str | None, where: str
) -> None:
    with caplog.at_level(logging.ERROR):
        assert score_with_hermes(proposal, context) == -1.0
    assert f"scoring failed: {where}: " in caplog.text
    assert "SECRET" not in caplog.text


@pytest.mark.parametrize("text", ["SECRET\0", "SECRET\ud83d", "SECRET " * 10_000])
async def test_a_script_cannot_have_spoken_what_is_no_text(tmp_path: Path, text: str) -> None:
    bus = EventBus("memory://")
    voice = ChatterboxTTS(tmp_path, "cpu", bus)
    try:
        with pytest.raises(InvalidRequest, match=r"^text: Text ") as caught:
            await voice.synth(text)
    finally:
        await voice.close()
        await bus.close()
    assert "SECRET" not in caught.value.detail
