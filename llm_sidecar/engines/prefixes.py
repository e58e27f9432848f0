"""Prefix cache: attention states of earlier prompts, reused by prompts that begin alike.

The system prompt and the few-shot examples of all proposals are the same, and so is a critique's
prompt but for its last line. Prefill dominates on a CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Generic, Protocol, TypeVar

MAX_KEPT: Final = 3
"""Prefixes kept at once, each as large as its longest prompt and completion: one for proposals, one
for the few-shot examples that will replace theirs, and one for everything else."""
_UNSHARED: Final = 2
"""Tokens of a prompt that are always processed."""


class States(Protocol):
    """Attention states of a token sequence.

    Attributes:
        capacity: greatest number of tokens.
        rewinds: whether they can be cut to fewer tokens.
    """

    capacity: int

    @property
    def rewinds(self) -> bool: ...

    def rewind(self, length: int) -> None:
        """Keeps the first `length` tokens, at least one."""
        ...


S = TypeVar("S", bound=States)


class Prefix(Generic[S]):
    """Prompt tokens, and the states that begin with them; whoever extends one extends both."""

    def __init__(self, states: S) -> None:
        self.states = states
        self.tokens: list[int] = []


class PrefixCache(Generic[S]):
    """The latest prefixes."""

    def __init__(self, new_states: Callable[[int], S]) -> None:
        """Creates an empty cache.

        Args:
            new_states: returns empty states with at least the given capacity.
        """
        self._new_states = new_states
        self._kept: list[Prefix[S]] = []

    @contextlib.contextmanager
    def borrow(self, prompt: Sequence[int], capacity: int) -> Iterator[Prefix[S]]:
        """The prefix that shares most with `prompt`, cut to the shared tokens, or an empty one.

        It returns to the cache afterwards, also on cancellation, but not after an error.

        Args:
            prompt: its tokens. The last two are never shared: the last one's logits are needed, and
                a single token would be computed differently (see `prefill_steps`).
            capacity: tokens that the states must hold.
        """
        prefix = self._take(prompt, capacity) or Prefix(self._new_states(capacity))
        try:
            yield prefix
        except Exception:
            raise
        except BaseException:
            self._keep(prefix)
            raise
        self._keep(prefix)

    def _take(self, prompt: Sequence[int], capacity: int) -> Prefix[S] | None:
        usable = [
            (shared_tokens(prefix.tokens, prompt), index)
            for index, prefix in enumerate(self._kept)
            if prefix.states.capacity >= capacity and prefix.states.rewinds
        ]
        length, index = max(usable, default=(0, 0))
        if length < 1:
            return None
        prefix = self._kept.pop(index)
        prefix.states.rewind(length)
        del prefix.tokens[length:]
        return prefix

    def _keep(self, prefix: Prefix[S]) -> None:
        self._kept = [*self._kept[1 - MAX_KEPT :], prefix]


def shared_tokens(cached: Sequence[int], prompt: Sequence[int]) -> int:
    """The number of cached tokens that `prompt` can reuse; it may be negative."""
    same = min(len(cached), len(prompt))
    for index, (one, other) in enumerate(zip(cached, prompt, strict=False)):
        if one != other:
            same = index
            break
    return min(same, len(prompt) - _UNSHARED)
