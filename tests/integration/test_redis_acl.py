"""The access rules that docs/operations.md recommends for Redis, in a real one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Final

import httpx
import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError
from redis.retry import Retry

from llm_sidecar.event_bus.redis_url import make_client
from llm_sidecar.tts.worker import SpeechWorker
from tests.docs_pages import all_blocks
from tests.live_server import LiveServer, serve
from tests.redis_server import RedisServer, require_redis
from tests.tones import Tones

DURABLE: Final = ("--appendonly", "yes", "--appendfsync", "always")
STREAM, INBOX, DEAD = "osiris.events", "osiris.inbox", "osiris.inbox.dead"
FEEDBACK: Final = {"transaction_id": "t", "feedback_type": "rating", "feedback_content": "5"}
ADMIN: Final = "user admin on >ADMIN_PASSWORD ~* &* +@all\n"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis with the rules and passwords of the documentation."""
    require_redis()
    (rules,) = (block.text for block in all_blocks() if block.language == "acl")
    file = tmp_path_factory.mktemp("redis") / "users.acl"
    file.write_text(rules + ADMIN)
    with RedisServer("--aclfile", str(file), *DURABLE) as running:
        yield running


def url(redis: RedisServer, user: str) -> str:
    return redis.url.replace("//", f"//{user}:{user.upper()}_PASSWORD@")


def connected(redis: RedisServer, user: str) -> Any:
    # In RESP3, a subscription has no direct reply.
    return Redis.from_url(url(redis, user), decode_responses=True, protocol=2)


