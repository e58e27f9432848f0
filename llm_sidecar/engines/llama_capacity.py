"""Reservations of the slots of llama.cpp, and of the context that they share.

If the context is full, llama.cpp fails every running request. Requests beyond its slots would wait
inside it, and each would block one of the few threads that also tokenize.
"""

from __future__ import annotations

import collections
import threading


class Reservation:
    """The capacity for a request: one slot and some tokens; see `Capacity.reserve`.

    Attributes:
        tokens: number of tokens of the context.
        granted: set when the request may start.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.granted = threading.Event()


class Capacity:
    """Grants reservations in FIFO order, so that small requests never starve a large one."""

    def __init__(self, slots: int, tokens: int) -> None:
        """Starts with everything free."""
        self._slots = slots
        self._tokens = tokens
        self._waiting: collections.deque[Reservation] = collections.deque()
        self._lock = threading.Lock()

    def reserve(self, tokens: int) -> Reservation:
        """Makes a reservation, which is granted now or later; end it with `release`."""
        reservation = Reservation(tokens)
        with self._lock:
            self._waiting.append(reservation)
            self._grant()
        return reservation

    def release(self, reservation: Reservation) -> None:
        """Ends a reservation, granted or not."""
        with self._lock:
            if reservation.granted.is_set():
                self._slots += 1
                self._tokens += reservation.tokens
            else:
                self._waiting.remove(reservation)
            self._grant()

    def _grant(self) -> None:
        while self._waiting and self._slots and self._waiting[0].tokens <= self._tokens:
            first = self._waiting.popleft()
            self._slots -= 1
            self._tokens -= first.tokens
            first.granted.set()
