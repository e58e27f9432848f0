"""Two relays on one outbox while connections break, hang and slow down, and Redis freezes.

Every event is in the stream once, and in order.
"""

from __future__ import annotations

import asyncio
import random

import pytest
import redis

from llm_sidecar.errors import DatabaseUnavailable
from llm_sidecar.event_bus import EventBus
from tests.integration.test_relay import SharedOutbox, event, stream
from tests.redis_server import RedisServer, require_redis
from tests.scripted_redis import Proxy

# asyncio forgets a connection that it accepts while the proxy closes.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SECONDS = 8.0
"""Seconds of faults in each round."""
TIMEOUT = 30.0


class FlakyOutbox(SharedOutbox):
    """An outbox that sometimes fails to remove events."""

    async def sent(self, number: int) -> None:
        if random.random() < 0.1:
            raise DatabaseUnavailable("the disk is full")
        await super().sent(number)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens waits to fractions of a second, so that more happens."""
    for name, seconds in {
        "redis_url.REPLY_TIMEOUT": 0.15,
        "subscriber.REPLY_TIMEOUT": 0.15,
        "subscriber.FIRST_DELAY": 0.05,
        "subscriber.LONGEST_DELAY": 0.1,
        "relay.FIRST_DELAY": 0.01,
        "relay.LONGEST_DELAY": 0.1,
        "relay.LOOK_AGAIN": 0.05,
    }.items():
        monkeypatch.setattr(f"llm_sidecar.event_bus.{name}", seconds)


async def make_faults(server: RedisServer, proxy: Proxy) -> None:
    """Makes faults until cancelled."""
    opened = proxy.gate
    while True:
        await asyncio.sleep(random.uniform(0, 0.15))
        match random.randrange(4):
            case 0:
                proxy.delay = random.choice((0.0, 0.0, 0.05, 0.2, 0.4))
            case 1:
                proxy.break_some(2)
            case 2:
                # Bytes that were sent before this moment arrive after those that are sent next.
                proxy.gate = asyncio.Event()
                asyncio.get_running_loop().call_later(random.uniform(0.1, 0.6), proxy.gate.set)
                await asyncio.sleep(0.05)
                proxy.gate = opened
            case 3:
                server.freeze()
                await asyncio.sleep(random.uniform(0, 0.3))
                server.thaw()


@pytest.mark.parametrize("seed", range(10))
async def test_every_event_is_in_the_stream_once_and_in_order(seed: int) -> None:
    require_redis()
    random.seed(seed)
    loop, outbox, count = asyncio.get_running_loop(), FlakyOutbox(), 0
    with RedisServer() as server, redis.Redis(port=server.port, decode_responses=True) as probe:
        async with Proxy(server.port) as proxy:
            opened = proxy.gate
            buses = [EventBus(proxy.url, outbox=outbox) for _ in range(2)]
            for bus in buses:
                await bus.start()
            faults = asyncio.create_task(make_faults(server, proxy))
            end = loop.time() + SECONDS
            while loop.time() < end:
                for _ in range(random.randint(0, 40)):
                    outbox.add(event(str(count)))
                    count += 1
                await asyncio.sleep(0.02)
            faults.cancel()
            await asyncio.wait([faults])
            server.thaw()
            proxy.delay, proxy.gate = 0.0, opened
            async with asyncio.timeout(TIMEOUT):
                while len(outbox) > 0:
                    await asyncio.sleep(0.05)
            await asyncio.sleep(1.0)  # late bytes arrive, too
            assert stream(probe) == [str(number) for number in range(count)]
            assert outbox.dropped == 0
            for bus in buses:
                await bus.close()
