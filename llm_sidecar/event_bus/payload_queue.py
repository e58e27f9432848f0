"""The queue of a handler."""

from __future__ import annotations

import asyncio


class PayloadQueue(asyncio.Queue[str]):
    """A queue of payloads, bounded by their number and by the sum of their characters.

    While it is full, the subscriber waits. Other queues lose their oldest payload instead.
    """

    def __init__(self, messages: int, characters: int) -> None:
        super().__init__(messages)
        self._most = characters
        self._held = 0

    def full(self) -> bool:
        """Whether one more payload would exceed a bound."""
        return super().full() or self._held >= self._most

    def _put(self, item: str) -> None:
        self._held += len(item)
        super()._put(item)

    def _get(self) -> str:
        payload = super()._get()
        self._held -= len(payload)
        return payload
