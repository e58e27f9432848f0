"""Several servers of one model: load balancing and failover."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import TypeVar

from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import ModelUnavailable, QueueFull, SidecarError
from llm_sidecar.models.remote.server import Server
from llm_sidecar.models.remote.silence import Silent, silence_limit

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

    def takes_several(self) -> bool:
        """Whether several requests may be sent at once, because one of the servers takes them."""
        return any(server.takes_several for server in self.servers)

    async def ask(
        self, work: Callable[[Server], AsyncGenerator[T, None]], deadline: Deadline
    ) -> AsyncGenerator[T, None]:
        """Yields the items of the first server that does not fail before its first item.

        The server with the fewest outstanding requests comes first. If it sends nothing for half of
        the time until the deadline, and another one is available, that one is asked.

        Raises:
            SidecarError: of `work`; QueueFull if at least one server is full.
            TimeoutError: of `work`.
        """
        failures: list[SidecarError] = []
        for server, has_next in self._by_load(failures):
            started = False
            patience = deadline.remaining() / 2 if has_next else None
            try:
                async with contextlib.aclosing(work(server)) as items:
                    async with silence_limit(server.connection, patience):
                        first = await anext(items)
                    started = True
                    yield first
                    async for item in items:
                        yield item
                return
            except Silent as error:
                failures.append(server.fell_silent(error.seconds))
            except (QueueFull, ModelUnavailable) as error:
                if started:
                    raise
                failures.append(error)
        full = [error for error in failures if isinstance(error, QueueFull)]
        raise (full or failures)[-1]

    def _by_load(self, failures: list[SidecarError]) -> Iterator[tuple[Server, bool]]:
        """The available servers, the one with the fewest requests first, and whether another one is
        available; `failures` gets the errors of those that are not."""
        waiting = list(self.servers)
        while waiting:
            # Sort again for each: other requests may have started since the last one.
            server = min(waiting, key=lambda server: (server.outstanding, server.last_asked))
            waiting.remove(server)
            if (refusal := server.refusal()) is None:
                yield server, any(other.refusal() is None for other in waiting)
            else:
                failures.append(refusal)
