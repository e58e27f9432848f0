"""The requests that llama.cpp generates at the same time."""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import TYPE_CHECKING, Final

from llm_sidecar.engines.base import Delta, GenerationRequest
from llm_sidecar.engines.llama_capacity import Reservation
from llm_sidecar.engines.llama_completion import LlamaCompletion

if TYPE_CHECKING:
    from llm_sidecar.engines.llama_cpp import LlamaCppEngine

_WAIT_SECONDS: Final = 0.02
"""How long a step waits for deltas; new and cancelled requests are handled between steps."""

_Received = tuple[int, Delta | Exception]
"""The number of a request, and a delta of it or the error that ended it."""


class LlamaBatch:
    """See the module's docstring, and `Batch`.

    A request waits until it fits the capacity of llama.cpp.
    """

    def __init__(self, engine: LlamaCppEngine, capacity: int) -> None:
        """An empty batch."""
        self.capacity = capacity
        self._engine = engine
        self._completions: dict[int, LlamaCompletion] = {}
        self._waiting: dict[int, Reservation] = {}
        self._received: queue.SimpleQueue[_Received] = queue.SimpleQueue()

    def __len__(self) -> int:
        return len(self._completions)

    def add(self, number: int, request: GenerationRequest) -> None:
        """Adds a request; see `Batch`."""
        completion = LlamaCompletion(self._engine, request, self._engine.tokenize(request))
        self._completions[number] = completion
        self._waiting[number] = self._engine.capacity.reserve(completion.size)

    def remove(self, number: int) -> None:
        """Cancels a request: llama.cpp frees its slot when the connection ends."""
        completion = self._completions.pop(number)
        if number in self._waiting:
            self._engine.capacity.release(self._waiting.pop(number))
        else:
            completion.connection.cancel()

    def step(self) -> list[tuple[int, Delta | Exception]]:
        """The deltas that have come; see `Batch`."""
        self._start_granted()
        found: list[_Received] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._received.get(timeout=_WAIT_SECONDS))
            while True:
                found.append(self._received.get_nowait())
        # The other requests were removed.
        found = [(number, delta) for number, delta in found if number in self._completions]
        for number, delta in found:
            if isinstance(delta, Exception) or delta.finish_reason is not None:
                del self._completions[number]
        return found

    def _start_granted(self) -> None:
        granted = [n for n, reservation in self._waiting.items() if reservation.granted.is_set()]
        for number in granted:
            arguments = (number, self._completions[number], self._waiting.pop(number))
            threading.Thread(target=self._read, args=arguments, daemon=True).start()

    def _read(self, number: int, completion: LlamaCompletion, reservation: Reservation) -> None:
        """Reads the deltas of one request, in a thread of its own."""
        try:
            with self._engine.server.watching(completion.connection):
                for delta in completion.deltas():
                    self._received.put((number, delta))
        except Exception as error:  # noqa: BLE001 - `step` returns it
            self._received.put((number, error))
        finally:
            self._engine.capacity.release(reservation)
