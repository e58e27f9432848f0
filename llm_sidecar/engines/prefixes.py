"""Prefix reuse: a prompt that begins like an earlier one is read from where they part.

The system prompt and the few-shot examples of a proposal, and all but the last line of a critique
and its score, are the same each time, and reading a prompt is what takes longest on a CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Final, Generic, Protocol, TypeVar

MOST_KEPT: Final = 3
"""Caches kept at once, each as large as its longest prompt and answer: one for proposals, one for
the examples that are about to replace theirs, one for everything else."""


_LEFT: Final = 2
"""Tokens of a prompt that are always read."""


class Cache(Protocol):
    """Attention states of a token sequence.

    Attributes:
        room: greatest number of tokens that it takes.
        rewinds: whether it can forget its last tokens.
    """

    room: int

    @property
    def rewinds(self) -> bool: ...

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens, of which there is at least one."""
        ...


K = TypeVar("K", bound=Hashable)
C = TypeVar("C", bound=Cache)


class Kept(Generic[C]):
    """A cache and the prompt tokens that it begins with; who reads more appends to both."""

    def __init__(self, cache: C) -> None:
        self.cache = cache
        self.tokens: list[int] = []


class Prefixes(Generic[K, C]):
    """The latest caches, each for prompts of one kind."""

    def __init__(self, make: Callable[[K, int], C]) -> None:
        """Keeps nothing yet.

        Args:
            make: an empty cache for prompts of a kind, with at least so much room.
        """
        self._make = make
        self._kept: list[tuple[K, Kept[C]]] = []

    @contextlib.contextmanager
    def borrowed(self, kind: K, prompt: Sequence[int], room: int) -> Iterator[Kept[C]]:
        """The cache that shares most with `prompt`, cut to what they share, or an empty one.

        It is kept for the next prompt, also where its user is cancelled, and not where it fails.

        Args:
            kind: only caches of the same one are shared.
            prompt: its tokens. The last two are always left to be read: the logits of the last one
                are wanted, and one token alone would be reckoned otherwise (see `prefill_steps`).
            room: tokens that the cache must take.
        """
        kept = self._take(kind, prompt, room) or Kept(self._make(kind, room))
        try:
            yield kept
        except Exception:
            raise
        except BaseException:
            self._keep(kind, kept)
            raise
        self._keep(kind, kept)

    def _take(self, kind: K, prompt: Sequence[int], room: int) -> Kept[C] | None:
        suited = [
            (shared_prefix(kept.tokens, prompt), index)
            for index, (its_kind, kept) in enumerate(self._kept)
            if its_kind == kind and kept.cache.room >= room and kept.cache.rewinds
        ]
        length, index = max(suited, default=(0, 0))
        if length < 1:
            return None
        _, kept = self._kept.pop(index)
        kept.cache.rewind(length)
        del kept.tokens[length:]
        return kept

    def _keep(self, kind: K, kept: Kept[C]) -> None:
        self._kept = [*self._kept[1 - MOST_KEPT :], (kind, kept)]


def shared_prefix(read: Sequence[int], prompt: Sequence[int]) -> int:
    """How many of the tokens that were read need not be read for `prompt`, or less than 1."""
    same = min(len(read), len(prompt))
    for index, (one, other) in enumerate(zip(read, prompt, strict=False)):
        if one != other:
            same = index
            break
    return min(same, len(prompt) - _LEFT)
