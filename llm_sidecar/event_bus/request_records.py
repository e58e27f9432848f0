"""Requests with an `Idempotency-Key` that all sidecars of one Redis share.

A record has what is known of a request, for a day; a lock marks a request that a sidecar answers
now. While Redis is away, nothing is shared, and no request waits for it; the responses are saved
afterwards.
"""

from __future__ import annotations

import asyncio
import datetime
import functools
import hashlib
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Final, NamedTuple, TypeVar

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError, WatchError

from llm_sidecar import timestamps
from llm_sidecar.event_bus.denied import Denied
from llm_sidecar.event_bus.leases import LEASE_SECONDS, Lease, expire_in_any_case
from llm_sidecar.event_bus.redis_errors import is_denial, reason
from llm_sidecar.event_bus.subscriber import Subscriber

T = TypeVar("T")

KEPT_SECONDS: Final = 86_400
MOST_RECORDS: Final = 100_000
"""Beyond it, the oldest records are dropped."""
MOST_BYTES: Final = 128 << 10
"""The size of the largest record. The longest texts fit."""
MOST_UNSAVED: Final = 1_000
"""Records that wait for Redis; beyond it, the oldest is dropped."""
PATIENCE: Final = 1.0
"""Seconds that a request waits for Redis."""
LONGEST_LOCK: Final = 4_000.0
"""Seconds after which a lock expires in any case: more than any request may take."""

log = logging.getLogger(__name__)


class Record(msgspec.Struct, frozen=True):
    """What the sidecars know of a request.

    Attributes:
        fingerprint: identifies its content.
        id: for what the first attempt has made. A later attempt uses it again, so that its rows are
            recognised as the same.
        begun: when the first attempt began; aware.
        state: the progress of a failed attempt, as JSON types.
        response: the answer.
    """

    fingerprint: str
    id: uuid.UUID
    begun: Annotated[datetime.datetime, msgspec.Meta(tz=True)]
    state: dict[str, Any] | None = None
    response: str | None = None

    @classmethod
    def first(cls, fingerprint: str) -> Record:
        """The record of a request that begins now."""
        return cls(fingerprint, uuid.uuid4(), timestamps.now())

    def failed(self, state: str | None) -> Record:
        """The record after an attempt that has failed; the state is JSON text."""
        progress = None if state is None else json.loads(state)
        return msgspec.structs.replace(self, state=progress, response=None)

    def answered(self, response: bytes) -> Record:
        """The record of an answered request; the response is UTF-8."""
        return msgspec.structs.replace(self, state=None, response=response.decode())


class SharedClaim(NamedTuple):
    """The result of a claim.

    Attributes:
        record: of the request.
        lock: held until the request is answered; None if there is a response, or if another sidecar
            answers it now.
    """

    record: Record
    lock: Lease | None


