"""Floods of feedback from other services, on the channel and in the inbox at once, while one of two
sidecars on the same database is killed: `FLOOD=50000 pytest tests/long/test_feedback_floods.py`."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from redis import Redis

from llm_sidecar.db import Store
from llm_sidecar.db.queries import stream
from llm_sidecar.db.rows import FEEDBACK
from llm_sidecar.db.verify import verify
from tests.live_server import LiveServer, serve
from tests.redis_server import RedisServer, require_redis

FLOOD = int(os.environ.get("FLOOD", "5000"))
"""Messages on the channel, and as many in the inbox."""
TOGETHER = 500
SECONDS = 120.0 + FLOOD / 50
"""Within which all is stored. What the killed sidecar has read is claimed after a minute."""
CHANNEL, INBOX, DEAD = "phi3.feedback.submitted", "osiris.inbox", "osiris.inbox.dead"


def feedback(transaction_id: str) -> str:
    values = {"feedback_type": "rating", "feedback_content": "The stop is too tight."}
    return json.dumps(values | {"transaction_id": transaction_id})


def send(client: Any, numbers: range) -> None:
    for first in numbers[::TOGETHER]:
        with client.pipeline(transaction=False) as pipe:
            for number in range(first, min(first + TOGETHER, numbers.stop)):
                pipe.publish(CHANNEL, feedback(f"channel-{number}"))
                data = feedback(f"inbox-{number}")
                pipe.xadd(INBOX, {"id": str(number), "type": CHANNEL, "data": data})
            pipe.execute()


def event_bus(server: LiveServer) -> dict[str, Any]:
    status: dict[str, Any] = server.client.get("/health").json()["event_bus"]
    return status


async def stored(folder: Path) -> Counter[str]:
    """How often each transaction is in the table, which is sound."""
    found: Counter[str] = Counter()
    store = await Store.open(folder, create=False)
    try:
        tables = await store.moved()
        assert [result for result in await verify(tables, print) if not result.is_sound] == []
        async for batch in stream(tables, FEEDBACK, columns=["transaction_id"]):
            found.update(batch["transaction_id"])
    finally:
        await store.close()
    return found


async def test_all_of_a_flood_is_stored_once_though_a_sidecar_is_killed(tmp_path: Path) -> None:
    require_redis()
    with (
        RedisServer() as redis,
        Redis(port=redis.port, decode_responses=True) as client,
        serve(tmp_path, REDIS_URL=redis.url) as killed,
        serve(tmp_path, REDIS_URL=redis.url) as survivor,
    ):
        for server in (killed, survivor):
            server.wait_until(lambda: event_bus(server)["connected"])  # noqa: B023 - used at once
        survivor.wait_until(lambda: client.pubsub_numsub(CHANNEL) == [(CHANNEL, 2)])
        send(client, range(FLOOD // 2))
        killed.wait_until(lambda: event_bus(killed)["inbox"]["handled"] > 0)
        killed.stop(signal.SIGKILL)
        send(client, range(FLOOD // 2, FLOOD))
        print(f"{client.xpending(INBOX, 'osiris.sidecars')} when the first was killed")

        def is_done() -> bool:
            health = survivor.client.get("/health").json()
            # The survivor writes the whole channel, and what it takes from the inbox.
            writes = FLOOD + health["event_bus"]["inbox"]["handled"]
            return bool(client.xlen(INBOX) == 0 and health["database"]["rows_written"] >= writes)

        survivor.wait_until(is_done, SECONDS, interval=0.5)
        bus = event_bus(survivor)
        assert client.xlen(DEAD) == 0
    lost = {name: bus[name] for name in ("outages", "dropped", "refused", "handler_errors")}
    # The survivor was subscribed all the time, so it got the whole channel.
    assert lost == {"outages": 0, "dropped": 0, "refused": 0, "handler_errors": 0}
    everything = [f"{kind}-{number}" for kind in ("channel", "inbox") for number in range(FLOOD)]
    assert await stored(tmp_path / "lancedb") == Counter(everything)
