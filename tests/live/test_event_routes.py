"""`/events/`, over HTTP against a running server with a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx
import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from starlette.types import Message

from llm_sidecar.event_bus.followed_stream import FollowedStream
from llm_sidecar.services.event_feed import EventFeed
from llm_sidecar.settings import Settings
from llm_sidecar.sidecar import Sidecar
from osiris.llm_client import LLMClient
from osiris.routes import events
from osiris.server import create_app
from tests.in_process import in_process
from tests.live_server import LiveServer, free_port, serve

STREAM, DEAD, INBOX = "osiris.events", "osiris.inbox.dead", "osiris.inbox"
CREATED, ASSESSED = "phi3.proposal.created", "phi3.proposal.assessed"
BLIND: Final = ("blind", "on", ">secret-4711", "+@all", "~other", "allchannels")
"""A user of Redis with all permissions except those for the stream."""


@pytest.fixture(scope="module")
def streaming(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server without models, with few listeners."""
    folder = tmp_path_factory.mktemp("events")
    with (
        serve(folder, REDIS_URL=redis_url, MAX_EVENT_LISTENERS="2") as running,
        Redis.from_url(redis_url) as client,
    ):
        running.wait_until(lambda: client.exists(INBOX))
        yield running


@pytest.fixture
def redis(redis_url: str) -> Iterator[Any]:
    """A client of the server's Redis, without any stream."""
    with Redis.from_url(redis_url, decode_responses=True) as client:
        client.delete(STREAM)
        yield client


class Event(NamedTuple):
    """A server-sent event, without the empty lines around it."""

    id: str | None
    event: str
    data: str


def add(redis: Any, data: str, event: str = CREATED) -> str:
    """Adds an event; returns its id."""
    added: str = redis.xadd(STREAM, {"type": event, "data": data})
    return added


@contextlib.contextmanager
def listener(server: LiveServer, types: str = "", after: str = "") -> Iterator[Iterator[Event]]:
    """The events of a stream that has begun."""
    params = {"types": types} if types else {}
    headers = {"Last-Event-ID": after} if after else {}
    url = f"{server.url}/events/"
    with httpx.stream("GET", url, params=params, headers=headers, timeout=10) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        yield parsed(response.iter_lines())


def parsed(lines: Iterator[str]) -> Iterator[Event]:
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(": ")
        if name and colon:
            fields[name] = value
        elif not line and "data" in fields:
            yield Event(fields.get("id"), fields["event"], fields["data"])
            fields = {}


def test_every_listener_gets_every_event_as_it_is_added(streaming: LiveServer, redis: Any) -> None:
    add(redis, "before")
    with listener(streaming) as one, listener(streaming) as two:
        first = Event(add(redis, '{"n": 1}'), CREATED, '{"n": 1}')
        assert next(one) == next(two) == first
        second = Event(add(redis, '{"n": 2}', ASSESSED), ASSESSED, '{"n": 2}')
        assert next(one) == next(two) == second


def test_types_choose_the_events(streaming: LiveServer, redis: Any) -> None:
    with listener(streaming, ASSESSED) as one, listener(streaming, f"{CREATED},{ASSESSED}") as two:
        ids = [add(redis, "1"), add(redis, "2", ASSESSED), add(redis, "3", "made.elsewhere")]
        ids.append(add(redis, "4", ASSESSED))
        chosen = [Event(ids[1], ASSESSED, "2"), Event(ids[3], ASSESSED, "4")]
        assert [next(one) for _ in range(2)] == chosen
        assert [next(two) for _ in range(3)] == [Event(ids[0], CREATED, "1"), *chosen]


def test_a_listener_resumes_after_the_last_event_that_it_has(
    streaming: LiveServer, redis: Any
) -> None:
    ids = [add(redis, str(n)) for n in range(40)]
    with listener(streaming, after=ids[2]) as resumed, listener(streaming, after="0-0") as whole:
        ids.append(add(redis, "40"))
        assert [next(resumed).id for _ in range(38)] == ids[3:]
        assert [next(whole).id for _ in range(41)] == ids


