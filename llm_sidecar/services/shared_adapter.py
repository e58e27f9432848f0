"""The name of the adapter that all sidecars of one Redis use."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any, Final, NamedTuple

from redis.exceptions import RedisError

from llm_sidecar.cloud_event import CloudEvent
from llm_sidecar.errors import AdapterRejected
from llm_sidecar.event_bus.facts import Fact, Facts
from llm_sidecar.models import adapters
from llm_sidecar.models.adapter_state import AdapterState
from llm_sidecar.models.base import Adapter
from llm_sidecar.services.events import AdapterSwapped

FACT: Final = "adapter"
"""The name of the fact. Its value is the payload of the event of the last swap."""
_START_SECONDS: Final = 1.0
"""Seconds for which the start waits for Redis."""


class Agreed(NamedTuple):
    """What the sidecars agree on.

    Attributes:
        version: of the fact.
        known: whether they have agreed; also if they agree on using no adapter.
        adapter: its name.
    """

    version: int
    known: bool
    adapter: str | None

    @classmethod
    def of(cls, fact: Fact) -> Agreed:
        """Reads a fact, which anybody who can write to Redis may have changed."""
        value = fact.value
        if not isinstance(value, dict) or not _is_name(name := value.get("adapter", "")):
            return cls(fact.version, known=False, adapter=None)
        return cls(fact.version, known=True, adapter=name)


class SharedAdapter:
    """The fact. Every method raises RedisError if Redis does not answer or denies it."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    async def get(self) -> Agreed:
        """What the sidecars agree on now."""
        return Agreed.of(await self._facts.get(FACT))

    async def replace(
        self, agreed: Agreed, swapped: AdapterSwapped, event: CloudEvent | None = None
    ) -> bool:
        """Sets the adapter of all sidecars, unless the fact has changed since `agreed` was read.

        Args:
            event: of the swap; see `Facts.replace`.

        Returns:
            Whether it is replaced.
        """
        value = swapped.model_dump(mode="json")
        return await self._facts.replace(FACT, agreed.version, value, event)


async def adapter_at_start(
    shared: SharedAdapter, state: AdapterState, folder: Path
) -> Adapter | None:
    """The adapter to start with: that of the other sidecars, or if Redis does not answer, that of
    the last run on this machine.

    Raises:
        AdapterRejected: the folder of adapters does not hold it.
    """
    with contextlib.suppress(RedisError, TimeoutError):
        async with asyncio.timeout(_START_SECONDS):
            agreed = await shared.get()
        if agreed.known:
            return await asyncio.to_thread(adapter_named, folder, agreed.adapter)
    return await asyncio.to_thread(state.load)


def adapter_named(folder: Path, name: str | None) -> Adapter | None:
    """The adapter with exactly this name, or None for none.

    Raises:
        AdapterRejected: the folder of adapters does not hold it, or cannot be read.
    """
    if name is None:
        return None
    for found in adapters.list_adapter_dirs(folder):
        if found.name == name:
            return Adapter(found)
    raise AdapterRejected(
        f"PHI3_ADAPTER_DIR does not hold the adapter {name}, which the other sidecars use."
    )


def _is_name(value: Any) -> bool:
    """Whether it is the name of an adapter, or None."""
    if not isinstance(value, str):
        return value is None
    return Path(value).name == value and adapters.adapter_date(Path(value)) is not None