@pytest.fixture(scope="module")
def sidecar(redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    environ = {"REDIS_URL": url(redis, "sidecar"), "TTS_VOICE": "auto"}
    with serve(tmp_path_factory.mktemp("acl"), **environ) as running:
        running.wait_until_database_is_open()
        running.wait_until(lambda: bus(running)["connected"])
        yield running


def bus(server: LiveServer) -> dict[str, Any]:
    found: dict[str, Any] = server.client.get("/health").json()["event_bus"]
    return found


def test_the_sidecar_can_do_all_its_work_and_nothing_is_denied(
    redis: RedisServer, sidecar: LiveServer
) -> None:
    with connected(redis, "desk") as desk, connected(redis, "risk") as risk:
        with desk.pubsub() as heard, httpx.stream("GET", f"{sidecar.url}/events/") as events:
            heard.psubscribe("phi3.*")
            heard.subscribe("audio.bytes")
            # Over HTTP, in the stream and on the channel.
            assert sidecar.client.post("/feedback/phi3/", json=FEEDBACK).status_code == 200
            assert "event: phi3.feedback.submitted" in events.iter_lines()
            ((_, entries),) = desk.xread({STREAM: "0-0"}, block=5000)
            assert json.loads(entries[0][1]["data"])["transaction_id"] == "t"
            assert sidecar.client.post("/speak", json={"text": "Filled."}).status_code == 200
            channels: set[str] = set()
            while channels != {"phi3.feedback.submitted", "audio.bytes"}:
                message = heard.get_message(timeout=5)
                assert message is not None
                if message["type"] in ("message", "pmessage"):
                    channels.add(message["channel"])
        # From the channel and from the inbox, where one entry is invalid.
        stored = sidecar.client.get("/health").json()["database"]["rows_written"]
        risk.publish("phi3.feedback.submitted", json.dumps(FEEDBACK | {"transaction_id": "u"}))
        add_to_inbox(risk, "a", FEEDBACK | {"transaction_id": "v"})
        add_to_inbox(risk, "b", {})

        def rows() -> int:
            health: dict[str, Any] = sidecar.client.get("/health").json()
            return int(health["database"]["rows_written"] - stored)

        sidecar.wait_until(lambda: rows() == 2)

        def letters() -> list[dict[str, Any]]:
            items: list[dict[str, Any]] = sidecar.client.get("/events/dead").json()["items"]
            return items

        (letter,) = sidecar.wait_until(letters)
        requeued = sidecar.client.post(f"/events/dead/{letter['id']}/requeue")
        assert requeued.status_code == 200
        (again,) = sidecar.wait_until(letters)
        assert again["entry"] == requeued.json()["entry"]
    status = bus(sidecar)
    assert (status["denied"], status["warnings"]) == ([], [])
    with connected(redis, "admin") as admin:
        assert admin.acl_log() == []


async def test_a_speech_worker_speaks_for_the_sidecar(
    redis: RedisServer, sidecar: LiveServer
) -> None:
    def speak() -> httpx.Response:
        sidecar.wait_until(lambda: sidecar.client.get("/health").json()["speech"]["workers"])
        return sidecar.client.post("/speak", json={"text": "Filled."})

    async with make_client(url(redis, "voice")) as client:
        worker = SpeechWorker(client, Tones())
        await worker.start()
        spoken = await asyncio.to_thread(speak)
        await worker.close()
    assert (spoken.status_code, spoken.headers["X-Voice"]) == (200, "chatterbox")
    assert (await asyncio.to_thread(bus, sidecar))["denied"] == []
    with connected(redis, "admin") as admin:
        assert admin.acl_log() == []


def add_to_inbox(redis: Any, entry_id: str, feedback: dict[str, Any]) -> None:
    fields = {"id": entry_id, "type": "phi3.feedback.submitted", "data": json.dumps(feedback)}
    redis.xadd(INBOX, fields)


ALLOWED: Final = {
    "sidecar": [
        "XTRIM osiris.events MAXLEN 1",
        "XADD osiris.inbox * a 1",
        "GET osiris.x",
        "PUBLISH osiris.events.facts x",
    ],
    "voice": ["XADD osiris.speech * a 1", "ZRANGE osiris.speech.workers 0 -1", "TIME"],
    "desk": [
        *(
            "XREAD STREAMS osiris.events 0",
            "XRANGE osiris.events - +",
            "XREVRANGE osiris.events + -",
        ),
        *("SUBSCRIBE phi3.proposal.created", "PSUBSCRIBE phi3.*", "SUBSCRIBE audio.bytes"),
    ],
    "risk": ["XADD osiris.inbox * a 1", "PUBLISH phi3.feedback.submitted {}"],
}
DENIED: Final = {
    "sidecar": [
        *("SET other 1", "FLUSHALL", "CONFIG SET appendonly no", "KEYS *", "SHUTDOWN", "SAVE"),
        *("ACL LIST", "EVAL x 0", "PUBLISH other 1", "SUBSCRIBE other", "CLIENT LIST"),
    ],
    "voice": [
        *("XADD osiris.events * a 1", "XADD osiris.inbox * a 1", "XREAD STREAMS osiris.events 0"),
        *("PUBLISH phi3.feedback.submitted {}", "GET osiris.speech.x", "FLUSHALL"),
    ],
    "desk": [
        *("XADD osiris.events * a 1", "XDEL osiris.events 1-0", "XTRIM osiris.events MAXLEN 0"),
        *("PUBLISH phi3.feedback.submitted {}", "PUBLISH audio.bytes a", "XADD osiris.inbox * a 1"),
        *("XREAD STREAMS osiris.inbox 0", "XRANGE osiris.inbox.dead - +", "PSUBSCRIBE *"),
        *("GET osiris.events.relay:x", "FLUSHALL", "CONFIG GET *", "KEYS *"),
    ],
    "risk": [
        *("XADD osiris.events * a 1", "XADD osiris.inbox.dead * a 1", "XRANGE osiris.inbox - +"),
        *("XREAD STREAMS osiris.inbox 0", "XDEL osiris.inbox 1-0", "DEL osiris.inbox"),
        *("PUBLISH phi3.proposal.created {}", "PUBLISH audio.bytes a", "SUBSCRIBE phi3.x"),
        *("FLUSHALL", "CONFIG GET *"),
    ],
}


@pytest.mark.parametrize("user", ALLOWED)
def test_a_user_can_do_its_part_and_nothing_else(redis: RedisServer, user: str) -> None:
    for command in ALLOWED[user]:
        with connected(redis, user) as client:
            client.execute_command(*command.split())
    for command in DENIED[user]:
        with connected(redis, user) as client, pytest.raises(NoPermissionError):
            client.execute_command(*command.split())
    with connected(redis, "admin") as admin:
        admin.acl_log_reset()


def test_nobody_comes_in_without_a_user(redis: RedisServer) -> None:
    once = Retry(NoBackoff(), 0)
    with Redis(port=redis.port, retry=once) as stranger, pytest.raises(AuthenticationError):
        stranger.ping()
