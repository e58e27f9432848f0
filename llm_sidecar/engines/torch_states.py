"""Attention states of several completions on torch, in one batch.

Rows of different lengths are padded on the left and masked. When a row joins or leaves, all rows
are copied.

transformers' own continuous batching (5.23) cannot replace this: its logits processors get one
number per request, not a mask of the vocabulary; `do_sample` and the random numbers belong to the
whole batch, so greedy, sampled and seeded requests cannot share one; it appends no forced tokens in
one pass; and it returns no logits, from which scores are computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from llm_sidecar.engines.batch import MAX_ROWS
from llm_sidecar.engines.generation import Logits

_CAPACITY_STEP: Final = 256
_States = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, (rows, heads, tokens, width)."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Writes states into larger buffers, so that a new token does not copy the earlier ones.

    Attributes:
        keys, values: (rows, heads, tokens, width), views of these buffers.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See the base class: adds new states, and returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers: list[torch.Tensor] = []
        start: int = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self._buffers or end > self._buffers[0].shape[-2]:
            capacity = -(-end // _CAPACITY_STEP) * _CAPACITY_STEP
            old: Sequence[torch.Tensor] = (self.keys, self.values) if start else ()
            self._buffers = [
                new.new_empty((*new.shape[:2], capacity, new.shape[3]))
                for new in (key_states, value_states)
            ]
            for larger, states in zip(self._buffers, old, strict=False):
                larger[:, :, :start] = states
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values


def empty_cache(config: Any) -> DynamicCache:
    """Creates an empty cache for a model; layers that keep all states are `GrowingLayer`s."""
    cache = DynamicCache(config=config)
    cache.layers = [
        GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def batch_capacity(config: Any) -> int:
    """The maximum number of rows in a model's batch: 1 if a row depends on the others' lengths."""
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    return MAX_ROWS if plain and rope_is_fixed(config) else 1


def rope_is_fixed(config: Any) -> bool:
    """Whether a model's rotary embeddings are the same whatever the length."""
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return rope.get("rope_type", "default") in ("default", "llama3")


class TorchRows:
    """Rows in one cache.

    Attributes:
        numbers: of the rows, in order.
    """

    def __init__(
        self, model: Any, caches: Mapping[int, DynamicCache], former: TorchRows | None
    ) -> None:
        """Joins rows.

        Args:
            model: transformers' model.
            caches: by number.
            former: the previous batch, which holds the states of some of these rows.
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
            layer = GrowingLayer()
            layer.update(
                *(
                    torch.cat([_padded_left(states[which], longest) for states in layers])
                    for which in (0, 1)
                )
            )
            self._cache.layers.append(layer)

    def states(self, number: int) -> _States:
        """The states of one row, without padding."""
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


def _padded_left(states: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(states, (0, 0, length - states.shape[-2], 0))
