"""Host names in `ALLOWED_HOSTS` and in the header Host."""

from __future__ import annotations

import ipaddress
import re
from typing import Final

_LABEL: Final = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_PORT: Final = r"(?::[0-9]{0,5})?"
_NAME: Final = re.compile(rf"({_LABEL}(?:\.{_LABEL})*)\.?{_PORT}")
_IPV6: Final = re.compile(rf"\[([0-9a-f:.]+)\]{_PORT}")


def host_name(text: str) -> str | None:
    """The host of `host` or `host:port`, normalised so that hosts can be compared.

    Returns:
        A name or IPv4 address in lower case and without a trailing dot, or an IPv6 address in its
        shortest form and without brackets. None if the text is none of these.
    """
    text = text.lower()
    if match := _NAME.fullmatch(text):
        return match[1]
    match = _IPV6.fullmatch(text)
    try:
        return str(ipaddress.IPv6Address(match[1] if match else text))
    except ValueError:
        return None


def allowed_host(entry: str) -> str:
    """One entry of `ALLOWED_HOSTS`: a host as `host_name` returns it, `*.` and a name, or `*`.

    Raises:
        ValueError: the entry is none of these.
    """
    if entry == "*":
        return entry
    wildcard = "*." if entry.startswith("*.") else ""
    name = host_name(entry.removeprefix(wildcard))
    if name is None or (wildcard and ":" in name):
        raise ValueError("no host name")
    return wildcard + name
