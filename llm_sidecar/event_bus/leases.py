"""Leases: locks in Redis that expire, so that a machine that dies does not keep them.

    async with leases.held("compaction") as mine:
        if mine:
            ...

A lease saves work, and does not protect data: its holder may be suspended for longer than it lasts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError, WatchError

from llm_sidecar.event_bus.redis_errors import reason
from llm_sidecar.logs import start_detached
from llm_sidecar.tasks import cancel

LEASE_SECONDS: Final = 15
"""Seconds after which a lease expires that its holder does not renew."""
RENEW_SECONDS: Final = LEASE_SECONDS / 3
_POLL_SECONDS: Final = 0.2
_CANCEL_SECONDS: Final = 1.0

log = logging.getLogger(__name__)


class Lease:
    """A lease that this process holds, and renews until `release`.

    Args:
        key, token: Redis holds the token under the key.
        most_seconds: after this time it is not renewed any more.
    """

    def __init__(
        self, client: Redis, key: str, token: str, *, most_seconds: float = math.inf
    ) -> None:
        self._client = client
        self._key = key
        self._token = token
        self._until = time.monotonic() + most_seconds
        self._renewing = start_detached(self._renew(), name=f"lease {key}")

    async def release(self) -> None:
        """Gives the lease up; it expires by itself if Redis is away."""
        await cancel(self._renewing, patience=_CANCEL_SECONDS)
        with contextlib.suppress(RedisError):
            await self._if_mine(delete=True)

    async def _renew(self) -> None:
        while time.monotonic() < self._until:
            await asyncio.sleep(RENEW_SECONDS)
            try:
                if not await self._if_mine(delete=False):
                    log.warning("a lease has expired while its holder works: %s", self._key)
                    return
            except RedisError as error:
                log.debug("a lease is not renewed: %s", reason(error))

    async def _if_mine(self, *, delete: bool) -> bool:
        """Deletes or renews the key if it still holds the token."""
        async with self._client.pipeline(transaction=True) as pipe:
            await pipe.watch(self._key)
            if await pipe.get(self._key) != self._token:
                return False
            pipe.multi()  # type: ignore[no-untyped-call]
            if delete:
                pipe.delete(self._key)
            else:
                pipe.expire(self._key, LEASE_SECONDS)
            try:
                await pipe.execute()
            except WatchError:
                return False
            return True


class Leases:
    """The leases of one Redis.

    Args:
        client: must raise on errors, not retry.
        prefix: begins the names of their keys.
    """

    def __init__(self, client: Redis, prefix: str) -> None:
        self._client = client
        self._prefix = prefix
        self._closed = False

    def close(self) -> None:
        """From now on, `held` takes no lease and yields False."""
        self._closed = True

    @contextlib.asynccontextmanager
    async def held(self, name: str, *, wait: bool = False) -> AsyncIterator[bool]:
        """Holds a lease, or yields False if another holds it and `wait` is False. Yields True
        without a lease if Redis does not answer or denies it."""
        if self._closed:
            yield False
            return
        try:
            while (lease := await self._take(name)) is None and wait:  # noqa: ASYNC110 - in Redis
                await asyncio.sleep(_POLL_SECONDS)
        except RedisError as error:
            log.warning("a lease cannot be taken, so others may do the same: %s", reason(error))
            yield True
            return
        try:
            yield lease is not None
        finally:
            if lease is not None:
                await lease.release()

    async def _take(self, name: str) -> Lease | None:
        key, token = f"{self._prefix}.lease:{name}", uuid.uuid4().hex
        if await self._client.set(key, token, nx=True, ex=LEASE_SECONDS):
            return Lease(self._client, key, token)
        await expire_in_any_case(self._client, key)
        return None


async def expire_in_any_case(client: Redis, key: str) -> None:
    """Makes the key of a lease expire; another program may have set it without an expiry.

    Before Redis 7, it does nothing.
    """
    with contextlib.suppress(ResponseError):
        await client.expire(key, LEASE_SECONDS, nx=True)
