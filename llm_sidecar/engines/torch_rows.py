"""Attention states of several completions on torch, side by side.

States of different lengths stand each at the right of its row, and a mask keeps each row from what
is not its own. Where rows join or leave, all are put together anew, which costs as much as copying
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from llm_sidecar.engines.batches import MOST
from llm_sidecar.engines.generation import Logits

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


class TorchRows:
    """Rows in one cache.

    Attributes:
        numbers: of its rows, in order.
    """

    def __init__(
        self, model: Any, caches: Mapping[int, DynamicCache], former: TorchRows | None
    ) -> None:
        """Puts rows together.

        Args:
            model: transformers' model.
            caches: by number.
            former: has the states of some of them.
        """
        self._model = model
        self.numbers = list(caches)
        found = [
            former.states(number)
            if former is not None and number in former.numbers
            else [(layer.keys, layer.values) for layer in cache.layers]
            for number, cache in caches.items()
        ]
        lengths = [states[0][0].shape[-2] for states in found]
        longest = max(lengths)
        first = found[0][0][0]
        self._mask = torch.zeros(len(caches), longest, dtype=torch.bool, device=first.device)
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

    def forward(self, pending: Mapping[int, Sequence[int]]) -> dict[int, Logits]:
        """See `Rows`."""
        width = max(map(len, pending.values()))
        ids = torch.zeros(len(pending), width, dtype=torch.long, device=self._mask.device)
        new = torch.zeros_like(ids, dtype=torch.bool)
        for row, tokens in enumerate(pending[number] for number in self.numbers):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            new[row, width - len(tokens) :] = True
        self._mask = torch.cat([self._mask, new], dim=1)
        positions = (self._mask.long().cumsum(1) - 1).clamp(min=0)[:, -width:]
        with torch.inference_mode():
            logits: torch.Tensor = self._model(
                input_ids=ids,
                attention_mask=self._mask.long(),
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        return dict(zip(self.numbers, logits[:, -1].float().cpu().numpy(), strict=True))


def _at_the_right(states: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(states, (0, 0, length - states.shape[-2], 0))
