"""Nothing quotes a request: a mark goes through every route and every field, and is looked for in
answers, log, spans and Sentry events.

Routes and fields are those of the server's OpenAPI document, so that a new one is tested as well.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import redis

from tests.live_server import LiveServer, serve
from tests.receiver import Receiver
from tests.redis_server import RedisServer, require_redis

MARK: Final = "ZXQMARK"
FAILING: Final = "/fail/{what}"
"""A route of the test's app whose error quotes what was sent."""
CHANNEL: Final = "phi3.feedback.submitted"
HEADERS: Final = {
    "X-Request-ID": f"{MARK} {MARK}",  # one with a space in it is replaced
    "Authorization": f"Bearer {MARK}",
    "X-API-Key": MARK,
    "User-Agent": f"{MARK}/1.0",
    "Cookie": f"session={MARK}",
    "Referer": f"http://{MARK}/",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "tracestate": f"vendor={MARK}",
    "baggage": f"key={MARK}",
}
CLOSE: Final = {"Connection": "close"}
JSON: Final = {"Content-Type": "application/json"}
TOO_LONG: Final = MARK * 6000
NO_TEXT: Final = ("\0", "\x1b", "\x7f", "\x85", "\ud83d", "\udc00")
BODIES: Final = {
    "no JSON": MARK.encode(),
    "half an object": b'{"%s": ' % MARK.encode(),
    "a bad escape": b'{"prompt": "\\x%s"}' % MARK.encode(),
    "a string": b'"%s"' % MARK.encode(),
    "a list": b'["%s"]' % MARK.encode(),
    "no UTF-8": b'{"prompt": "\xff%s"}' % MARK.encode(),
    "surrogates in UTF-8": b'{"%s": "\xed\xa0\xbd%s"}' % (MARK.encode(), MARK.encode()),
    "a number too long": b'{"%s": %s}' % (MARK.encode(), b"9" * 5000),
    "nested without end": b'{"%s":' % MARK.encode() + b"[" * 100_000,
}
UNREAD: Final = ("too long", "a long object", "many values")
"""Kinds of values that are valid in an ignored field, or in a field whose length is limited
together with that of others."""
SHORT: Final = ("max_tokens", "max_output_tokens")
"""Fields that end a free text, which would have a thousand tokens."""
FAILING_ENGINE: Final = """
import llm_sidecar.engines as engines

load_engine = engines.load_engine

class Failing:
    def __init__(self, engine):
        self._engine = engine

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def score_choices(self, messages, choices):
        raise RuntimeError(f"cannot read {messages}")

    def batch(self):
        batch = self._engine.batch()

        class FailingBatch(type(batch)):
            def add(self, number, request):
                raise RuntimeError(f"cannot read {request}")

        batch.__class__ = FailingBatch
        return batch

engines.load_engine = lambda *args, **options: Failing(load_engine(*args, **options))
"""
"""Python imports `sitecustomize` in every process: the worker's engine fails as a runtime does that
quotes its input."""


@dataclass
class Attempt:
    """One request, and the status that it should have, where that is certain."""

    name: str
    method: str
    path: str
    status: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


