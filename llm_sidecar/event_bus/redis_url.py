"""A client for a Redis URL, and the URL as text without its password."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit, urlunsplit
from weakref import WeakValueDictionary

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff

from llm_sidecar import redis_address
from llm_sidecar.redis_address import RedisAddress

if TYPE_CHECKING:
    from fakeredis import FakeServer

CONNECT_TIMEOUT: Final = 3.0
"""Seconds to connect; after that, Redis counts as unavailable."""
REPLY_TIMEOUT: Final = 5.0
"""Seconds to wait for a reply; after that, Redis counts as unavailable."""
LONGEST_BLOCK: Final = 5.0
"""Seconds for which a read may wait in Redis for the first entry."""

MEMORY: Final = "memory://"
_shared_servers: WeakValueDictionary[str, FakeServer] = WeakValueDictionary()


def make_client(url: str, *, blocks: float = 0.0) -> Redis:
    """A client that is not connected yet and tries every command once.

    By default redis-py reconnects and resubscribes silently. Without retries it raises at once, so
    that the caller notices every gap.

    Args:
        blocks: seconds for which its commands may wait in Redis.

    Raises:
        ValueError: the URL cannot be read; the message does not repeat it, for its password.
    """
    options: dict[str, Any] = {
        "decode_responses": True,
        "encoding_errors": "replace",  # others may publish bytes that are not UTF-8
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0, supported_errors=()),
        "socket_connect_timeout": CONNECT_TIMEOUT,
        "socket_timeout": REPLY_TIMEOUT,
    }
    if url.startswith(MEMORY):
        return _memory_client(url.removeprefix(MEMORY), options)
    address = redis_address.parse(url)
    options |= address.options
    options["socket_timeout"] += blocks
    if address.master is not None:
        return _sentinel_client(address, address.master, options)
    client: Redis = Redis.from_url(address.url, **options)
    return client


async def close_client(client: Redis) -> None:
    """Closes the connections of a client, and those to its sentinels."""
    pool = client.connection_pool
    await client.aclose()
    if isinstance(pool, SentinelConnectionPool):
        await pool.sentinel_manager.aclose()


def _sentinel_client(address: RedisAddress, master: str, options: dict[str, Any]) -> Redis:
    if address.tls:
        options["ssl"] = True
    shared = ("socket_", "ssl", "protocol", "retry", "decode_responses")
    of_sentinels = {name: value for name, value in options.items() if name.startswith(shared)}
    sentinels = Sentinel(  # type: ignore[no-untyped-call]
        address.sentinels, sentinel_kwargs=of_sentinels | dict(address.sentinel_options or {})
    )
    client: Redis = sentinels.master_for(master, **options)
    return client


def _memory_client(name: str, options: dict[str, Any]) -> Redis:
    from fakeredis import FakeAsyncRedis, FakeServer  # only memory:// needs it

    server = _shared_servers.get(name) or FakeServer()
    if name:
        _shared_servers[name] = server
    client: Redis = FakeAsyncRedis(server=server, **options)
    return client


def masked(url: str) -> str:
    """The URL with *** for its password and without its query, which can hold one too."""
    if url.startswith(MEMORY):
        return url
    parsed = urlsplit(url)
    credentials, at, address = parsed.netloc.rpartition("@")
    user, colon, _ = credentials.partition(":")
    secret = ":***" if colon else ""
    return urlunsplit((parsed.scheme, f"{user}{secret}{at}{address}", parsed.path, "", ""))
