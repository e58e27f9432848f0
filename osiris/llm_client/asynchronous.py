"""The client for asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
)
from contextlib import aclosing
from typing import Any, Self

import httpx

from osiris.llm_client.core import (
    Core,
    Plan,
    Reply,
    StreamPlan,
    as_connection_error,
    authorization,
)
from osiris.llm_client.endpoints import JSON, Endpoints
from osiris.llm_client.generation_events import (
    GenerationEvent,
    GenerationFailed,
    GenerationParser,
)
from osiris.llm_client.proxies import proxy_for, transport_to
from osiris.llm_client.server_sent_events import AudioEvents, Event, EventParser, Lines


class AsyncLLMClient(
    Endpoints[
        Coroutine[Any, Any, JSON],
        Coroutine[Any, Any, str],
        Coroutine[Any, Any, bytes],
        Coroutine[Any, Any, bool],
    ]
):
    """`LLMClient` for asyncio: the same arguments and methods, each to be awaited."""

    _http: httpx.AsyncClient

    def __init__(
        self,
        base_url: str | None = None,
        timeout: float | httpx.Timeout | None = None,
        retries: int = 3,
        backoff_factor: float = 0.5,
        api_key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        *,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._core = Core(base_url, timeout, retries, backoff_factor, clock)
        if transport is None:
            self._core.proxy = proxy_for(self._core.base_url)
            transport = transport_to(
                self._core.base_url, self._core.proxy, httpx.AsyncHTTPTransport
            )
        self._http = httpx.AsyncClient(
            base_url=self._core.base_url,
            headers=authorization(api_key, self._core.base_url),
            transport=transport,
        )
        self._sleep = sleep

    def stream_generate(
        self,
        model_id: str,
        prompt: str,
        max_length: int = 256,
        *,
        idempotency_key: str | None = None,
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Like `LLMClient.stream_generate`, for `async for`; close it with `aclosing`."""
        return self._generation(
            self._generate_stream(model_id, prompt, max_length, idempotency_key)
        )

    def stream_propose_trade_adjustments(
        self, prompt: str, max_length: int = 256, *, idempotency_key: str | None = None
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Like `LLMClient.stream_propose_trade_adjustments`; see `stream_generate`."""
        return self._generation(self._propose_stream(prompt, max_length, idempotency_key))

    async def stream_audio(self) -> AsyncIterator[bytes]:
        """Like `LLMClient.stream_audio`, for `async for`."""
        response = await self._run(self._audio_plan(), stream=True)
        events = AudioEvents()
        async with aclosing(response):
            with as_connection_error():
                async for line in response.aiter_lines():
                    if wav := events.feed(line):
                        yield wav

    async def stream_events(
        self, types: Iterable[str] | None = None, last_event_id: str | None = None
    ) -> AsyncIterator[Event]:
        """Like `LLMClient.stream_events`, for `async for`."""
        response = await self._run(self._events_plan(types, last_event_id), stream=True)
        lines, events = Lines(), EventParser()
        async with aclosing(response):
            with as_connection_error():
                async for chunk in response.aiter_bytes():
                    for event in filter(None, map(events.feed, lines.feed(chunk))):
                        yield event

    async def _generation(self, request: httpx.Request) -> AsyncGenerator[GenerationEvent, None]:
        plan = self._core.streams(request)
        reply: Reply = None
        while True:
            async with aclosing(self._events(await self._run(plan, reply, stream=True))) as events:
                try:
                    first = await anext(events)
                except httpx.RequestError as error:
                    reply = error
                    continue
                except GenerationFailed as failure:
                    reply = failure.answer
                    continue
                yield first
                try:
                    with as_connection_error():
                        async for event in events:
                            yield event
                except GenerationFailed as failure:
                    raise self._core.http_error(request, failure.answer) from None
                return

    async def _events(self, response: httpx.Response) -> AsyncGenerator[GenerationEvent, None]:
        async with aclosing(response):
            parser = GenerationParser(response)
            with parser.whole():
                async for chunk in response.aiter_bytes():
                    for event in parser.feed(chunk):
                        yield event

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _run(
        self, plan: Plan[Any] | StreamPlan, reply: Reply = None, *, stream: bool = False
    ) -> Any:
        try:
            while True:
                step = plan.send(reply)
                if isinstance(step, httpx.Response):
                    return step
                if isinstance(step, float):
                    await self._sleep(step)
                    continue
                try:
                    reply = await self._http.send(step, stream=stream)
                    if stream and not reply.is_success:
                        await reply.aread()
                except httpx.RequestError as error:
                    reply = error
        except StopIteration as end:
            return end.value
