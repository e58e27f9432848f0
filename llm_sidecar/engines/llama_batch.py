"""The requests that llama.cpp generates at the same time, as streamed answers."""

from __future__ import annotations

import collections
import contextlib
import http.client
import queue
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from llm_sidecar.engines.base import Delta, FinishReason, GenerationRequest
from llm_sidecar.engines.llama_server import shut

if TYPE_CHECKING:
    from llm_sidecar.engines.llama_cpp import LlamaCppEngine

_WAIT_SECONDS: Final = 0.02
"""How long a step waits for events; new and cancelled requests are handled between steps."""

_Received = tuple[int, Mapping[str, Any] | Exception]
"""The number of a request, and an event of its stream or the error that ended it."""


class FreeContext:
    """The tokens of llama.cpp's context that no request uses.

    All slots share the context. llama.cpp would fail every running request if it were full.
    """

    def __init__(self, tokens: int) -> None:
        self._free = tokens
        self._freed = threading.Condition()

    def try_reserve(self, tokens: int) -> bool:
        """Reserves tokens if enough are free; returns whether it did."""
        with self._freed:
            if tokens > self._free:
                return False
            self._free -= tokens
            return True

    def release(self, tokens: int) -> None:
        """Frees reserved tokens."""
        with self._freed:
            self._free += tokens
            self._freed.notify_all()

    @contextlib.contextmanager
    def reserved(self, tokens: int) -> Iterator[None]:
        """Waits until enough tokens are free, and reserves them inside this context."""
        with self._freed:
            self._freed.wait_for(lambda: tokens <= self._free)
            self._free -= tokens
        try:
            yield
        finally:
            self.release(tokens)


class StreamedCompletion:
    """One request."""

    def __init__(self, body: dict[str, Any], prompt_tokens: int, limit: int) -> None:
        self.body = body
        self.prompt_tokens = prompt_tokens
        self.size = prompt_tokens + limit
        self.connection: http.client.HTTPConnection | None = None
        self.is_removed = False
        self._cached = 0
        self._generated = 0

    def delta(self, event: Mapping[str, Any]) -> Delta:
        """The delta of an event."""
        if "prompt_progress" in event:
            self._cached = event["prompt_progress"]["cache"]
        self._generated = event.get("tokens_predicted", self._generated)
        reason: FinishReason | None = None
        if event.get("stop"):
            reason = "length" if event["stop_type"] == "limit" else "stop"
        return Delta(
            event.get("content", ""), self.prompt_tokens, self._generated, self._cached, reason
        )


class LlamaBatch:
    """See the module's docstring, and `Batch`.

    A request waits until it fits the free context.
    """

    def __init__(self, engine: LlamaCppEngine, capacity: int) -> None:
        """An empty batch."""
        self.capacity = capacity
        self._engine = engine
        self._completions: dict[int, StreamedCompletion] = {}
        self._waiting: collections.deque[int] = collections.deque()
        self._events: queue.SimpleQueue[_Received] = queue.SimpleQueue()

    def __len__(self) -> int:
        return len(self._completions)

    def add(self, number: int, request: GenerationRequest) -> None:
        """Adds a request; see `Batch`."""
        prompt = self._engine.tokenize(request)
        body = self._engine.body(request, prompt)
        self._completions[number] = StreamedCompletion(body, len(prompt), request.max_tokens)
        self._waiting.append(number)

    def remove(self, number: int) -> None:
        """Cancels a request: llama.cpp frees its slot when the connection ends."""
        completion = self._completions.pop(number)
        if completion.connection is None:
            self._waiting.remove(number)
        else:
            completion.is_removed = True
            shut(completion.connection)

    def step(self) -> list[tuple[int, Delta]]:
        """The deltas that have come; see `Batch`."""
        self._start_waiting()
        deltas = []
        for number, event in self._received():
            completion = self._completions.get(number)
            if completion is None:
                # It was removed.
                continue
            if isinstance(event, Exception):
                self._remove_all()
                raise event
            delta = completion.delta(event)
            deltas.append((number, delta))
            if delta.finish_reason is not None:
                self.remove(number)
        return deltas

    def _received(self) -> list[_Received]:
        """The events that are there or that arrive soon."""
        found: list[_Received] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._events.get(timeout=_WAIT_SECONDS))
            while True:
                found.append(self._events.get_nowait())
        return found

    def _start_waiting(self) -> None:
        """Sends the requests that fit the context beside the others, in their order."""
        while self._waiting:
            completion = self._completions[self._waiting[0]]
            if not self._engine.free_context.try_reserve(completion.size):
                return
            try:
                completion.connection = self._engine.server.connect()
            except OSError:
                self._engine.free_context.release(completion.size)
                self._remove_all()
                raise
            number = self._waiting.popleft()
            threading.Thread(target=self._read, args=(number, completion), daemon=True).start()

    def _remove_all(self) -> None:
        for number in list(self._completions):
            self.remove(number)

    def _read(self, number: int, completion: StreamedCompletion) -> None:
        """Reads the stream of one request, in a thread of its own."""
        connection = completion.connection
        assert connection is not None
        try:
            for event in self._engine.server.events(connection, "/completion", completion.body):
                self._events.put((number, event))
                if event.get("stop"):
                    return
            raise ConnectionError("the stream ended early")
        except Exception as error:  # noqa: BLE001 - `step` raises it
            if isinstance(error, OSError | http.client.HTTPException) and not completion.is_removed:
                self._engine.server.await_end()
            self._events.put((number, error))
        finally:
            connection.close()
            self._engine.free_context.release(completion.size)
