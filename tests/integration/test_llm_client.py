"""The blocking and the async client against a real HTTP server that fails on command."""

from __future__ import annotations

import asyncio
import base64
import email.utils
import inspect
import json
import os
import socket
import struct
import sys
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from osiris.llm_client import (
    Assessment,
    AsyncLLMClient,
    Done,
    Event,
    LLMClient,
    LLMClientConnectionError,
    LLMClientError,
    LLMClientHTTPError,
    Proposal,
    Token,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC).timestamp()
WAV = b"RIFF\x00\x01\xff\xfeWAVE"

Client = LLMClient | AsyncLLMClient
T = TypeVar("T")


class Handler(BaseHTTPRequestHandler):
    """Records the request and does what the script has next, the last for ever."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ScriptedServer

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append(
            Seen(self.command, self.path, dict(self.headers), json.loads(body) if body else None)
        )
        script = self.server.script
        (script.pop(0) if len(script) > 1 else script[0])(self)

    do_DELETE = do_POST = do_GET  # noqa: N815 - the standard library's names

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing, where the standard library would print to standard error."""


Act = Callable[[Handler], None]


@dataclass
class Seen:
    """A request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


class ScriptedServer(ThreadingHTTPServer):
    """An HTTP server on a free loopback port; its closing waits for its handlers' end."""

    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[Seen] = []
        self.errors: list[BaseException | None] = []
        self.script: list[Act] = [answer(200, {})]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep what a handler raised for the test's end."""
        self.errors.append(sys.exception())


