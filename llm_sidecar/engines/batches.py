"""Several completions on torch in one forward pass.

Attention states of different lengths stand side by side, each row's at the right, and a mask keeps
each row from what is not its own. Rows join and leave between two steps; then all are put together
anew, which costs as much as copying them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from llm_sidecar.engines.base import Delta, GenerationRequest
from llm_sidecar.engines.generation import Generation

if TYPE_CHECKING:
    from llm_sidecar.engines.torch import TorchEngine

MOST: Final = 8
"""Rows of a batch."""
_ROOM_STEP: Final = 256
_States = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, (rows, heads, tokens, width)."""


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Has room beyond its states, so that not all of them are copied for each token.

    Attributes:
        keys, values: (rows, heads, tokens, width), the beginning of that room.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes in new states and returns all, as the base class does."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._rooms: list[torch.Tensor] = []
        start: int = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self._rooms or end > self._rooms[0].shape[-2]:
            room = -(-end // _ROOM_STEP) * _ROOM_STEP
            old: Sequence[torch.Tensor] = (self.keys, self.values) if start else ()
            self._rooms = [
                new.new_empty((*new.shape[:2], room, new.shape[3]))
                for new in (key_states, value_states)
            ]
            for larger, states in zip(self._rooms, old, strict=False):
                larger[:, :, :start] = states
        for roomy, new in zip(self._rooms, (key_states, value_states), strict=True):
            roomy[:, :, start:end] = new
        self.keys, self.values = (roomy[:, :, :end] for roomy in self._rooms)
        return self.keys, self.values


def empty_cache(config: Any) -> DynamicCache:
    """A cache for a model, roomy where its layers keep all they have read."""
    cache = DynamicCache(config=config)
    cache.layers = [
        RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def most_together(config: Any) -> int:
    """How many rows a batch of a model may have: more than one only where no row's positions and
    states depend on the others'."""
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    return MOST if plain and rope.get("rope_type", "default") in ("default", "llama3") else 1


@dataclass(slots=True)
class _Row:
    """One request under way.

    Attributes:
        reading: reads its prompt step by step; None once that is done.
        cache: its own states; while it is in a batch it has what was read before it joined.
        borrowed: gives the cache back.
    """

    generation: Generation
    reading: Iterator[None] | None
    cache: DynamicCache
    borrowed: contextlib.ExitStack


class _Batch:
    """Rows in one cache.

    Attributes:
        numbers: of its rows, in order.
    """

    def __init__(self, rows: dict[int, _Row], former: _Batch | None) -> None:
        """Puts rows together.

        Args:
            rows: by number.
            former: has the states of some of them.
        """
        self.numbers = list(rows)
        found = [
            former.states(number)
            if former is not None and number in former.numbers
            else [(layer.keys, layer.values) for layer in row.cache.layers]
            for number, row in rows.items()
        ]
        lengths = [states[0][0].shape[-2] for states in found]
        longest = max(lengths)
        first = found[0][0][0]
        self._mask = torch.zeros(len(rows), longest, dtype=torch.bool, device=first.device)
        for row, length in enumerate(lengths):
            self._mask[row, longest - length :] = True
        self._cache = DynamicCache()
        for layers in zip(*found, strict=True):
            roomy = RoomyLayer()
            roomy.update(
                *(
                    torch.cat([_at_the_right(states[which], longest) for states in layers])
                    for which in (0, 1)
                )
            )
            self._cache.layers.append(roomy)

    def states(self, number: int) -> _States:
        """A row's own, without the gaps."""
        row = self.numbers.index(number)
        own = self._mask[row]
        return [
            (layer.keys[row : row + 1, :, own], layer.values[row : row + 1, :, own])
            for layer in self._cache.layers
        ]

    def forward(self, model: Any, pending: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits (rows, vocabulary) after each row's pending tokens, which the cache takes in."""
        width = max(map(len, pending))
        ids = torch.zeros(len(pending), width, dtype=torch.long, device=self._mask.device)
        new = torch.zeros_like(ids, dtype=torch.bool)
        for row, tokens in enumerate(pending):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            new[row, width - len(tokens) :] = True
        self._mask = torch.cat([self._mask, new], dim=1)
        positions = (self._mask.long().cumsum(1) - 1).clamp(min=0)[:, -width:]
        with torch.inference_mode():
            logits: torch.Tensor = model(
                input_ids=ids,
                attention_mask=self._mask.long(),
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        return logits[:, -1]


def _at_the_right(states: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(states, (0, 0, length - states.shape[-2], 0))


class Batches:
    """The requests that one engine has under way; one alone goes the engine's usual way.

    Attributes:
        most: how many there may be.
    """

    def __init__(self, engine: TorchEngine) -> None:
        """Runs nothing."""
        self.most = most_together(engine.model.config)
        self._engine = engine
        self._rows: dict[int, _Row] = {}
        self._batch: _Batch | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, number: int, request: GenerationRequest) -> None:
        """See `Together`."""
        generation = self._engine.begin(request)
        borrowed = contextlib.ExitStack()
        kept = borrowed.enter_context(self._engine.borrowed(generation))
        reading = self._engine.read(kept, generation.prompt[:-1])
        self._rows[number] = _Row(generation, reading, kept.cache.states, borrowed)

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
        for (number, row), logits in zip(writing.items(), self._logits(writing), strict=True):
            yield number, row.generation.take(logits)
            if row.generation.over:
                self.remove(number)

    def _logits(self, rows: dict[int, _Row]) -> torch.Tensor:
        if self._batch is None and len(rows) == 1:
            (row,) = rows.values()
            return self._engine.forward(row.generation.pending, row.cache)
        if self._batch is None or self._batch.numbers != list(rows):
            self._batch = _Batch(rows, self._batch)
        return self._batch.forward(
            self._engine.model, [row.generation.pending for row in rows.values()]
        )
