"""Converts errors of Redis for a caller that asks for data that only Redis has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from redis.exceptions import NoPermissionError, RedisError

from llm_sidecar.errors import Unavailable

_RETRY_AWAY: Final = 5
_RETRY_DENIED: Final = 30
"""Seconds; long, because an operator has to change the permission."""


@contextlib.contextmanager
def as_unavailable(what: str) -> Iterator[None]:
    """Converts an error of Redis to one for the caller.

    Args:
        what: what is read or written, such as `the stream osiris.events`.

    Raises:
        Unavailable: Redis does not answer, or denies it.
    """
    try:
        yield
    except NoPermissionError:
        raise Unavailable(
            f"Redis denies {what} to the sidecar's user; docs/operations.md lists the permissions "
            "that it needs.",
            retry_after=_RETRY_DENIED,
        ) from None
    except RedisError:
        raise Unavailable(
            f"Redis is away or cannot serve {what}; try again.",
            retry_after=_RETRY_AWAY,
        ) from None