class Document:
    """Attempts for everything that an OpenAPI document describes."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document

    def fewer_attempts(self) -> Iterator[Attempt]:
        """Those that reach models and database, and one of each operation that is refused."""
        refused = set()
        for attempt in self.attempts():
            operation = attempt.method, attempt.path
            if attempt.status is None or operation not in refused:
                yield attempt
            if attempt.status is not None:
                refused.add(operation)

    def attempts(self) -> Iterator[Attempt]:
        """All."""
        yield Attempt("unknown path", "GET", f"/{MARK}", 404)
        for path, operations in self._document["paths"].items():
            yield Attempt(f"TRACE {path}", "TRACE", _filled(path), 405)
            for method, operation in operations.items():
                if path in ("/stream/audio", "/events/"):  # they never end
                    continue
                for attempt in self._of_operation(method.upper(), path, operation):
                    if path == FAILING:
                        # It checks nothing. After its error uvicorn ends the connection.
                        attempt.status = None
                        attempt.options["headers"] = CLOSE | attempt.options.get("headers", {})
                    yield attempt

    def names(self) -> Iterator[str]:
        """Those of fields and parameters."""
        for schema in self._document["components"]["schemas"].values():
            yield from schema.get("properties", {})
        for operations in self._document["paths"].values():
            for operation in operations.values():
                yield from (parameter["name"] for parameter in operation.get("parameters", ()))

    def _of_operation(self, method: str, path: str, operation: dict[str, Any]) -> Iterator[Attempt]:
        content = operation.get("requestBody", {}).get("content", {})
        schema = self._resolved(content.get("application/json", {}).get("schema", {}))
        base: Any = self._smallest(schema) if content else None

        def attempt(name: str, status: int | None = None, **options: Any) -> Attempt:
            if status == 422 and path.startswith("/v1/"):
                status = 400
            return Attempt(f"{method} {path}: {name}", method, _filled(path), status, options)

        def body(name: str, value: Any, status: int | None = None) -> Attempt:
            encoded = json.dumps(value).encode()
            return attempt(name, status, content=encoded, headers=JSON)

        for parameter in operation.get("parameters", ()):
            name = parameter["name"]
            if parameter["in"] == "query":
                yield attempt(f"query, {name}", params={name: MARK}, json=base)
                yield attempt(f"query, {name}, NUL", 422, params={name: f"{MARK}\0"}, json=base)
            elif parameter["in"] == "path":
                yield attempt(f"path, {name}", json=base)
                nul = attempt(f"path, {name}, NUL", 422, json=base)
                nul.path = _filled(path, f"{MARK}%00")
                yield nul
        yield attempt("unknown parameter", params={MARK: MARK}, json=base)
        if not content:
            return
        for name, raw in BODIES.items():
            yield attempt(name, 422, content=raw, headers=JSON)
        yield attempt("a form", 415, data={"prompt": MARK, MARK: MARK})
        ignores_unknown = path.startswith("/v1/")
        yield body("unknown field", base | {MARK: MARK}, None if ignores_unknown else 422)
        for field_name, described in schema["properties"].items():
            for kind, status, value in self._values(described):
                if ignores_unknown and kind in UNREAD:
                    status = None
                yield body(f"{field_name}, {kind}", base | {field_name: value}, status)

    def _values(self, schema: dict[str, Any]) -> Iterator[tuple[str, int | None, Any]]:
        """(what it is, the status it should have, value) for a field."""
        kinds = self._types(schema)
        yield "a list", None if "array" in kinds else 422, [MARK]
        if "object" not in kinds:
            yield "an object", 422, {MARK: MARK}
        if "string" not in kinds:
            yield "a string", 422, MARK
        else:
            yield "a mark", None, MARK
            yield "base64 of a mark", None, base64.b64encode(MARK.encode() * 99).decode()
            yield "too long", 422, TOO_LONG
            for character in NO_TEXT:
                yield f"with {character!a}", 422, f"{MARK}{character}{MARK}"
        if "object" in kinds:
            nested: Any = MARK
            for _ in range(100):
                nested = {MARK: nested}
            yield "an object", None, {MARK: {MARK: [MARK]}}
            yield "nested", 422, nested
            yield "a long object", 422, {MARK: {"a": TOO_LONG, "b": [MARK]}}
            yield "many values", 422, {MARK: [MARK] * 10_000}
            yield "not finite", 422, {MARK: {MARK: float("nan")}}
            for character in NO_TEXT:
                yield f"value with {character!a}", 422, {MARK: [{MARK: MARK + character}]}
                yield f"key with {character!a}", 422, {MARK: {MARK + character: 1}}

    def _types(self, schema: dict[str, Any]) -> set[str]:
        if "anyOf" in schema:
            return set().union(*map(self._types, schema["anyOf"]))
        return {self._resolved(schema).get("type", "")}

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Without references, and the first of several choices."""
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            found: dict[str, Any] = self._document["components"]["schemas"][name]
            return found
        return self._resolved(schema["anyOf"][0]) if "anyOf" in schema else schema

    def _smallest(self, schema: dict[str, Any]) -> Any:
        """A valid value."""
        schema = self._resolved(schema)
        if "enum" in schema:
            return schema["enum"][0]
        if schema.get("type") == "array":
            return [self._smallest(schema["items"])]
        if schema.get("type") == "object":
            if "properties" not in schema:
                return {"ticker": "ABC"}
            required, properties = schema.get("required", ()), schema["properties"]
            made = {name: self._smallest(properties[name]) for name in required}
            return made | {name: 16 for name in SHORT if name in properties}
        assert schema.get("type") == "string", f"a value for {schema} is needed here"
        # Another model would not be found.
        return "hermes" if schema.get("title") == "Model" else "Long ABC from 100."


def _filled(path: str, value: str = MARK) -> str:
    """A path with a value for its parameters."""
    return re.sub(r"\{\w+\}", value, path)


@dataclass
class Sent:
    """The result of everything that was sent.

    Attributes:
        document: the server's.
        answers: attempts with their answers.
        outputs: what was written where, in bytes.
        refused: how many messages on Redis were refused, of how many bad ones.
        said: the messages of the sidecars' logs.
    """

    document: Document
    answers: list[tuple[Attempt, httpx.Response]]
    outputs: dict[str, bytes]
    refused: tuple[int, int]
    said: list[str]


