"""Prefix cache: attention states of earlier prompts, reused by prompts that begin alike.

All proposals share the system prompt and the few-shot examples, and a critique and its score share
all but the last line of the prompt. Prefill dominates the time on a CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Generic, Protocol, TypeVar

MAX_KEPT: Final = 3
"""Number of cached prefixes, each as large as its longest prompt and completion: one for proposals,
one for the few-shot examples that will replace the current ones, and one for everything else."""
UNSHARED: Final = 2
"""Tokens of a prompt that are always processed."""


class States(Protocol):
    """Attention states of a token sequence.

    Attributes:
        capacity: maximum number of tokens.
        rewinds: whether `rewind` can drop tokens.
    """

    capacity: int

    @property
    def rewinds(self) -> bool: ...

    def rewind(self, length: int) -> None:
        """Keeps the first `length` tokens, at least one."""
        ...


S = TypeVar("S", bound=States)


class Prefix(Generic[S]):
    """Prompt tokens, and states that begin with theirs. Code that extends one also extends the
    other."""

    def __init__(self, states: S) -> None:
        self.states = states
        self.tokens: list[int] = []


class PrefixCache(Generic[S]):
    """Keeps the most recently used prefixes."""

    def __init__(self, new_states: Callable[[int], S]) -> None:
        """Creates an empty cache.

        Args:
            new_states: returns empty states with at least the given capacity.
        """
        self._new_states = new_states
        self._kept: list[Prefix[S]] = []

    @contextlib.contextmanager
    def borrow(self, prompt: Sequence[int], capacity: int) -> Iterator[Prefix[S]]:
        """Lends the prefix that shares most tokens with `prompt`, cut to these, or an empty one.

        The prefix returns to the cache at the end of the context, unless there was an error; a
        cancellation is not one.

        Args:
            prompt: its tokens. The last two are never shared: the last one's logits are needed, and
                a single token would be computed differently (see `prefill_steps`).
            capacity: number of tokens that the states must hold.
        """
        prefix = self._take(prompt, capacity) or Prefix(self._new_states(capacity))
        try:
            yield prefix
        except Exception:
            # The error may have left states and tokens that do not match.
            raise
        except BaseException:
            # A cancellation comes between two steps, where they match.
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
    return min(same, len(prompt) - UNSHARED)