class RequestRecords:
    """The shared requests of one Redis.

    Args:
        client: must raise on errors, not retry.
        subscriber: reports whether Redis is connected.
        denied: what Redis denies.
        prefix: begins the names of their keys.
        shares: False for a Redis that no other sidecar uses: then nothing is shared.
    """

    def __init__(
        self,
        client: Redis,
        subscriber: Subscriber,
        denied: Denied,
        prefix: str,
        *,
        shares: bool = True,
    ) -> None:
        self._client = client
        self._shares = shares
        self._subscriber = subscriber
        self._denied = denied
        self._prefix = prefix
        self._index = f"{prefix}.requests"
        self._operation = f"SET {prefix}.request:*"
        self._unsaved: dict[str, Record] = {}
        self._filled = asyncio.Event()

    async def claim(self, caller: str, key: str, first: Record, owner: str) -> SharedClaim | None:
        """Claims a request; None if nothing is shared now, because Redis is away.

        Args:
            caller, key: identify the request.
            first: its record, unless there is one already.
            owner: of the lock. An owner may claim its request again.
        """
        if not self._shares:
            return None
        name = self._name(caller, key)
        return await self._try(lambda: self._claim(name, first, owner))

    async def save(self, caller: str, key: str, record: Record) -> None:
        """Replaces a record; without a state and a response, deletes it.

        A record with a response stays: if the lock of this sidecar has expired, another one may
        have answered the request.

        While Redis is away, a response is saved later, and a failed attempt is not saved.
        """
        if not self._shares:
            return
        name = self._name(caller, key)
        self._unsaved.pop(name, None)
        saved = await self._try(lambda: self._save(name, record))
        if saved is None and record.response is not None:
            self._unsaved[name] = record
            if len(self._unsaved) > MOST_UNSAVED:
                del self._unsaved[next(iter(self._unsaved))]
            self._filled.set()

    async def run(self) -> None:
        """Saves the records that could not be saved, until cancelled."""
        while True:
            await self._filled.wait()
            await self._subscriber.here.wait()
            self._filled.clear()
            await self._save_waiting()

    async def _save_waiting(self) -> None:
        for name, record in list(self._unsaved.items()):
            if await self._try(functools.partial(self._save, name, record)) is None:
                self._filled.set()
                await asyncio.sleep(PATIENCE)
                return
            if self._unsaved.get(name) is record:
                del self._unsaved[name]

    async def _try(self, operation: Callable[[], Awaitable[T]]) -> T | None:
        """The result of an operation; None if Redis is away, slow, or denies it."""
        if not (self._subscriber.connected and self._denied.permits(self._operation)):
            return None
        try:
            async with asyncio.timeout(PATIENCE):
                result = await operation()
        except (RedisError, TimeoutError) as error:
            if is_denial(error):
                self._denied.add(self._operation)
            else:
                log.warning("an Idempotency-Key is not shared: %s", reason(error))
                self._subscriber.check()
            return None
        self._denied.remove(self._operation)
        return result

    async def _claim(self, name: str, first: Record, owner: str) -> SharedClaim:
        lock = f"{name}.lock"
        async with self._client.pipeline(transaction=False) as pipe:
            # The lock first: whoever held it before has saved its response before it gave it up.
            pipe.set(lock, owner, nx=True, ex=LEASE_SECONDS)
            pipe.get(lock)
            pipe.set(name, _encoded(first), nx=True, ex=KEPT_SECONDS)
            pipe.get(name)
            is_new, holder, _, text = await pipe.execute()
        if not is_new:
            await expire_in_any_case(self._client, lock)
        record = _decoded(text) or first
        if holder != owner:
            return SharedClaim(record, None)
        if not is_new:
            # Of an attempt of this owner that has died.
            await self._client.expire(lock, LEASE_SECONDS)
        held = Lease(self._client, lock, owner, most_seconds=LONGEST_LOCK)
        if record.response is None and record.fingerprint == first.fingerprint:
            return SharedClaim(record, held)
        await held.release()
        return SharedClaim(record, None)

    async def _save(self, name: str, record: Record) -> bool:
        """Replaces a record, unless another sidecar has answered the request meanwhile."""
        while not await self._replace(name, record):
            pass  # it has just changed
        await self._drop_oldest()
        return True

    async def _replace(self, name: str, record: Record) -> bool:
        """Returns False if the record has changed since this call began."""
        text = _encoded(record)
        async with self._client.pipeline(transaction=True) as pipe:
            await pipe.watch(name)
            kept: Any = await pipe.get(name)
            if (known := _decoded(kept)) is not None and known.response is not None:
                return True
            pipe.multi()  # type: ignore[no-untyped-call]
            if record.state is None and record.response is None:
                pipe.delete(name)
            elif len(text) <= MOST_BYTES:
                pipe.set(name, text, ex=KEPT_SECONDS)
                pipe.zadd(self._index, {name: time.time()})
            try:
                await pipe.execute()
            except WatchError:
                return False
        return True

    async def _drop_oldest(self) -> None:
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.zremrangebyscore(self._index, 0, time.time() - KEPT_SECONDS)
            pipe.zcard(self._index)
            _, count = await pipe.execute()
        if count > MOST_RECORDS:
            oldest: Any = await self._client.zpopmin(self._index, count - MOST_RECORDS)
            await self._client.delete(*(name for name, _ in oldest))

    def _name(self, caller: str, key: str) -> str:
        # Hashed, because a key may be long, and only its caller needs to know it.
        hashed = hashlib.sha256(f"{caller}\0{key}".encode()).hexdigest()
        return f"{self._prefix}.request:{hashed}"


def _encoded(record: Record) -> bytes:
    return msgspec.json.encode(record)


def _decoded(text: str | None) -> Record | None:
    try:
        return msgspec.json.decode(text or "", type=Record)
    except (msgspec.DecodeError, RecursionError):
        return None
