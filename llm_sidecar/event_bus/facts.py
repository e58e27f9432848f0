"""Facts: small values in Redis that all its sidecars agree on, each with a version.

    fact = await facts.get("adapter")
    if not await facts.replace("adapter", fact.version, "20260131-dpo"):
        ...  # another sidecar has replaced it first

A fact never expires. If Redis loses it, it is absent until somebody replaces version 0.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from redis.asyncio import Redis
from redis.exceptions import RedisError, WatchError

from llm_sidecar.cloud_event import CloudEvent


class Fact(NamedTuple):
    """A value that all sidecars agree on.

    Attributes:
        version: 0 if there is no such fact. Each replacement adds 1.
        value: JSON types.
    """

    version: int
    value: Any


ABSENT: Final = Fact(0, None)


class Facts:
    """The facts of one Redis. Every method raises RedisError if Redis does not answer or denies it.

    Args:
        client: must raise on errors, not retry.
        stream: the stream of events; its name begins the names of their keys.
        maxlen: about how many entries it keeps.

    Attributes:
        prefix: begins the names of their keys.
        channel: gets the name of each fact that is replaced.
    """

    def __init__(self, client: Redis, stream: str, maxlen: int = 100_000) -> None:
        self.prefix = stream
        self.channel = f"{stream}.facts"
        self._client = client
        self._maxlen = maxlen

    async def get(self, name: str) -> Fact:
        """The fact; `ABSENT` if there is none, or if its key holds something else."""
        text: Any = await self._client.get(self._key(name))
        return _parsed(text)

    async def get_all(self, names: Sequence[str]) -> list[Fact]:
        """The facts, in one round trip."""
        async with self._client.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.get(self._key(name))
            return [_parsed(text) for text in await pipe.execute()]

    async def replace(
        self, name: str, version: int, value: Any, event: CloudEvent | None = None
    ) -> bool:
        """Replaces a fact, unless it no longer has this version.

        Args:
            version: 0 for a fact that is absent.
            value: JSON types.
            event: is sent if and only if the fact is replaced, even if this process dies.

        Returns:
            Whether it is replaced.
        """
        key = self._key(name)
        async with self._client.pipeline(transaction=True) as pipe:
            await pipe.watch(key)
            text: Any = await pipe.get(key)
            if _parsed(text).version != version:
                return False
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.set(key, json.dumps({"version": version + 1, "value": value}))
            if event is not None:
                fields: dict[Any, Any] = event.fields()
                pipe.xadd(self.prefix, fields, maxlen=self._maxlen, approximate=True)
                pipe.publish(event.type, event.data)
            try:
                await pipe.execute()
            except WatchError:
                return False
        # Not in the transaction, which would fail if Redis denied the channel. The message only
        # saves time: every sidecar looks at the facts each second.
        with contextlib.suppress(RedisError):
            await self._client.publish(self.channel, name)
        return True

    async def touch(self, name: str) -> None:
        """Changes the version of a fact that has no value."""
        # If another sidecar is faster, the version has changed since this call began: good enough.
        await self.replace(name, (await self.get(name)).version, None)

    def _key(self, name: str) -> str:
        return f"{self.prefix}.{name}"


def _parsed(text: str | None) -> Fact:
    try:
        found = json.loads(text or "")
        return Fact(int(found["version"]), found["value"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return ABSENT