def test_the_python_client_resumes_the_stream(streaming: LiveServer, redis: Any) -> None:
    with LLMClient(streaming.url) as client:
        assert client.list_dead_letters(1, "0-0") == {"items": [], "next": None}
        first = add(redis, '{"n": "\u2028"}')
        stream = client.stream_events(last_event_id="0-0")
        assert next(stream) == (first, CREATED, '{"n": "\u2028"}')
        stream.close()  # type: ignore[attr-defined]
        add(redis, "2")
        third = add(redis, "3", ASSESSED)
        assert next(client.stream_events([ASSESSED], first)) == (third, ASSESSED, "3")


def test_a_listener_whose_next_event_is_gone_gets_a_gap_first(
    streaming: LiveServer, redis: Any
) -> None:
    ids = [add(redis, str(n)) for n in range(4)]
    redis.xtrim(STREAM, 2, approximate=False)
    with listener(streaming, ASSESSED, ids[0]) as resumed:
        add(redis, "5", ASSESSED)
        assert next(resumed) == Event(None, "gap", f'{{"from": "{ids[0]}", "to": "{ids[2]}"}}')
        assert next(resumed).data == "5"


def test_a_listener_of_another_redis_gets_a_gap_and_new_events(
    streaming: LiveServer, redis: Any
) -> None:
    last = add(redis, "1")
    with listener(streaming, after="9999999999999-7") as resumed:
        expected = Event(None, "gap", f'{{"from": "9999999999999-7", "to": "{last}"}}')
        assert next(resumed) == expected
        added = add(redis, "2")
        assert next(resumed) == Event(added, CREATED, "2")


@pytest.mark.parametrize("types", ["", "phi3.proposal", f"{CREATED},", f"{CREATED},audio.bytes"])
def test_an_unknown_type_is_422_and_the_known_ones_are_named(
    streaming: LiveServer, types: str
) -> None:
    response = streaming.client.get("/events/", params={"types": types})
    assert response.status_code == 422
    (entry,) = response.json()["detail"]
    assert entry["loc"] == ["query", "types"]
    assert CREATED in entry["msg"]
    assert "phi3.feedback.submitted" in entry["msg"]


@pytest.mark.parametrize("last", ["1", "$", "1-0-0", "1-99999999999999999999", "a-b"])
def test_a_last_event_id_that_is_no_id_is_422(streaming: LiveServer, last: str) -> None:
    response = streaming.client.get("/events/", headers={"Last-Event-ID": last})
    assert response.status_code == 422
    (entry,) = response.json()["detail"]
    assert entry["loc"] == ["header", "last-event-id"]
    assert last not in entry["msg"].replace("1769853600123-0", "")


def test_a_listener_beyond_the_limit_is_429_until_another_one_leaves(
    streaming: LiveServer,
) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(2 * len(streaming.sidecars)):
            stack.enter_context(listener(streaming))
        for method in ("GET", "HEAD"):
            response = streaming.client.request(method, "/events/")
            assert response.status_code == 429
            assert response.headers["Retry-After"] == "5"
    streaming.wait_until(lambda: streaming.client.head("/events/").status_code == 200, 2)


@pytest.mark.parametrize("path", ["/events/", "/events"])
def test_head_opens_no_stream(streaming: LiveServer, path: str) -> None:
    for _ in range(3):
        response = streaming.client.head(path)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")


def test_a_slow_reader_gets_every_event_in_order(streaming: LiveServer, redis: Any) -> None:
    payload = "x" * 100_000
    with listener(streaming) as slow:
        ids = [add(redis, payload) for _ in range(200)]
        # 20 MB are more than the buffers of the connection hold, so the server waits.
        assert [next(slow).id for _ in ids] == ids


