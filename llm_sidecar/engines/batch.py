"""Continuous batching: completions share forward passes, and join and leave between them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, Protocol

from llm_sidecar.engines.base import Delta, GenerationRequest
from llm_sidecar.engines.generation import Generation, Logits
from llm_sidecar.engines.prefixes import Prefix, S
from llm_sidecar.errors import InvalidRequest

if TYPE_CHECKING:
    from llm_sidecar.engines.decoding import Decoder

MAX_ROWS: Final = 8


class Rows(Protocol):
    """Attention states of several completions, by number."""

    def forward(self, pending: Mapping[int, Sequence[int]]) -> dict[int, Logits]:
        """Processes each row's pending tokens; returns the logits after them, (vocabulary,), by
        row."""
        ...


@dataclass(slots=True)
class _Row(Generic[S]):
    """One active request.

    Attributes:
        prefill: processes the prompt step by step; None afterwards.
        states: of the prompt, and of the completion until the row joins a shared forward pass.
        release: returns the states to the prefix cache.
    """

    generation: Generation
    prefill: Iterator[Logits | None] | None
    states: S
    release: contextlib.ExitStack


class ContinuousBatch(Generic[S]):
    """The active requests of one engine; a single request keeps its own states.

    Attributes:
        capacity: maximum number of requests.
    """

    def __init__(self, decoder: Decoder[S]) -> None:
        """Creates an empty batch."""
        self.capacity = decoder.batch_capacity
        self._decoder = decoder
        self._rows: dict[int, _Row[S]] = {}
        self._joined: Rows | None = None
        self._joined_numbers: list[int] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, number: int, request: GenerationRequest) -> None:
        """See `Batch`."""
        generation = self._decoder.start(request)
        release = contextlib.ExitStack()
        if request.prompt_logprobs is None:
            prefix = release.enter_context(self._decoder.borrow(generation.prompt, generation.size))
            prefill = self._decoder.process(prefix, generation)
        else:
            # Cached states have no logits. Do not keep these: few such prompts have a common
            # prefix.
            prefix = Prefix(self._decoder.new_states(generation.size))
            prefill = self._decoder.process_all(prefix.states, generation)
        self._rows[number] = _Row(generation, prefill, prefix.states, release)

    def remove(self, number: int) -> None:
        """See `Batch`."""
        self._rows.pop(number).release.close()
        if not self._rows:
            self._joined = None

    def step(self) -> list[tuple[int, Delta | Exception]]:
        """See `Batch`."""
        try:
            return list(self._steps())
        except Exception as error:
            for row in self._rows.values():
                # Passing on the error keeps the states out of the prefix cache.
                row.release.__exit__(type(error), error, None)
            self._rows.clear()
            self._joined = None
            raise

    def _steps(self) -> Iterator[tuple[int, Delta | Exception]]:
        decoding = {number: row for number, row in self._rows.items() if row.prefill is None}
        for number, row in list(self._rows.items()):
            if row.prefill is not None:
                yield number, self._prefill(number, row, row.prefill)
        if not decoding:
            return
        fitting = self._fitting(decoding)
        for number, logits in self._logits(fitting).items():
            yield number, self._take(number, fitting[number], logits)
        # Waiting rows get a delta too, so that they can be cancelled.
        for number in decoding.keys() - fitting.keys():
            yield number, decoding[number].generation.delta()

    def _prefill(
        self, number: int, row: _Row[S], steps: Iterator[Logits | None]
    ) -> Delta | Exception:
        logits = next(steps)
        if logits is None:
            return row.generation.delta()
        row.prefill = None
        return self._take(number, row, logits)

    def _take(self, number: int, row: _Row[S], logits: Logits) -> Delta | Exception:
        try:
            delta = row.generation.sample(logits)
        except InvalidRequest as error:
            # The guidance failed; the other requests go on.
            self.remove(number)
            return error
        if row.generation.finished:
            self.remove(number)
        return delta

    def _fitting(self, rows: dict[int, _Row[S]]) -> dict[int, _Row[S]]:
        """The rows that fit into memory, where each takes as much as the longest: joined rows
        first, then the oldest. The others wait."""
        joined = () if self._joined is None else self._joined_numbers
        longest = 0
        fitting: dict[int, _Row[S]] = {}
        for number in dict.fromkeys([*(n for n in joined if n in rows), *rows]):
            row = rows[number]
            longest = max(longest, row.generation.size)
            if fitting and (len(fitting) + 1) * longest > 2 * self._decoder.context_length:
                break
            fitting[number] = row
        return fitting

    def _logits(self, rows: dict[int, _Row[S]]) -> dict[int, Logits]:
        pending = {number: row.generation.pending for number, row in rows.items()}
        if self._joined is None and len(rows) == 1:
            ((number, row),) = rows.items()
            return {number: self._decoder.forward(pending[number], row.states)}
        if self._joined is None or self._joined_numbers != list(rows):
            states = {number: row.states for number, row in rows.items()}
            size = max(row.generation.size for row in rows.values())
            self._joined = self._decoder.join(states, size, self._joined)
            self._joined_numbers = list(rows)
        return self._joined.forward(pending)