@pytest.fixture(scope="module", params=["whole", "failing"])
def sent(
    request: pytest.FixtureRequest,
    random_models: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Sent:
    """Everything, sent to a server that works; and what is not refused before that, sent to one
    whose engines and database fail."""
    require_redis()
    fails = request.param == "failing"
    folder = tmp_path_factory.mktemp(request.param)
    with Receiver() as traces, Receiver() as sentry, RedisServer() as redis_server:
        environ = {
            **random_models,
            "REDIS_URL": redis_server.url,
            "MODEL_LOAD_WAIT_SECONDS": "60",
            "ENABLE_METRICS": "true",
            "ENABLE_PROFILING": "true",
            "LOG_FORMAT": "json",
            "OTEL_EXPORTER_OTLP_ENDPOINT": traces.url,
            "SENTRY_DSN": f"http://key@127.0.0.1:{sentry.port}/42",
            "SENTRY_TRACES_SAMPLE_RATE": "1",
        }
        if fails:
            (folder / "file").write_text("in the way")
            environ["LANCEDB_URI"] = str(folder / "file" / "db")
            (folder / "sitecustomize.py").write_text(FAILING_ENGINE)
            root = Path(__file__).resolve().parents[2]
            environ["PYTHONPATH"] = f"{folder}:{root}"
        with serve(folder, app="tests.failing_app:app", **environ) as server:
            document = Document(server.client.get("/openapi.json").json())
            attempts = document.fewer_attempts() if fails else document.attempts()
            answers = list(send(server, attempts))
            refused = publish_what_is_bad(server, redis_server)
            for process in (*server.sidecars, server):
                process.stop()
        return Sent(
            document,
            answers,
            {
                "log": server.logged().encode(),
                "spans": traces.bytes,
                "Sentry events": sentry.bytes,
            },
            refused,
            [line["message"] for sidecar in server.sidecars for line in sidecar.log_lines()],
        )


def send(
    server: LiveServer, attempts: Iterator[Attempt]
) -> Iterator[tuple[Attempt, httpx.Response]]:
    with httpx.Client(base_url=server.url, timeout=60, headers=HEADERS) as client:
        for attempt in attempts:
            yield attempt, client.request(attempt.method, attempt.path, **attempt.options)


def publish_what_is_bad(server: LiveServer, redis_server: RedisServer) -> tuple[int, int]:
    """Returns how many messages were refused, and how many bad ones were received, which each
    sidecar does."""
    good = {"transaction_id": MARK, "feedback_type": "rating", "feedback_content": MARK}
    bad: list[bytes] = [
        *BODIES.values(),
        json.dumps(good | {"feedback_content": "x" * (1 << 21) + MARK}).encode(),
        json.dumps(good | {MARK: MARK}).encode(),
    ]
    for character in NO_TEXT:
        for content in (MARK + character, {MARK: MARK + character}, {MARK + character: MARK}):
            bad.append(json.dumps(good | {"feedback_content": content}).encode())
    bad += [
        json.dumps(good | {name: value}).encode()
        for name in good
        for value in ([MARK], {MARK: f"{MARK}\0"}, f"{MARK}\0")
    ]

    def refused() -> int:
        return server.total("event_bus", "refused")

    sidecars = len(server.sidecars)
    with contextlib.closing(redis.Redis(port=redis_server.port)) as stranger:
        server.wait_until(lambda: stranger.pubsub_numsub(CHANNEL)[0][1] == sidecars)
        for payload in bad:
            stranger.publish(CHANNEL, payload)
        stranger.publish(CHANNEL, json.dumps(good))
        server.wait_until(lambda: refused() >= sidecars * len(bad), 20)
    return refused(), sidecars * len(bad)


def test_answers_that_refuse_quote_nothing(sent: Sent) -> None:
    quoting = [
        (attempt.name, answer.status_code, answer.text[:200])
        for attempt, answer in sent.answers
        if answer.is_error and MARK in answer.text + str(answer.headers)
    ]
    assert quoting == []


def test_what_is_invalid_is_refused(sent: Sent) -> None:
    wrong = [
        (attempt.name, answer.status_code, answer.text[:200])
        for attempt, answer in sent.answers
        if attempt.status not in (None, answer.status_code)
    ]
    assert wrong == []


def test_nothing_fails_but_the_route_that_is_to_fail(sent: Sent) -> None:
    failed = {attempt.path for attempt, answer in sent.answers if answer.status_code == 500}
    assert failed <= {_filled(FAILING), _filled(FAILING, f"{MARK}%00")}


def test_a_location_is_made_of_the_documents_names_and_of_indexes(sent: Sent) -> None:
    sources = {"body", "path", "query", "header", "cookie"}
    known = {"*", *sources, *sent.document.names()}
    unknown = {
        part
        for _, answer in sent.answers
        if answer.status_code == 422 and isinstance(answer.json().get("detail"), list)
        for entry in answer.json()["detail"]
        for part in entry["loc"]
        if not isinstance(part, int) and part not in known
    }
    assert unknown == set()
    params = {
        name
        for _, answer in sent.answers
        if answer.status_code == 400 and (param := answer.json()["error"]["param"])
        for name in re.split(r"[.\[\]]+", param)
        if name and not name.isdigit() and name not in known
    }
    assert params == set()


@pytest.mark.parametrize("output", ["log", "spans", "Sentry events"])
def test_what_the_server_writes_quotes_nothing(sent: Sent, output: str) -> None:
    written = sent.outputs[output]
    # It has seen the requests.
    assert b"/score/hermes/" in written
    at = written.find(MARK.encode())
    assert at < 0, written[max(0, at - 500) : at + 200]


def test_every_bad_message_on_redis_is_refused_and_counted(sent: Sent) -> None:
    counted, bad = sent.refused
    assert counted == bad
    assert sum(" is refused: " in message for message in sent.said) == bad
