"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
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


class LLMClient(Endpoints[JSON, str, bytes, bool]):
    """The blocking client; a context manager that closes it.

    Args:
        base_url: address of the sidecar; default `OSIRIS_SIDECAR_URL`, else http://localhost:8000.
        timeout: seconds for connecting, for sending, and for each wait for a byte of the answer, or
            an `httpx.Timeout`; it holds for every request. The defaults are longer than the
            sidecar's deadlines, so that its own error arrives first: 75 s, 135 s for speech, 5 s
            for `live` and `ready`, and 5 s for connecting. If the sidecar has a longer
            REQUEST_TIMEOUT_SECONDS or TTS_TIMEOUT_SECONDS, give a timeout that is longer still.
        retries: maximum number of retries after the first attempt.
        backoff_factor: seconds before the first retry; doubled for each further one, up to 30 s,
            and reduced by up to half at random. The client waits at least the seconds in
            `Retry-After`. If these are more than two minutes, it raises the error at once.
        api_key: sent as a bearer token; default `SIDECAR_API_KEY`.
        transport: sends the requests instead of the network; for tests.
        sleep: waits some seconds; for tests.
        clock: seconds since 1970; for tests.

    Raises:
        ValueError: an argument is invalid.
    """

    _http: httpx.Client

    def __init__(
        self,
        base_url: str | None = None,
        timeout: float | httpx.Timeout | None = None,
        retries: int = 3,
        backoff_factor: float = 0.5,
        api_key: str | None = None,
        transport: httpx.BaseTransport | None = None,
        *,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._core = Core(base_url, timeout, retries, backoff_factor, clock)
        if transport is None:
            self._core.proxy = proxy_for(self._core.base_url)
            transport = transport_to(self._core.base_url, self._core.proxy, httpx.HTTPTransport)
        self._http = httpx.Client(
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
    ) -> Generator[GenerationEvent, None, None]:
        """Yields the events of `generate` while the model writes; the last one is `Done`.

        It connects at the first `next`, and retries only until the first event. Close it to stop
        the generation, for example with `contextlib.closing`.

        Raises:
            LLMClientHTTPError: the generation failed.
            LLMClientConnectionError: the connection was lost; a call with the same
                `idempotency_key` continues, or gets `Done` if the generation has finished.
        """
        return self._generation(
            self._generate_stream(model_id, prompt, max_length, idempotency_key)
        )

    def stream_propose_trade_adjustments(
        self, prompt: str, max_length: int = 256, *, idempotency_key: str | None = None
    ) -> Generator[GenerationEvent, None, None]:
        """Yields the events of `propose_trade_adjustments`; see `stream_generate`."""
        return self._generation(self._propose_stream(prompt, max_length, idempotency_key))

    def stream_audio(self) -> Iterator[bytes]:
        """Yields each WAV that is published from now on, as the bytes of one file.

        It connects at the first `next`, and ends when the sidecar shuts down.

        Raises:
            LLMClientConnectionError: the connection was lost; later WAVs are missed.
        """
        response = self._run(self._audio_plan(), stream=True)
        with closing(response), as_connection_error():
            yield from filter(None, map(AudioEvents().feed, response.iter_lines()))

    def stream_events(
        self, types: Iterable[str] | None = None, last_event_id: str | None = None
    ) -> Iterator[Event]:
        """Yields each event that any sidecar adds to the stream from now on.

        It connects at the first `next`, and ends when the sidecar shuts down.

        Args:
            types: of the events; default: all.
            last_event_id: the id of the last event that the caller has; the stream continues after
                it. `0-0` begins with the oldest event. If events after it may be missing, an event
                `gap` comes first.

        Raises:
            LLMClientConnectionError: the connection was lost; call it again with the id of the last
                event.
        """
        response = self._run(self._events_plan(types, last_event_id), stream=True)
        lines, events = Lines(), EventParser()
        with closing(response), as_connection_error():
            for chunk in response.iter_bytes():
                yield from filter(None, map(events.feed, lines.feed(chunk)))

    def _generation(self, request: httpx.Request) -> Generator[GenerationEvent, None, None]:
        plan = self._core.streams(request)
        reply: Reply = None
        while True:
            with closing(self._events(self._run(plan, reply, stream=True))) as events:
                try:
                    first = next(events)
                except httpx.RequestError as error:
                    reply = error
                    continue
                except GenerationFailed as failure:
                    reply = failure.answer
                    continue
                yield first
                try:
                    with as_connection_error():
                        yield from events
                except GenerationFailed as failure:
                    raise self._core.http_error(request, failure.answer) from None
                return

    def _events(self, response: httpx.Response) -> Generator[GenerationEvent, None, None]:
        with closing(response):
            parser = GenerationParser(response)
            with parser.whole():
                for chunk in response.iter_bytes():
                    yield from parser.feed(chunk)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(
        self, plan: Plan[Any] | StreamPlan, reply: Reply = None, *, stream: bool = False
    ) -> Any:
        try:
            while True:
                step = plan.send(reply)
                if isinstance(step, httpx.Response):
                    return step
                if isinstance(step, float):
                    self._sleep(step)
                    continue
                try:
                    reply = self._http.send(step, stream=stream)
                    if stream and not reply.is_success:
                        reply.read()
                except httpx.RequestError as error:
                    reply = error
        except StopIteration as end:
            return end.value