async def test_a_redis_that_is_away_is_503(tmp_path: Path) -> None:
    async with in_process(tmp_path, REDIS_URL=f"redis://127.0.0.1:{free_port()}/0") as client:
        for method in ("GET", "HEAD"):
            response = await client.request(method, "/events/")
            assert response.status_code == 503
            assert response.headers["Retry-After"] == "5"
        response = await client.get("/events/")
        assert response.json() == {
            "detail": "Redis is away or cannot serve the stream osiris.events; try again."
        }
        for response in (
            await client.get("/events/dead"),
            await client.post("/events/dead/1-0/requeue"),
        ):
            assert response.status_code == 503
            assert response.headers["Retry-After"] == "5"


async def test_a_stream_that_redis_denies_is_503_and_says_so(
    redis_url: str, redis: Any, tmp_path: Path
) -> None:
    redis.execute_command("ACL", "SETUSER", *BLIND)
    url = redis_url.replace("//", "//blind:secret-4711@")
    async with in_process(tmp_path, REDIS_URL=url) as client:
        response = await client.get("/events/")
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "30"
    assert response.json() == {
        "detail": "Redis denies the stream osiris.events to the sidecar's user; "
        "docs/operations.md lists the permissions that it needs."
    }


async def test_a_stream_that_redis_denies_later_ends(
    redis_url: str, redis: Any, caplog: pytest.LogCaptureFixture
) -> None:
    redis.execute_command("ACL", "SETUSER", "reader", "on", ">secret-4711", "~*", "&*", "+@all")
    client = AsyncRedis.from_url(
        redis_url.replace("//", "//reader:secret-4711@"), decode_responses=True, protocol=2
    )
    feed = EventFeed(FollowedStream(client, "osiris.events"), 1)
    async with asyncio.timeout(10), feed.listen(None) as events:
        redis.execute_command("ACL", "SETUSER", "reader", "-xrange")
        assert [item async for item in events] == []
    assert caplog.messages == ["Redis denies reading osiris.events now: a listener ends"]
    await client.aclose()
    redis.execute_command("ACL", "DELUSER", "reader")


async def test_a_silent_stream_has_comments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(events, "KEEP_ALIVE", 0.01)
    settings = Settings(events={"url": "memory://"}, database={"uri": str(tmp_path)})
    app = create_app(settings)
    app.state.sidecar = sidecar = Sidecar(settings)
    commented = asyncio.Event()

    async def receive() -> Message:
        await commented.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message.get("body", b"").startswith(b": "):
            commented.set()

    scope = {"type": "http", "method": "GET", "path": "/events/", "query_string": b""}
    await asyncio.wait_for(app({**scope, "headers": []}, receive, send), 5)
    assert sidecar.event_feed.count == 0
    await sidecar._bus.close()


# Dead letters

LETTER: Final = {
    "time": "2026-01-31T10:00:00+00:00",
    "reason": "transaction_id: it is empty",
    "entry": "5-0",
    "deliveries": "2",
}


def bury(redis: Any, data: str) -> str:
    """Adds a dead letter; returns its id."""
    added: str = redis.xadd(DEAD, LETTER | {"fields": json.dumps({"id": "a", "data": data})})
    return added


@pytest.mark.parametrize("path", ["/events/dead", "/events/dead/"])
def test_dead_letters_are_listed_newest_first_in_pages(
    streaming: LiveServer, redis: Any, path: str
) -> None:
    redis.delete(DEAD)
    assert streaming.client.get(path).json() == {"items": [], "next": None}
    ids = [bury(redis, str(n)) for n in range(45)][::-1]
    first = streaming.client.get(path, params={"limit": 43}).json()
    assert [item["id"] for item in first["items"]] == ids[:43]
    assert first["items"][0] == {
        **LETTER,
        "id": ids[0],
        "deliveries": 2,
        "fields": {"id": "a", "data": "44"},
    }
    assert first["next"] == ids[42]
    rest = streaming.client.get(path, params={"limit": 2, "before": first["next"]}).json()
    assert [item["id"] for item in rest["items"]] == ids[43:]
    assert rest["next"] is None


