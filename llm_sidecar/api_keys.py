"""API keys as operators configure them: `key` or `name=key`, separated by commas."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Self

from pydantic import SecretStr

_KEY: Final = re.compile(r"[!-+\--~]{16,}")
"""Visible ASCII without a comma; shorter keys can be guessed."""
_NAMED: Final = re.compile(r"([a-z0-9_-]{1,32})=(.*)", re.DOTALL)

KEYS_DESCRIPTION: Final = (
    "keys of 16 or more visible ASCII characters, separated by commas; each may be name=key, with "
    "a name of up to 32 characters a-z, 0-9, _ and -, and no key may have two names"
)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One configured key.

    Attributes:
        name: None for a key without a name.
    """

    secret: SecretStr
    name: str | None = None

    @classmethod
    def parse(cls, entry: str) -> Self:
        """Parses `name=key`. If that does not match, the whole entry is the key, which may contain
        `=`.

        Raises:
            ValueError: the key is too short or has other characters; the error does not quote it.
        """
        named = _NAMED.fullmatch(entry)
        if named is not None and _KEY.fullmatch(named[2]):
            return cls(SecretStr(named[2]), named[1])
        if _KEY.fullmatch(entry):
            return cls(SecretStr(entry))
        raise ValueError("a key is empty, short or has other characters")


def parse_api_keys(value: object) -> object:
    """The keys of a comma-separated variable; anything but text is returned unchanged.

    Two keys may share a name, so that a key can be replaced while both are valid.

    Raises:
        ValueError: an entry is not a key, or one key has two names.
    """
    if not isinstance(value, str):
        return value
    keys = tuple(dict.fromkeys(ApiKey.parse(entry.strip()) for entry in value.split(",")))
    if len({key.secret for key in keys}) < len(keys):
        raise ValueError("a key has two names")
    return keys