def answer(status: int, body: Any, **headers: str) -> Act:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    def act(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return act


def reset(handler: Handler) -> None:
    """Send the head and half of the body, then reset the connection."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b"{")
    _reset(handler)


def _reset(handler: Handler) -> None:
    linger = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.close_connection = True
    handler.connection.close()


def events(*lines: str, broken: bool = False) -> Act:
    """A stream of server-sent events, which ends well or is cut off."""

    def act(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for line in lines:
            data = f"{line}\n".encode()
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        if broken:
            handler.close_connection = True
        else:
            handler.wfile.write(b"0\r\n\r\n")

    return act


OK = answer(200, {"answer": 42})


@contextmanager
def running(server: ScriptedServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert not [error for error in server.errors if not isinstance(error, ConnectionError)]


@pytest.fixture(autouse=True)
def without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    made = ScriptedServer()
    with running(made):
        yield made


@dataclass
class Clients:
    """Makes clients of one kind, whose waits are noted and take no time."""

    kind: str
    url: str
    waits: list[float] = field(default_factory=list)
    made: list[Client] = field(default_factory=list)

    def __call__(self, **options: Any) -> Client:
        options = {"base_url": self.url, "clock": lambda: NOW, **options}
        client: Client
        if self.kind == "async":
            client = AsyncLLMClient(sleep=self._wait, **options)
        else:
            client = LLMClient(sleep=self.waits.append, **options)
        self.made.append(client)
        return client

    async def _wait(self, seconds: float) -> None:
        self.waits.append(seconds)


@pytest.fixture(params=["blocking", "async"])
async def clients(request: pytest.FixtureRequest, server: ScriptedServer) -> AsyncIterator[Clients]:
    clients = Clients(request.param, server.url)
    yield clients
    for client in clients.made:
        if isinstance(client, AsyncLLMClient):
            await client.aclose()
        else:
            client.close()


async def done(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


async def collect(stream: Iterator[T] | AsyncIterator[T], into: list[T]) -> None:
    if isinstance(stream, AsyncIterator):
        async for item in stream:
            into.append(item)
    else:
        into += stream


CALLS: dict[str, tuple[Callable[[Any], Any], tuple[str, str, Any]]] = {
    "generate": (
        lambda c: c.generate("phi3", "p", max_length=99),
        ("POST", "/generate/", {"prompt": "p", "max_length": 99, "model_id": "phi3"}),
    ),
    "propose": (
        lambda c: c.propose_trade_adjustments("p"),
        ("POST", "/propose_trade_adjustments/", {"prompt": "p", "max_length": 256}),
    ),
    "score": (
        lambda c: c.score_hermes({"ticker": "A"}),
        ("POST", "/score/hermes/", {"proposal": {"ticker": "A"}}),
    ),
    "score_context": (
        lambda c: c.score_hermes({"ticker": "A"}, "x"),
        ("POST", "/score/hermes/", {"proposal": {"ticker": "A"}, "context": "x"}),
    ),
    "feedback_whole": (
        lambda c: c.submit_feedback(
            "t",
            "correction",
            {"a": 1},
            timestamp=datetime(2026, 1, 2, tzinfo=UTC),
            corrected_proposal={"ticker": "A"},
            schema_version="1.1",
        ),
        (
            "POST",
            "/feedback/phi3/",
            {
                "transaction_id": "t",
                "feedback_type": "correction",
                "feedback_content": {"a": 1},
                "timestamp": "2026-01-02T00:00:00+00:00",
                "corrected_proposal": {"ticker": "A"},
                "schema_version": "1.1",
            },
        ),
    ),
    "withdrawal": (
        lambda c: c.withdraw_feedback("a/b c?/"),
        ("DELETE", "/feedback/a%2Fb%20c%3F%2F/", None),
    ),
    "examples": (lambda c: c.list_examples(), ("GET", "/examples/", None)),
    "dead letters": (
        lambda c: c.list_dead_letters(),
        ("GET", "/events/dead?limit=100", None),
    ),
    "older dead letters": (
        lambda c: c.list_dead_letters(7, "1-0"),
        ("GET", "/events/dead?limit=7&before=1-0", None),
    ),
    "requeued": (
        lambda c: c.requeue_dead_letter("1-0"),
        ("POST", "/events/dead/1-0/requeue", None),
    ),
    "an invalid id": (
        lambda c: c.requeue_dead_letter("a/b c?"),
        ("POST", "/events/dead/a%2Fb%20c%3F/requeue", None),
    ),
    "swap": (lambda c: c.swap_adapters(), ("POST", "/adapters/swap", None)),
    "swap to one": (
        lambda c: c.swap_adapters("20260102"),
        ("POST", "/adapters/swap", {"adapter": "20260102"}),
    ),
    "health": (lambda c: c.health(), ("GET", "/health", None)),
}


@pytest.mark.parametrize("name", CALLS)
async def test_a_call_sends_its_fields_and_returns_the_body_unchanged(
    clients: Clients, server: ScriptedServer, name: str
) -> None:
    call, (method, path, body) = CALLS[name]
    server.script = [OK]
    assert await done(call(clients())) == {"answer": 42}
    [seen] = server.seen
    assert (seen.method, seen.path, seen.body) == (method, path, body)


async def test_all_tries_of_one_feedback_have_one_timestamp(
    clients: Clients, server: ScriptedServer
) -> None:
    server.script = [reset, OK]
    assert await done(clients().submit_feedback("t", "rating", "good")) == {"answer": 42}
    [first, second] = server.seen
    assert first.body == second.body
    assert datetime.fromisoformat(first.body.pop("timestamp")).tzinfo is UTC
    assert first.body == {
        "transaction_id": "t",
        "feedback_type": "rating",
        "feedback_content": "good",
        "schema_version": "1.0",
    }


@pytest.mark.parametrize(
    ("timestamp", "sent"),
    [
        (datetime(2026, 1, 2, 9, 30), "2026-01-02T09:30:00+05:45"),  # noqa: DTZ001 - naive
        (datetime(2026, 1, 2, 9, 30, tzinfo=UTC), "2026-01-02T09:30:00+00:00"),
        ("2026-01-02T09:30:00", "2026-01-02T09:30:00"),
    ],
)
async def test_a_naive_datetime_is_sent_with_the_offset_of_this_machine(
    clients: Clients,
    server: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
    timestamp: datetime | str,
    sent: str,
) -> None:
    monkeypatch.setenv("TZ", "NPT-5:45")
    time.tzset()
    try:
        await done(clients().submit_feedback("t", "rating", "good", timestamp=timestamp))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert server.seen[0].body["timestamp"] == sent


POSTS: dict[str, Callable[..., Any]] = {
    "generate": lambda c, **key: c.generate("phi3", "p", **key),
    "propose": lambda c, **key: c.propose_trade_adjustments("p", **key),
    "score": lambda c, **key: c.score_hermes({}, **key),
    "feedback": lambda c, **key: c.submit_feedback("t", "rating", "good", **key),
    "swap": lambda c, **key: c.swap_adapters(**key),
    "requeue": lambda c, **key: c.requeue_dead_letter("1-0", **key),
}


@pytest.mark.parametrize("call", POSTS.values())
async def test_all_tries_of_a_post_share_an_idempotency_key_and_no_two_calls_do(
    clients: Clients, server: ScriptedServer, call: Callable[[Any], Any]
) -> None:
    server.script = [answer(503, {}), reset, OK]
    client = clients()
    await done(call(client))
    await done(call(client))
    keys = [uuid.UUID(seen.headers["Idempotency-Key"]) for seen in server.seen]
    assert keys[0] == keys[1] == keys[2] != keys[3]


@pytest.mark.parametrize("call", POSTS.values())
async def test_a_caller_may_give_the_idempotency_key(
    clients: Clients, server: ScriptedServer, call: Callable[..., Any]
) -> None:
    key = "!" * 254 + "~"
    for _ in range(2):
        await done(call(clients(), idempotency_key=key))
    first, again = server.seen
    assert first.headers["Idempotency-Key"] == again.headers["Idempotency-Key"] == key
    # Otherwise it would be another request.
    assert first.body == again.body


@pytest.mark.parametrize("key", ["", "two words", "line\n", "schlüssel", "k" * 256])
async def test_an_idempotency_key_that_the_server_refuses_is_not_sent(
    clients: Clients, server: ScriptedServer, key: str
) -> None:
    with pytest.raises(ValueError, match=r"^an idempotency key is 1 to 255 visible ASCII"):
        await done(clients().generate("phi3", "p", idempotency_key=key))
    assert server.seen == []


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.speak("hello"),
        lambda c: c.health(),
        lambda c: c.ready(),
        lambda c: c.withdraw_feedback("f"),
    ],
)
async def test_speech_and_what_is_no_post_has_no_idempotency_key(
    clients: Clients, server: ScriptedServer, call: Callable[[Any], Any]
) -> None:
    await done(call(clients()))
    assert "Idempotency-Key" not in server.seen[0].headers


async def test_speech_is_a_wav(clients: Clients, server: ScriptedServer) -> None:
    server.script = [answer(200, WAV, Content_Type="audio/wav")]
    assert await done(clients().speak("hello", ref_wav=WAV)) == WAV
    [seen] = server.seen
    ref_wav_b64 = base64.b64encode(WAV).decode()
    assert seen.body == {"text": "hello", "exaggeration": 0.5, "ref_wav_b64": ref_wav_b64}


async def test_metrics_are_text(clients: Clients, server: ScriptedServer) -> None:
    server.script = [answer(200, b"up 1\n", Content_Type="text/plain")]
    assert await done(clients().metrics()) == "up 1\n"


async def test_the_base_url_may_have_a_path(clients: Clients, server: ScriptedServer) -> None:
    await done(clients(base_url=f"{server.url}/sidecar/").health())
    assert server.seen[0].path == "/sidecar/health"


async def test_503_is_tried_again_after_the_seconds_it_asks_for(
    clients: Clients, server: ScriptedServer
) -> None:
    server.script = [answer(503, {"detail": "loading"}, Retry_After="7"), OK]
    assert await done(clients().health()) == {"answer": 42}
    assert clients.waits == [7.0]


async def test_429_is_tried_again_at_the_date_it_names(
    clients: Clients, server: ScriptedServer
) -> None:
    date = email.utils.format_datetime(datetime.fromtimestamp(NOW + 11, UTC), usegmt=True)
    server.script = [answer(429, {"detail": "full"}, Retry_After=date), OK]
    assert await done(clients().generate("hermes", "p")) == {"answer": 42}
    assert clients.waits == [11.0]


@pytest.mark.parametrize("value", ["soon", "-3", "", "Thu, 01 Jan 1970 00:00:00 GMT", "0"])
async def test_a_retry_after_that_says_nothing_leaves_the_backoff(
    clients: Clients, server: ScriptedServer, value: str
) -> None:
    server.script = [answer(503, {"detail": "loading"}, Retry_After=value), OK]
    await done(clients().health())
    assert len(clients.waits) == 1
    assert 0.25 <= clients.waits[0] <= 0.5


async def test_a_retry_after_of_hours_is_not_waited_for(
    clients: Clients, server: ScriptedServer
) -> None:
    server.script = [answer(503, {"detail": "down"}, Retry_After="7200")]
    with pytest.raises(LLMClientHTTPError) as caught:
        await done(clients().health())
    assert caught.value.retry_after == 7200
    assert (len(server.seen), clients.waits) == (1, [])


async def test_the_backoff_doubles_with_jitter_up_to_thirty_seconds(
    clients: Clients, server: ScriptedServer
) -> None:
    server.script = [answer(500, {"detail": "broken"})]
    with pytest.raises(LLMClientHTTPError):
        await done(clients(retries=8, backoff_factor=0.5).health())
    assert len(server.seen) == 9
    for wait, longest in zip(clients.waits, [0.5, 1, 2, 4, 8, 16, 30, 30], strict=True):
        assert longest / 2 <= wait <= longest


async def test_retries_are_further_tries_and_the_last_error_is_raised(
    clients: Clients, server: ScriptedServer
) -> None:
    server.script = [
        *[answer(500, {"detail": "first"})] * 2,
        answer(504, {"detail": "last"}, X_Request_ID="theirs"),
    ]
    with pytest.raises(LLMClientHTTPError, match="HTTP 504: last") as caught:
        await done(clients(retries=2).health())
    error = caught.value
    assert (error.status, error.detail, error.request_id) == (504, "last", "theirs")
    assert len(server.seen) == 3


async def test_an_error_names_the_proposal_that_is_stored(
    clients: Clients, server: ScriptedServer
) -> None:
    server.script = [answer(504, {"detail": "late", "transaction_id": "t-1"})]
    with pytest.raises(LLMClientHTTPError) as caught:
        await done(clients(retries=0).propose_trade_adjustments("Long ABC"))
    assert (caught.value.detail, caught.value.transaction_id) == ("late", "t-1")
    server.script = [answer(504, {"detail": "late"})]
    with pytest.raises(LLMClientHTTPError) as caught:
        await done(clients(retries=0).propose_trade_adjustments("Long ABC"))
    assert caught.value.transaction_id is None


async def test_no_retries_means_one_try(clients: Clients, server: ScriptedServer) -> None:
    server.script = [answer(500, {"detail": "broken"})]
    with pytest.raises(LLMClientHTTPError):
        await done(clients(retries=0).health())
    assert (len(server.seen), clients.waits) == (1, [])


@pytest.mark.parametrize("status", [401, 404, 409, 413, 422, 307])
async def test_other_errors_are_not_tried_again(
    clients: Clients, server: ScriptedServer, status: int
) -> None:
    detail = [{"loc": ["body", "prompt"], "msg": "missing"}]
    server.script = [answer(status, {"detail": detail})]
    with pytest.raises(LLMClientHTTPError) as caught:
        await done(clients().health())
    assert (caught.value.status, caught.value.detail) == (status, detail)
    assert len(server.seen) == 1


@pytest.mark.parametrize("page", [b"<h1>Bad Gateway</h1>", b"[1]", b'"text"', b"{}"])
async def test_the_detail_of_a_foreign_error_page_is_its_text(
    clients: Clients, server: ScriptedServer, page: bytes
) -> None:
    server.script = [answer(502, page)]
    with pytest.raises(LLMClientHTTPError) as caught:
        await done(clients(retries=0).health())
    assert caught.value.detail == page.decode()


async def test_a_connection_reset_midway_is_tried_again(
    clients: Clients, server: ScriptedServer
) -> None:
    server.script = [reset, OK]
    assert await done(clients().health()) == {"answer": 42}
    assert len(clients.waits) == 1


async def test_an_answer_that_does_not_come_in_time_is_tried_again(
    clients: Clients, server: ScriptedServer
) -> None:
    late = threading.Event()
    server.script = [lambda handler: _reset(handler) if late.wait(10) else None, OK]
    assert await done(clients(timeout=0.5).health()) == {"answer": 42}
    late.set()
    assert len(clients.waits) == 1


DEFAULT = {"connect": 5.0, "read": 75.0, "write": 75.0, "pool": 75.0}
SPEECH = {"connect": 5.0, "read": 135.0, "write": 135.0, "pool": 135.0}
PROBE = {"connect": 5.0, "read": 5.0, "write": 5.0, "pool": 5.0}
OURS = {"connect": 7.5, "read": 7.5, "write": 7.5, "pool": 7.5}
APART = {"connect": 1.0, "read": None, "write": 3.0, "pool": 4.0}


@pytest.mark.parametrize(
    ("given", "method", "arguments", "expected"),
    [
        (None, "generate", ("phi3", "p"), DEFAULT),
        (None, "propose_trade_adjustments", ("p",), DEFAULT),
        (None, "swap_adapters", (), DEFAULT),
        (None, "health", (), DEFAULT),
        (None, "speak", ("hello",), SPEECH),
        (None, "ready", (), PROBE),
        (None, "live", (), PROBE),
        (None, "stream_audio", (), DEFAULT | {"read": 60.0}),
        (None, "stream_events", (), DEFAULT | {"read": 60.0}),
        (7.5, "generate", ("phi3", "p"), OURS),
        (7.5, "speak", ("hello",), OURS),
        (7.5, "ready", (), OURS),
        (7.5, "stream_audio", (), OURS | {"read": 60.0}),
        (httpx.Timeout(**APART), "generate", ("phi3", "p"), APART),
    ],
)
async def test_each_request_has_its_default_timeout_or_the_callers(
    given: float | httpx.Timeout | None, method: str, arguments: tuple[str, ...], expected: Any
) -> None:
    seen: list[Any] = []

    def note(request: httpx.Request) -> httpx.Response:
        seen.append(request.extensions["timeout"])
        return httpx.Response(200, json={})

    transport = httpx.MockTransport(note)
    with LLMClient(timeout=given, transport=transport) as client:
        answer = getattr(client, method)(*arguments)
        if method.startswith("stream_"):
            list(answer)
    async with AsyncLLMClient(timeout=given, transport=transport) as async_client:
        answer = getattr(async_client, method)(*arguments)
        if method.startswith("stream_"):
            assert [item async for item in answer] == []
        else:
            await answer
    assert seen == [expected, expected]


async def test_a_proxy_of_the_environment_carries_the_requests(
    clients: Clients, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.url.replace("http://", "me:hunter2@"))
    server.script = [OK]
    client = clients(base_url="http://sidecar.example:8000/below", api_key="k")
    assert await done(client.health()) == {"answer": 42}
    [seen] = server.seen
    assert seen.path == "http://sidecar.example:8000/below/health"
    password = base64.b64encode(b"me:hunter2").decode()
    assert seen.headers["Proxy-Authorization"] == f"Basic {password}"
    assert seen.headers["Authorization"] == "Bearer k"


@pytest.mark.parametrize("no_proxy", ["127.0.0.1", "fe80::/10, 127.0.0.0/8", "*"])
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "socks5://127.0.0.1:1", "broken://"])
async def test_a_host_of_no_proxy_is_asked_directly(
    clients: Clients,
    server: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
    proxy: str,
    no_proxy: str,
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert await done(clients().health()) == {}
    assert [seen.path for seen in server.seen] == ["/health"]


async def test_an_unreachable_proxy_is_named(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://me:hunter2@127.0.0.1:1")
    with pytest.raises(LLMClientConnectionError) as caught:
        await done(clients(retries=0).health())
    assert str(caught.value).endswith(" (through the proxy that http_proxy names)")
    assert "hunter2" not in str(caught.value)


async def test_a_netrc_file_does_not_replace_the_key(
    clients: Clients, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login me password hunter2\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HOME", str(tmp_path))
    await done(clients(api_key="k").health())
    assert server.seen[0].headers["Authorization"] == "Bearer k"


async def test_a_key_is_sent_beside_a_password_of_the_url(
    clients: Clients, server: ScriptedServer
) -> None:
    url = server.url.replace("http://", "http://me:hunter2@")
    await done(clients(base_url=url, api_key="k").health())
    headers = server.seen[0].headers
    password = base64.b64encode(b"me:hunter2").decode()
    assert (headers["X-API-Key"], headers["Authorization"]) == ("k", f"Basic {password}")


async def test_a_redirect_is_an_error_and_the_key_goes_nowhere_else(
    clients: Clients, server: ScriptedServer
) -> None:
    elsewhere = ScriptedServer()
    with running(elsewhere):
        server.script = [answer(307, {}, Location=f"{elsewhere.url}/health")]
        with pytest.raises(LLMClientHTTPError, match="HTTP 307"):
            await done(clients(api_key="k").health())
    assert (len(server.seen), elsewhere.seen) == (1, [])


async def test_a_cancelled_call_ends_at_once_and_the_client_still_works(
    server: ScriptedServer,
) -> None:
    asked, go = threading.Event(), threading.Event()

    def wait(handler: Handler) -> None:
        asked.set()
        go.wait(10)
        _reset(handler)

    server.script = [wait, OK]
    async with AsyncLLMClient(server.url) as client:
        call = asyncio.ensure_future(client.generate("phi3", "p"))
        await asyncio.to_thread(asked.wait, 10)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        go.set()
        assert await client.health() == {"answer": 42}


async def test_an_unreachable_server_is_a_connection_error_after_all_tries(
    clients: Clients,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        client = clients(base_url=f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(LLMClientConnectionError, match="ConnectError") as caught:
            await done(client.health())
    assert isinstance(caught.value.__cause__, httpx.ConnectError)
    assert isinstance(caught.value, LLMClientError)
    assert len(clients.waits) == 3


async def test_a_sidecar_that_comes_while_it_is_waited_for_is_found(
    clients: Clients, server: ScriptedServer
) -> None:
    server.script = [reset, answer(503, {"detail": "loading"}), OK]
    assert await done(clients().health()) == {"answer": 42}
    assert len(clients.waits) == 2


async def test_all_tries_of_a_call_share_a_request_id_and_no_two_calls_do(
    clients: Clients, server: ScriptedServer
) -> None:
    client = clients()
    server.script = [answer(500, {}), answer(500, {}), OK]
    await done(client.health())
    await done(client.health())
    ids = [seen.headers["X-Request-ID"] for seen in server.seen]
    assert ids[0] == ids[1] == ids[2] != ids[3]


@pytest.mark.parametrize("body", [b"no json", b"[]", b"null", b"", b"\xff", b"[" * 100_000])
async def test_an_answer_that_is_no_json_object_is_an_error(
    clients: Clients, server: ScriptedServer, body: bytes
) -> None:
    server.script = [answer(200, body)]
    with pytest.raises(LLMClientError, match=r"not (a )?JSON"):
        await done(clients().health())
    assert len(server.seen) == 1


@pytest.mark.parametrize("probe", ["live", "ready"])
@pytest.mark.parametrize(("status", "expected"), [(200, True), (503, False)])
async def test_a_probe_asks_once(
    clients: Clients, server: ScriptedServer, probe: str, status: int, expected: bool
) -> None:
    server.script = [answer(status, {"detail": "hermes"}, Retry_After="1")]
    assert await done(getattr(clients(), probe)()) is expected
    assert [seen.path for seen in server.seen] == [f"/health/{probe}"]


async def test_a_probe_of_an_unreachable_server_is_false(clients: Clients) -> None:
    client = clients(base_url="http://127.0.0.1:1")
    assert await done(client.ready()) is False
    assert await done(client.live()) is False


async def test_a_probe_that_is_neither_ready_nor_unready_is_an_error(
    clients: Clients, server: ScriptedServer
) -> None:
    server.script = [answer(401, {"detail": "no key"})]
    with pytest.raises(LLMClientHTTPError):
        await done(clients().ready())


async def test_the_stream_yields_each_wav(clients: Clients, server: ScriptedServer) -> None:
    long = bytes(range(256)) * 2_000
    first, second = base64.b64encode(WAV).decode(), base64.b64encode(long).decode()
    server.script = [
        answer(503, {"detail": "starting"}),
        events(
            ": keep-alive",
            "",
            f"data: {first}",
            "",
            "event: lost",
            "data: 3",
            "",
            "event: audio",
            "id: 2",
            f"data:{second[:4]}",
            f"data:{second[4:]}",
            "",
            ": keep-alive",
            "",
        ),
    ]
    wavs: list[bytes] = []
    await collect(clients().stream_audio(), wavs)
    assert wavs == [WAV, long]
    assert [seen.path for seen in server.seen] == ["/stream/audio"] * 2


async def test_a_stream_that_breaks_is_an_error_after_what_came_whole(
    clients: Clients, server: ScriptedServer
) -> None:
    whole = base64.b64encode(WAV).decode()
    server.script = [events(f"data: {whole}", "", "data: UklG", broken=True)]
    wavs: list[bytes] = []
    with pytest.raises(LLMClientConnectionError):
        await collect(clients().stream_audio(), wavs)
    assert wavs == [WAV]


async def test_a_stream_that_is_refused_is_an_error_with_its_detail(
    clients: Clients, server: ScriptedServer
) -> None:
    server.script = [answer(401, {"detail": "no key"})]
    with pytest.raises(LLMClientHTTPError) as caught:
        await collect(clients().stream_audio(), [])
    assert caught.value.detail == "no key"


async def test_an_event_that_is_no_base64_is_an_error(
    clients: Clients, server: ScriptedServer
) -> None:
    server.script = [events("data: %%%", "")]
    with pytest.raises(LLMClientError, match="base64"):
        await collect(clients().stream_audio(), [])


async def test_the_stream_of_events_is_resumed_after_the_last_one(
    clients: Clients, server: ScriptedServer
) -> None:
    server.script = [
        answer(503, {"detail": "Redis is away"}),
        events(": ping", "", "id: 2-0", "event: phi3.proposal.created", 'data: "\u2028"', ""),
        events("event: gap", 'data: {"from": "2-0", "to": "9-0"}', "", "id: 9", broken=True),
    ]
    found: list[Event] = []
    client = clients()
    await collect(client.stream_events(), found)
    types = ["phi3.proposal.created", "phi3.proposal.assessed"]
    with pytest.raises(LLMClientConnectionError):
        await collect(client.stream_events(types, found[-1].id), found)
    assert found == [
        Event("2-0", "phi3.proposal.created", '"\u2028"'),
        Event(None, "gap", '{"from": "2-0", "to": "9-0"}'),
    ]
    path = "/events/?types=phi3.proposal.created%2Cphi3.proposal.assessed"
    assert [seen.path for seen in server.seen] == ["/events/", "/events/", path]
    assert [seen.headers.get("Last-Event-ID") for seen in server.seen] == [None, None, "2-0"]


def sent(name: str, data: Any) -> tuple[str, str, str]:
    """The lines of an event."""
    return f"event: {name}", f"data: {json.dumps(data)}", ""


TOKEN = sent("token", {"text": "It", "model": "hermes"})
DONE = sent("done", {"generated_text": "It"})
LATE = {"detail": "hermes is late", "status": 504, "transaction_id": "t-1", "retry_after": 7}
GENERATION = [Token("It", "hermes"), Done({"generated_text": "It"}, {})]


def streaming(client: Client, **key: str) -> Any:
    return client.stream_generate("hermes", "p", 99, **key)


async def test_a_stream_of_a_generation_yields_its_events(
    clients: Clients, server: ScriptedServer
) -> None:
    critique = {"text": "It is thin.", "score": 0.75}
    server.script = [
        events(
            *sent("token", {"text": "{", "model": "phi3", "restart": True}),
            *sent("proposal", {"ticker": "ABC"}),
            *sent("assessment", critique),
            *sent("headers", {"X-Model": "phi3/fake"}),
            *sent("done", {"transaction_id": "t-1"}),
        )
    ]
    found: list[Any] = []
    await collect(clients().stream_propose_trade_adjustments("p", idempotency_key="k-1"), found)
    assert found == [
        Token("{", "phi3", restart=True),
        Proposal({"ticker": "ABC"}),
        Assessment("It is thin.", 0.75),
        Done({"transaction_id": "t-1"}, {"X-Model": "phi3/fake"}),
    ]
    [seen] = server.seen
    assert (seen.method, seen.path) == ("POST", "/propose_trade_adjustments/")
    assert seen.body == {"prompt": "p", "max_length": 256}
    assert seen.headers["Accept"] == "text/event-stream"
    assert seen.headers["Idempotency-Key"] == "k-1"


async def test_a_stream_is_tried_again_until_its_first_event(
    clients: Clients, server: ScriptedServer
) -> None:
    server.script = [
        answer(503, {"detail": "loading"}, Retry_After="2"),
        events(*sent("error", LATE)),
        events(": ping", "", broken=True),
        events(),
        events(*TOKEN, *DONE),
    ]
    found: list[Any] = []
    await collect(streaming(clients(retries=4)), found)
    assert found == GENERATION
    assert clients.waits[0] == 2.0
    assert clients.waits[1] == 7.0
    assert len(clients.waits) == 4
    expected = {"prompt": "p", "max_length": 99, "model_id": "hermes"}
    assert [(seen.path, seen.body) for seen in server.seen] == [("/generate/", expected)] * 5
    assert len({seen.headers["Idempotency-Key"] for seen in server.seen}) == 1


@pytest.mark.parametrize("before", [(), TOKEN])
async def test_an_error_of_a_generation_is_that_of_the_answer_without_a_stream(
    clients: Clients, server: ScriptedServer, before: tuple[str, ...]
) -> None:
    server.script = [events(*before, *sent("error", LATE))]
    found: list[Any] = []
    with pytest.raises(LLMClientHTTPError, match=r"^HTTP 504: hermes is late \(request ") as caught:
        await collect(streaming(clients(retries=0 if not before else 3)), found)
    error = caught.value
    assert (error.status, error.detail, error.transaction_id, error.retry_after) == (
        *(504, "hermes is late", "t-1", 7.0),
    )
    assert error.request_id == server.seen[0].headers["X-Request-ID"]
    assert len(found) == bool(before)
    assert len(server.seen) == 1


async def test_a_refusal_as_the_first_event_is_not_tried_again(
    clients: Clients, server: ScriptedServer
) -> None:
    server.script = [events(*sent("error", {"detail": "too long", "status": 422}))]
    with pytest.raises(LLMClientHTTPError, match="HTTP 422: too long"):
        await collect(streaming(clients()), [])
    assert (len(server.seen), clients.waits) == (1, [])


@pytest.mark.parametrize("broken", [True, False])
async def test_a_generation_that_breaks_off_is_an_error_after_its_events(
    clients: Clients, server: ScriptedServer, broken: bool
) -> None:
    server.script = [events(*TOKEN, broken=broken)]
    found: list[Any] = []
    with pytest.raises(LLMClientConnectionError):
        await collect(streaming(clients()), found)
    assert found == GENERATION[:1]
    assert len(server.seen) == 1


async def test_a_connection_that_breaks_after_the_last_event_is_no_error(
    clients: Clients, server: ScriptedServer
) -> None:
    server.script = [events(*TOKEN, *DONE, broken=True)]
    found: list[Any] = []
    await collect(streaming(clients()), found)
    assert found == GENERATION


async def test_a_plain_answer_to_a_stream_is_an_error(
    clients: Clients, server: ScriptedServer
) -> None:
    server.script = [answer(200, {"generated_text": "It"}, Content_Type="application/json")]
    with pytest.raises(LLMClientError, match=r"^the answer is not a stream of events$"):
        await collect(streaming(clients()), [])


async def test_a_key_for_a_stream_is_checked_at_the_call(clients: Clients) -> None:
    with pytest.raises(ValueError, match=r"^an idempotency key is 1 to 255 visible ASCII"):
        streaming(clients(), idempotency_key="two words")


async def test_closing_a_stream_closes_its_connection(
    clients: Clients, server: ScriptedServer
) -> None:
    ended = threading.Event()

    def wait(handler: Handler) -> None:
        events(*TOKEN, broken=True)(handler)
        handler.wfile.flush()
        assert handler.connection.recv(1) == b""
        ended.set()

    server.script = [wait]
    stream = streaming(clients())
    if isinstance(stream, AsyncGenerator):
        async with aclosing(stream):
            assert await anext(stream) == GENERATION[0]
    else:
        with closing(stream):
            assert next(stream) == GENERATION[0]
    assert await asyncio.to_thread(ended.wait, 10)


async def test_the_api_key_goes_out_as_a_bearer_token_and_is_shown_nowhere(
    clients: Clients, server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    server.script = [answer(500, {}), OK]
    client = clients(api_key="s3cret")
    await done(client.health())
    assert server.seen[0].headers["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in repr(client) + str(vars(client)) + caplog.text


async def test_without_a_key_no_authorization_is_sent(
    clients: Clients, server: ScriptedServer
) -> None:
    await done(clients().health())
    assert "Authorization" not in server.seen[0].headers


@pytest.mark.parametrize("key", ["two words", "s3cret\n", "", "ключ"])
async def test_a_key_that_no_header_can_hold_is_refused_unrepeated(
    clients: Clients, key: str
) -> None:
    with pytest.raises(ValueError, match="API key") as caught:
        clients(api_key=key)
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": "localhost:8000"},
        {"base_url": "ftp://x"},
        {"base_url": "http://127.0.0.1:port"},
        {"timeout": 0},
        {"retries": -1},
        {"backoff_factor": -1},
    ],
)
async def test_an_argument_that_cannot_be_used_is_refused(
    clients: Clients, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError):
        clients(**options)


async def test_the_url_comes_from_the_environment_or_is_local(
    clients: Clients, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OSIRIS_SIDECAR_URL", server.url)
    assert await done(clients(base_url=None).ready())
    monkeypatch.delenv("OSIRIS_SIDECAR_URL")
    assert "http://localhost:8000" in repr(clients(base_url=None))


async def test_a_password_in_the_url_is_not_shown(clients: Clients) -> None:
    assert "hunter2" not in repr(clients(base_url="http://me:hunter2@127.0.0.1:1"))


async def test_a_context_manager_closes_the_client(server: ScriptedServer) -> None:
    with LLMClient(server.url) as client:
        client.health()
    with pytest.raises(RuntimeError, match="closed"):
        client.health()
    async with AsyncLLMClient(server.url) as async_client:
        await async_client.health()
    with pytest.raises(RuntimeError, match="closed"):
        await async_client.health()


async def test_a_transport_of_ones_own_carries_the_requests() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json={"by": "hand"}))
    with LLMClient(transport=transport) as client:
        assert client.health() == {"by": "hand"}
    async with AsyncLLMClient(transport=transport) as async_client:
        assert await async_client.health() == {"by": "hand"}