def test_a_page_of_long_dead_letters_ends_early(streaming: LiveServer, redis: Any) -> None:
    redis.delete(DEAD)
    ids = [bury(redis, "x" * 300_000) for _ in range(45)][::-1]
    first = streaming.client.get("/events/dead", params={"limit": 500}).json()
    assert [item["id"] for item in first["items"]] == ids[:20]
    assert first["next"] == ids[19]


@pytest.mark.parametrize(
    ("parameter", "value"), [("limit", "0"), ("limit", "501"), ("limit", "1.0"), ("before", "x")]
)
def test_a_bad_page_is_422(streaming: LiveServer, parameter: str, value: str) -> None:
    response = streaming.client.get("/events/dead", params={parameter: value})
    assert response.status_code == 422
    assert [entry["loc"] for entry in response.json()["detail"]] == [["query", parameter]]


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_requeued_dead_letter_is_in_the_inbox_again_once(
    streaming: LiveServer, redis: Any, slash: str
) -> None:
    redis.delete(DEAD)
    kept, dead = bury(redis, "kept"), bury(redis, "again")
    before = ever_in_the_inbox(redis)
    response = streaming.client.post(f"/events/dead/{dead}/requeue{slash}")
    assert response.status_code == 200
    entry = response.json()["entry"]
    assert response.json() == {
        "message": "The entry is in the inbox again.",
        "id": dead,
        "entry": entry,
    }
    # It is still invalid.
    again = streaming.wait_until(lambda: redis.xrange(DEAD, f"({dead}"))
    assert [(found["entry"], found["fields"]) for _, found in again] == [
        (entry, '{"id": "a", "data": "again"}')
    ]
    assert [found for found, _ in redis.xrange(DEAD)] == [kept, again[0][0]]
    assert streaming.client.post(f"/events/dead/{dead}/requeue").status_code == 404
    assert ever_in_the_inbox(redis) == before + 1


def ever_in_the_inbox(redis: Any) -> int:
    """The number of entries that were ever added to the inbox. The server creates the stream."""
    added: int = redis.xinfo_stream(INBOX)["entries-added"]
    return added


def test_a_repeated_request_to_requeue_gets_the_same_answer(
    streaming: LiveServer, redis: Any
) -> None:
    before = ever_in_the_inbox(redis)
    path = f"/events/dead/{bury(redis, 'again')}/requeue"
    first, second = (
        streaming.client.post(path, headers={"Idempotency-Key": path}) for _ in range(2)
    )
    assert (first.status_code, second.status_code) == (200, 200)
    assert second.json() == first.json()
    assert second.headers["Idempotent-Replayed"] == "true"
    assert ever_in_the_inbox(redis) == before + 1


@pytest.mark.parametrize("letter", ["1-1", "x", "%20", "9" * 5000])
def test_an_unknown_dead_letter_is_404(streaming: LiveServer, letter: str) -> None:
    response = streaming.client.post(f"/events/dead/{letter}/requeue")
    assert response.status_code == 404
    assert response.json() == {"detail": "There is no dead letter with this id."}


@pytest.mark.own_process("sends a signal")
def test_an_open_stream_does_not_hold_up_a_shutdown(
    redis_url: str, redis: Any, tmp_path: Path
) -> None:
    with serve(tmp_path, REDIS_URL=redis_url) as server:
        # Otherwise the server waits for its idle connection.
        server.client.close()
        with listener(server) as lines:
            added = add(redis, "1")
            assert next(lines).id == added
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert list(lines) == []
            assert time.monotonic() - began < 2
        assert server.process.wait(30) == 0
        assert "ERROR" not in server.log.read_text()
