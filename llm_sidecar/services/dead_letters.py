"""Lists dead letters in pages, and puts them back into the inbox."""

from __future__ import annotations

from typing import Final, NamedTuple

from llm_sidecar.event_bus.dead_letters import DEAD, DeadLetter, DeadLetters
from llm_sidecar.services.redis_errors import as_unavailable

_CHUNK: Final = 20
"""Dead letters that are read from Redis at once."""
_PAGE_CHARACTERS: Final = 4 << 20
"""A page ends early beyond this size, because other services choose the length of their entries."""


class Page(NamedTuple):
    """Some dead letters, newest first.

    Attributes:
        letters: of this page.
        next: `before` for the next page; None on the last page.
    """

    letters: list[DeadLetter]
    next: str | None


async def page(stream: DeadLetters, limit: int, before: str | None) -> Page:
    """The newest dead letters, newest first.

    Args:
        stream: where they are.
        limit: their maximum number; fewer are returned if they are long.
        before: the id of a dead letter; only older ones are returned.

    Raises:
        ValueError: `before` is not an id.
        Unavailable: Redis does not answer, or denies the stream.
    """
    letters: list[DeadLetter] = []
    characters = 0
    with as_unavailable(f"the stream {DEAD}"):
        while len(letters) < limit and characters < _PAGE_CHARACTERS:
            last = letters[-1].id if letters else before
            wanted = min(_CHUNK, limit - len(letters))
            found = await stream.page(wanted + 1, last)
            letters += found[:wanted]
            characters += sum(len(text) for letter in found for text in letter.fields.values())
            if len(found) <= wanted:
                return Page(letters, None)
    return Page(letters, letters[-1].id)


async def requeue(stream: DeadLetters, dead_id: str) -> str:
    """Puts a dead letter back into the inbox, as a new entry; returns the entry's id.

    Raises:
        NotFound: there is no such dead letter.
        Unavailable: Redis does not answer, or denies a stream.
    """
    with as_unavailable(f"the stream {DEAD}"):
        return await stream.requeue(dead_id)
