"""Several servers of one model: load balancing and failover."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import TypeVar

from llm_sidecar.errors import ModelUnavailable, QueueFull, SidecarError
from llm_sidecar.models.remote.server import Server

T = TypeVar("T")


class Pool:
    """The servers of one model.

    Attributes:
        servers: in the order of the settings.
    """

    def __init__(self, servers: Sequence[Server]) -> None:
        self.servers = tuple(servers)

    def reachable(self) -> list[Server]:
        """The servers that are not away."""
        return [server for server in self.servers if server.capabilities is not None]

    async def ask(
        self, work: Callable[[Server], AsyncGenerator[T, None]]
    ) -> AsyncGenerator[T, None]:
        """Yields the items of the first server that does not fail before its first item.

        The server with the fewest outstanding requests comes first.

        Raises:
            SidecarError: of `work`; QueueFull if at least one server is full.
        """
        failures: list[SidecarError] = []
        for server in self._by_load(failures):
            started = False
            try:
                async with contextlib.aclosing(work(server)) as items:
                    async for item in items:
                        started = True
                        yield item
                return
            except (QueueFull, ModelUnavailable) as error:
                if started:
                    raise
                failures.append(error)
        full = [error for error in failures if isinstance(error, QueueFull)]
        raise (full or failures)[-1]

    def _by_load(self, failures: list[SidecarError]) -> Iterator[Server]:
        """The available servers, the one with the fewest requests first; `failures` gets the errors
        of the others."""
        waiting = list(self.servers)
        while waiting:
            # Sort again for each: other requests may have started since the last one.
            server = min(waiting, key=lambda one: (one.outstanding, one.last_asked))
            waiting.remove(server)
            if (refusal := server.refusal()) is None:
                yield server
            else:
                failures.append(refusal)
