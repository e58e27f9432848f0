"""A language model on other servers that speak OpenAI's protocol: `ChatModel` over HTTP.

The servers can be vLLM, SGLang, Ollama, llama.cpp, Ray Serve, another sidecar, and others. They
queue and batch requests themselves; this module only bounds the number of requests. Closing a
stream closes its connection, so that the server stops.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Final

import httpx
from pydantic import SecretStr

from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.logs import start_detached
from llm_sidecar.models.base import (
    Adapter,
    ChatModel,
    ChoiceScores,
    Delta,
    GenerationRequest,
    Message,
    ModelStatus,
    Question,
    RefusedRequest,
)
from llm_sidecar.models.local.load_state import ModelLimits
from llm_sidecar.models.local.request_queue import RequestQueue
from llm_sidecar.models.remote.adapters import LoadedAdapter
from llm_sidecar.models.remote.asking import generate
from llm_sidecar.models.remote.connection import Connection, make_client
from llm_sidecar.models.remote.pool import Pool
from llm_sidecar.models.remote.scoring import score
from llm_sidecar.models.remote.server import RUNTIME, Server
from llm_sidecar.tasks import all_of
from llm_sidecar.telemetry.calls import CallObserver, ModelCall, Observers, Operation, observed

_CHECK_SECONDS: Final = 10.0
"""Seconds between two checks of an idle server."""
_QUESTIONS_AT_ONCE: Final = 4
"""Maximum number of questions of one request that are asked at the same time."""
_FURTHER_CONNECTIONS: Final = 8
"""Connections in addition to those of requests: for contacts, checks and adapters."""


class RemoteModel(ChatModel):
    """One model on one or several servers; see the module's docstring."""

    # Not every server follows the guidance.
    valid_by_construction = False

    def __init__(
        self,
        name: str,
        urls: Sequence[SecretStr],
        *,
        model: str | None = None,
        key: SecretStr | None = None,
        limits: ModelLimits | None = None,
        observer: CallObserver | None = None,
        on_ready: Callable[[], None] = lambda: None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Contacts nothing.

        Args:
            name: `phi3` or `hermes`.
            urls: of the servers.
            model: its name on the servers; None for the only one that a server lists.
            key: of the servers.
            limits: bounds of queue and time.
            observer: receives the start and the end of each call.
            on_ready: called whenever a server becomes reachable.
            transport: sends the requests instead of the network; for tests.
        """
        self._name = name
        self._limits = limits or ModelLimits()
        self._observer = observer or Observers()
        self._on_ready = on_ready
        connections = self._limits.queue_length * _QUESTIONS_AT_ONCE + _FURTHER_CONNECTIONS
        self._client = make_client(connections, transport)
        self._pool = Pool(
            [Server(name, Connection(self._client, name, url, key), model) for url in urls]
        )
        self._queue = RequestQueue(name, self._limits.queue_length)
        # The servers do the queueing.
        self._queue.grow(self._limits.queue_length)
        self._adapter: Adapter | None = None
        self._swap = asyncio.Lock()
        self._watchers: list[asyncio.Task[None]] = []
        self._contacted = asyncio.Event()
        self._completion_tokens = 0
        self._draining = False
        self._closed = False

    async def stream(
        self,
        request: GenerationRequest,
        deadline: Deadline | None = None,
        *,
        allow_partial: bool = False,
    ) -> AsyncGenerator[Delta, None]:
        """Generates; see `ChatModel.stream`."""
        deadline = deadline or Deadline.after(self._limits.request_timeout)
        async with self._call("generate", deadline) as call:
            deltas = self._pool.ask(
                lambda server: generate(server, call, request, deadline), deadline
            )
            try:
                async with contextlib.aclosing(deltas):
                    async for delta in deltas:
                        yield delta
            except TimeoutError:
                if not (allow_partial and call.completion_tokens):
                    raise
                call.finish_reason = "deadline"
                yield Delta.of(call, "")

    async def score_choices(
        self,
        messages: Sequence[Message],
        choices: Sequence[str],
        deadline: Deadline | None = None,
    ) -> ChoiceScores:
        """Scores; see `ChatModel.score_choices`."""
        (scores,) = await self.score_questions([Question(messages, choices)], deadline)
        return scores

    async def score_questions(
        self, questions: Sequence[Question], deadline: Deadline | None = None
    ) -> list[ChoiceScores]:
        """Scores, a few questions at once; see `ChatModel.score_questions`."""
        deadline = deadline or Deadline.after(self._limits.request_timeout)
        async with self._call("score_choices", deadline) as call:
            # A half-open circuit breaker would refuse all questions but the first.
            at_once = _QUESTIONS_AT_ONCE if self._pool.takes_several() else 1
            turns = asyncio.Semaphore(at_once)

            async def answer(question: Question) -> ChoiceScores:
                async with turns:
                    return await self._score(call, question, deadline)

            try:
                return await all_of([answer(question) for question in questions])
            except RefusedRequest as error:
                # The sidecar wrote this request, not its client.
                raise ModelUnavailable(error.detail, retry_after=5) from None

    async def use_adapter(self, adapter: Adapter | None) -> None:
        """Loads an adapter on all reachable servers at once, under new names, and switches to it.

        If one of them cannot load it, none of them keeps it.
        """
        async with self._swap:
            await self._contact()
            try:
                loaded = await self._load(adapter)
                self._adapter = adapter
                for (server, outages), loaded_adapter in loaded.items():
                    if server.outages == outages:
                        server.adapters.use(loaded_adapter)
            finally:
                servers = self._pool.reachable()
                await asyncio.gather(*(server.adapters.unload_unused() for server in servers))

    async def start(self, adapter: Adapter | None = None) -> None:
        """Starts to probe the servers, and to watch them, in the background."""
        self._adapter = adapter
        self._watchers = [start_detached(self._watch(server)) for server in self._pool.servers]

    def status(self) -> ModelStatus:
        """The state since the last contact with the servers."""
        servers = self._pool.servers
        label = next((server.label for server in servers if server.label), None)
        ready = self._is_available()
        is_new = any(server.is_new for server in servers)
        return ModelStatus(
            state="ready" if ready else "loading" if is_new else "failed",
            reason=None if ready or is_new else self._reason(),
            not_ready=None if ready else self._reason(),
            model=label,
            adapter=self._adapter,
            runtime=RUNTIME if ready else None,
            restarts=sum(server.outages for server in servers),
            completion_tokens_total=self._completion_tokens,
            requests=self._queue.admitted,
            running=self._queue.running,
            queue_length=self._queue.length,
            servers=tuple(server.status() for server in servers),
        )

    def drain(self) -> None:
        """Refuses requests that wait for the first contact with the servers, from now on."""
        self._draining = True
        self._wake()

    async def close(self, grace: float = 0.0) -> None:
        """Refuses new requests, gives running ones `grace` seconds, then closes all connections."""
        self._closed = True
        self.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._queue.idle.wait()
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await self._client.aclose()

    async def _score(self, call: ModelCall, question: Question, deadline: Deadline) -> ChoiceScores:
        scores = self._pool.ask(lambda server: score(server, call, question, deadline), deadline)
        async with contextlib.aclosing(scores):
            return await anext(scores)

    @contextlib.asynccontextmanager
    async def _call(self, operation: Operation, deadline: Deadline) -> AsyncIterator[ModelCall]:
        """Admits and observes a request; turns a TimeoutError into a DeadlineExceeded."""
        with observed(self._observer, ModelCall(self._name, operation)) as call:
            if self._closed:
                raise ModelUnavailable("The server is shutting down.", retry_after=5)
            with self._queue.admit():
                try:
                    await self._contact_until(deadline)
                    async with self._queue.turn(deadline):
                        self._queue.running += 1
                        try:
                            yield call
                        finally:
                            self._queue.running -= 1
                            self._completion_tokens += call.completion_tokens
                except TimeoutError:
                    raise deadline.exceeded(call, self._queue.retry_after()) from None

    async def _contact_until(self, deadline: Deadline) -> None:
        """`_contact`; raises ModelUnavailable if no server is available at the deadline, or when
        the sidecar shuts down."""
        if self._is_available():
            return
        try:
            async with deadline.timeout():
                await self._contact()
        except TimeoutError:
            raise ModelUnavailable(self._reason(), retry_after=5) from None
        if self._draining and not self._is_available():
            raise ModelUnavailable("The server is shutting down; try again.", retry_after=5)

    async def _contact(self) -> None:
        """Waits until a server is available, or no first contact is left to wait for. Without
        watchers, contacts all servers that are away."""
        if not self._watchers and not self._is_available():
            servers = self._pool.servers
            await asyncio.gather(*(server.contact(lambda: self._adapter) for server in servers))
        while any(server.is_new for server in self._pool.servers):
            if self._draining or self._is_available():
                return
            await self._contacted.wait()

    def _wake(self) -> None:
        """Lets all requests that wait now look again."""
        self._contacted.set()
        self._contacted.clear()

    def _is_available(self) -> bool:
        return any(server.is_available for server in self._pool.servers)

    async def _load(
        self, adapter: Adapter | None
    ) -> dict[tuple[Server, int], LoadedAdapter | None]:
        """Loads an adapter on all reachable servers; the keys have their numbers of outages."""
        loaded: dict[tuple[Server, int], LoadedAdapter | None] = {}
        # A server may become reachable meanwhile, with the adapter that is still in use.
        while further := [
            key
            for server in self._pool.reachable()
            if (key := (server, server.outages)) not in loaded
        ]:
            loads = [server.load(adapter) for server, _ in further]
            results = await asyncio.gather(*loads, return_exceptions=True)
            for key, result in zip(further, results, strict=True):
                if isinstance(result, BaseException):
                    raise result
                loaded[key] = result
        if not loaded:
            raise ModelUnavailable(self._reason(), retry_after=5)
        return loaded

    async def _watch(self, server: Server) -> None:
        """Contacts a server until it is reachable, then checks it until it is lost; and again."""
        while True:
            if server.capabilities is None:
                await server.contact(lambda: self._adapter)
                self._wake()
                if server.capabilities is not None:
                    self._on_ready()
            else:
                await server.check()
            pause = _CHECK_SECONDS if server.capabilities else server.retry_seconds
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await server.lost.wait()
                    # The server is away: wait before the next contact.
                    await asyncio.sleep(server.retry_seconds)

    def _reason(self) -> str:
        """Why no server is available."""
        reasons = [error.detail for server in self._pool.servers if (error := server.refusal())]
        return " ".join(reasons)
