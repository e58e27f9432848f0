"""Dead letters: entries of the inbox that no sidecar could store. They wait for an operator."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import WatchError

from llm_sidecar import timestamps
from llm_sidecar.errors import NotFound
from llm_sidecar.event_bus.consumer_group import ConsumerGroup, Entry
from llm_sidecar.event_bus.followed_stream import BEGINNING, EntryId

INBOX: Final = "osiris.inbox"
DEAD: Final = "osiris.inbox.dead"
MOST_DEAD: Final = 10_000
"""About how many dead letters are kept; beyond it, Redis drops the oldest."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A dead letter.

    Attributes:
        id: the id of its entry in the stream of dead letters.
        time: when it was given up, RFC 3339 in UTC.
        reason: why it was given up, without any text of the entry.
        entry: the id that the entry had in the inbox.
        deliveries: how often it was delivered.
        fields: the fields of the entry.
    """

    id: str
    time: str
    reason: str
    entry: str
    deliveries: int
    fields: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """The dead letter as JSON types."""
        return asdict(self)


class DeadLetters:
    """The stream of dead letters.

    Every method raises RedisError if Redis is away or denies the stream.
    """

    def __init__(self, client: Redis) -> None:
        self._client = client

    async def add(self, group: ConsumerGroup, entry: Entry, reason: str) -> None:
        """Moves a pending entry of the inbox to the dead letters."""
        await self._require_stream(DEAD)
        fields: dict[Any, Any] = {
            "time": timestamps.now().isoformat(),
            "reason": reason,
            "entry": entry.id,
            "deliveries": str(entry.deliveries),
            "fields": json.dumps(dict(entry.fields)),
        }
        async with self._client.pipeline(transaction=True) as pipe:
            pipe.xadd(DEAD, fields, maxlen=MOST_DEAD, approximate=True)
            pipe.xack(group.stream, group.group, entry.id)
            pipe.xdel(group.stream, entry.id)
            await pipe.execute()

    async def page(self, limit: int, before: str | None = None) -> list[DeadLetter]:
        """The newest dead letters, newest first.

        Args:
            limit: their maximum number.
            before: the id of a dead letter; only older ones are returned.

        Raises:
            ValueError: `before` is not an id.
        """
        if before is not None and EntryId.parse(before) == BEGINNING:
            return []  # Redis refuses to look for an id before the smallest
        newest = "+" if before is None else f"({before}"
        entries: Any = await self._client.xrevrange(DEAD, newest, "-", count=limit)
        return [_dead_letter(entry_id, fields) for entry_id, fields in entries]

    async def requeue(self, dead_id: str) -> str:
        """Puts a dead letter back into the inbox, as a new entry; returns the entry's id.

        Raises:
            NotFound: there is no such dead letter.
        """
        while True:
            async with self._client.pipeline(transaction=True) as pipe:
                # Two requests for one dead letter must not add two entries.
                await pipe.watch(DEAD)
                letter, fields = await self._found(pipe, dead_id)
                await self._require_stream(INBOX)
                pipe.multi()  # type: ignore[no-untyped-call]
                pipe.xadd(INBOX, fields)
                pipe.xdel(DEAD, letter)
                try:
                    entry_id, _ = await pipe.execute()
                except WatchError:
                    continue
                return str(entry_id)

    async def _found(self, pipe: Pipeline, dead_id: str) -> tuple[str, dict[Any, Any]]:
        """The id of a dead letter as Redis writes it, and the fields of its entry."""
        found: Any
        try:
            letter = str(EntryId.parse(dead_id))
            found = await pipe.xrange(DEAD, letter, letter, count=1)
        except ValueError:
            found = []
        if not found:
            raise NotFound("There is no dead letter with this id.")
        return letter, dict(_dead_letter(*found[0]).fields)

    async def _require_stream(self, key: str) -> None:
        """Raises ResponseError if the key is not a stream.

        A transaction would fail to add to it, and still remove the entry from the other stream.
        """
        await self._client.xlen(key)

    async def count(self) -> int:
        """How many dead letters there are."""
        return int(await self._client.xlen(DEAD))


def _dead_letter(entry_id: str, entry: Mapping[str, str]) -> DeadLetter:
    return DeadLetter(
        id=entry_id,
        time=entry.get("time", ""),
        reason=entry.get("reason", ""),
        entry=entry.get("entry", ""),
        deliveries=_number(entry.get("deliveries", "")),
        fields=_fields_of(entry),
    )


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        return 0


def _fields_of(entry: Mapping[str, str]) -> Mapping[str, str]:
    """The fields that the entry had in the inbox.

    If another program added the dead letter, these are its own fields.
    """
    try:
        fields = json.loads(entry.get("fields", ""))
    except (ValueError, RecursionError):
        return entry
    is_whole = isinstance(fields, dict) and all(isinstance(text, str) for text in fields.values())
    return fields if fields and is_whole else entry
