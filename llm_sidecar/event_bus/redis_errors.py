"""Classifies errors of Redis."""

from __future__ import annotations

import re
from typing import Final

from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    RedisError,
    ResponseError,
)

from llm_sidecar.errors import SidecarError

_QUOTED: Final = re.compile(r"\(([\"'])(.*)\1,\)", re.DOTALL)
"""How redis-py writes the message of an error in a pipeline."""


_ANSWERS: Final = (ResponseError, BusyLoadingError, AuthenticationError)


def is_denial(error: object) -> bool:
    """Whether Redis refuses one channel or key permanently, and not all commands.

    A key that is not a stream counts too, because it refuses entries until an operator deletes it.
    """
    return isinstance(error, NoPermissionError) or (
        isinstance(error, ResponseError) and str(error).startswith("WRONGTYPE")
    )


def is_answer(error: RedisError) -> bool:
    """Whether Redis has answered with this error; otherwise the outcome of the command is
    unknown."""
    return isinstance(error, _ANSWERS)


def reason(error: Exception) -> str:
    """The message of an error, without the command's arguments, which Redis and redis-py quote."""
    if isinstance(error, SidecarError):
        return error.detail
    if not isinstance(error, RedisError):
        return type(error).__name__  # its message may quote anything
    text = str(error).rpartition(" of pipeline caused error: ")[2]
    if quoted := _QUOTED.fullmatch(text):
        text = quoted[2]
    return text.partition(", with args")[0]
