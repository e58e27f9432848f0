"""Several completions in one forward pass, whatever runs it: rows join and leave between steps."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

from llm_sidecar.engines.base import Delta, GenerationRequest
from llm_sidecar.engines.generation import Generation, Logits
from llm_sidecar.engines.prefixes import Cache, Kept

MOST: Final = 8
"""Rows of a batch."""

C = TypeVar("C", bound=Cache)


class Rows(Protocol):
    """Attention states of several completions, by number."""

    def forward(self, pending: Mapping[int, Sequence[int]]) -> dict[int, Logits]:
        """Logits, (vocabulary,), after each row's pending tokens, which the states take in."""
        ...


class BatchingEngine(Protocol[C]):
    """What an engine must be able to do so that its completions can go together.

    Attributes:
        most_together: how many may.
        context_length: tokens of one; a batch has memory for twice as many.
    """

    most_together: int
    context_length: int

    def begin(self, request: GenerationRequest) -> Generation:
        """A completion of which nothing has been read.

        Raises:
            InvalidRequest: prompt and completion do not fit the context.
        """
        ...

    def borrowed(self, generation: Generation) -> contextlib.AbstractContextManager[Kept[C]]:
        """The states to write a completion with, of whose prompt some may have been read."""
        ...

    def reading(self, generation: Generation, kept: Kept[C]) -> Iterator[None]:
        """Reads what is left of the prompt but for its last token, in steps, after each of which it
        can be cancelled."""
        ...

    def forward(self, tokens: Sequence[int], cache: C, keep: int = 1) -> Logits:
        """Logits (keep, vocabulary) of the last positions; `cache` takes in the tokens."""
        ...

    def joined(self, caches: Mapping[int, C], size: int, former: Any) -> Rows:
        """Puts rows together.

        Args:
            caches: of all, by number, with what was read before each joined.
            size: tokens of the longest row, its completion included.
            former: what this returned last, or None; its states move to the new rows, and it cannot
                be used afterwards.
        """
        ...


def stream_alone(engine: BatchingEngine[C], request: GenerationRequest) -> Generator[Delta]:
    """One completion by itself, as `Engine.stream` gives it."""
    generation = engine.begin(request)
    with engine.borrowed(generation) as kept:
        for _ in engine.reading(generation, kept):
            yield generation.delta()
        while not generation.over:
            yield generation.take(engine.forward(generation.pending, kept.cache)[-1])


@dataclass(slots=True)
class _Row(Generic[C]):
    """One request under way.

    Attributes:
        reading: reads its prompt step by step; None once that is done.
        cache: its own states; while it is in a batch it has what was read before it joined.
        borrowed: gives the cache back.
    """

    generation: Generation
    reading: Iterator[None] | None
    cache: C
    borrowed: contextlib.ExitStack


class Batches(Generic[C]):
    """The requests that one engine has under way; one alone goes the engine's usual way.

    Attributes:
        most: how many there may be.
    """

    def __init__(self, engine: BatchingEngine[C]) -> None:
        """Runs nothing."""
        self.most = engine.most_together
        self._engine = engine
        self._rows: dict[int, _Row[C]] = {}
        self._batch: Rows | None = None
        self._batched: list[int] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, number: int, request: GenerationRequest) -> None:
        """See `Together`."""
        generation = self._engine.begin(request)
        borrowed = contextlib.ExitStack()
        kept = borrowed.enter_context(self._engine.borrowed(generation))
        reading = self._engine.reading(generation, kept)
        self._rows[number] = _Row(generation, reading, kept.cache, borrowed)

    def remove(self, number: int) -> None:
        """See `Together`."""
        self._rows.pop(number).borrowed.close()
        if not self._rows:
            self._batch = None

    def step(self) -> list[tuple[int, Delta]]:
        """See `Together`."""
        try:
            return list(self._steps())
        except Exception as error:
            for row in self._rows.values():
                # So that what it has read is not kept.
                row.borrowed.__exit__(type(error), error, None)
            self._rows.clear()
            self._batch = None
            raise

    def _steps(self) -> Iterator[tuple[int, Delta]]:
        writing = {number: row for number, row in self._rows.items() if row.reading is None}
        for number, row in self._rows.items():
            if row.reading is not None:
                if next(row.reading, True):
                    row.reading = None
                yield number, row.generation.delta()
        if not writing:
            return
        fitting = self._that_fit(writing)
        for number, logits in self._logits(fitting).items():
            row = fitting[number]
            yield number, row.generation.take(logits)
            if row.generation.over:
                self.remove(number)
        # Those that wait can be given up, too.
        for number in writing.keys() - fitting.keys():
            yield number, writing[number].generation.delta()

    def _that_fit(self, rows: dict[int, _Row[C]]) -> dict[int, _Row[C]]:
        """The rows for which there is memory, all taking as much as the longest: those that are in
        the batch, then those that came first. The others wait."""
        batched = () if self._batch is None else self._batched
        longest = 0
        fitting: dict[int, _Row[C]] = {}
        for number in dict.fromkeys([*(n for n in batched if n in rows), *rows]):
            row = rows[number]
            longest = max(longest, _size(row))
            if fitting and (len(fitting) + 1) * longest > 2 * self._engine.context_length:
                break
            fitting[number] = row
        return fitting

    def _logits(self, rows: dict[int, _Row[C]]) -> dict[int, Logits]:
        if self._batch is None and len(rows) == 1:
            ((number, row),) = rows.items()
            return {number: self._engine.forward(row.generation.pending, row.cache)[-1]}
        if self._batch is None or self._batched != list(rows):
            caches = {number: row.cache for number, row in rows.items()}
            size = max(_size(row) for row in rows.values())
            self._batch = self._engine.joined(caches, size, self._batch)
            self._batched = list(rows)
        return self._batch.forward({number: row.generation.pending for number, row in rows.items()})


def _size(row: _Row[Any]) -> int:
    """Tokens of a row with its longest possible completion."""
    return len(row.generation.prompt) + row.generation.limit
