"""The URL of a Redis: what its parts and options mean, checked before anything connects.

redis://[[user]:password@]host[:port][/db]              rediss:// for TLS
unix://[[user]:password@]/path/of/socket
redis+sentinel://[[user]:password@]host[:port],…/master[/db]    rediss+sentinel:// for TLS
memory://[name]
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

MEMORY: Final = "memory"
SCHEMES: Final = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", MEMORY)
SENTINEL_PORT: Final = 26379


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Where a Redis is.

    Attributes:
        url: the URL without its options; for redis-py, unless it names sentinels.
        options: keyword arguments of redis-py's connections.
        tls: whether connections use TLS.
        master: the name of the master that the sentinels watch, or None without sentinels.
        sentinels: their hosts and ports.
        sentinel_options: keyword arguments of the connections to them.
    """

    url: str
    options: Mapping[str, Any]
    tls: bool = False
    master: str | None = None
    sentinels: tuple[tuple[str, int], ...] = ()
    sentinel_options: Mapping[str, Any] | None = None


def parse(url: str) -> RedisAddress:
    """Reads a URL that is not `memory://`.

    Raises:
        ValueError: the URL, or one of its options, is not valid; the message quotes nothing of it,
            for its password.
    """
    try:
        return _parse(url)
    except ValueError:
        raise ValueError("the Redis URL cannot be read") from None


def _parse(url: str) -> RedisAddress:
    parsed = urlsplit(url)
    scheme, _, sentinel = parsed.scheme.partition("+")
    if parsed.scheme not in SCHEMES or scheme == MEMORY or parsed.fragment:
        raise ValueError
    tls = scheme == "rediss"
    known = dict(_OPTIONS)
    known |= {} if scheme == "unix" else _TCP_OPTIONS
    known |= _TLS_OPTIONS if tls else {}
    known |= _SENTINEL_OPTIONS if sentinel else {}
    options = _options(parsed.query, known)
    if options.get("ssl_cert_reqs") == "none":
        # A certificate that is not verified has no host name to check either.
        options.setdefault("ssl_check_hostname", False)
    if sentinel:
        return _of_sentinels(parsed, options, tls)
    if scheme != "unix":
        _check_host(parsed)
    return RedisAddress(url.partition("?")[0], options, tls)


def _check_host(parsed: SplitResult) -> None:
    # `parsed.port` raises ValueError if the port is not valid.
    if parsed.port == 0:
        raise ValueError
    _database(parsed.path.removeprefix("/"))


def _of_sentinels(parsed: SplitResult, options: dict[str, Any], tls: bool) -> RedisAddress:
    credentials, _, hosts = parsed.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    master, _, database = parsed.path.removeprefix("/").partition("/")
    if not master:
        raise ValueError
    sentinel_options = {
        name.removeprefix("sentinel_"): options.pop(name)
        for name in list(options)
        if name in _SENTINEL_OPTIONS
    }
    given = {"username": unquote(user), "password": unquote(password), "db": _database(database)}
    return RedisAddress(
        parsed._replace(query="").geturl(),
        {name: value for name, value in given.items() if value} | options,
        tls,
        unquote(master),
        tuple(map(_sentinel, hosts.split(","))),
        sentinel_options,
    )


def _sentinel(text: str) -> tuple[str, int]:
    address = urlsplit(f"//{text}")
    if not address.hostname or address.port == 0 or address.path or address.query:
        raise ValueError
    return address.hostname, address.port or SENTINEL_PORT


def _database(text: str) -> int:
    return _natural(text) if text else 0


def _options(query: str, known: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    # Also refuses options that are not `name=value`.
    for name, value in parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)):
        if name not in known or name in options:
            raise ValueError
        options[name] = known[name](value)
    return options


def _text(value: str) -> str:
    if not value:
        raise ValueError
    return value


def _natural(value: str) -> int:
    if not (value.isascii() and value.isdecimal() and len(value) < 10):
        raise ValueError
    return int(value)


def _positive(value: str) -> int:
    if (number := _natural(value)) == 0:
        raise ValueError
    return number


def _seconds(value: str) -> float:
    seconds = float(value)
    if not 0 < seconds <= 3600:
        raise ValueError
    return seconds


def _one_of(**values: Any) -> Callable[[str], Any]:
    def read(value: str) -> Any:
        if value.lower() not in values:
            raise ValueError
        return values[value.lower()]

    return read


_switch: Final = _one_of(true=True, yes=True, false=False, no=False, **{"1": True, "0": False})

_OPTIONS: Final[Mapping[str, Callable[[str], Any]]] = {
    "db": _natural,
    "username": _text,
    "password": _text,
    "client_name": _text,
    "socket_timeout": _seconds,
    "socket_connect_timeout": _seconds,
    "health_check_interval": _natural,
    "max_connections": _positive,
}
_TCP_OPTIONS: Final[Mapping[str, Callable[[str], Any]]] = {"socket_keepalive": _switch}
_TLS_OPTIONS: Final[Mapping[str, Callable[[str], Any]]] = {
    "ssl_ca_certs": _text,
    "ssl_ca_path": _text,
    "ssl_certfile": _text,
    "ssl_keyfile": _text,
    "ssl_password": _text,
    "ssl_cert_reqs": _one_of(none="none", optional="optional", required="required"),
    "ssl_check_hostname": _switch,
    "ssl_ciphers": _text,
    "ssl_min_version": _one_of(
        **{"tlsv1.2": ssl.TLSVersion.TLSv1_2, "tlsv1.3": ssl.TLSVersion.TLSv1_3}
    ),
}
_SENTINEL_OPTIONS: Final[Mapping[str, Callable[[str], Any]]] = {
    "sentinel_username": _text,
    "sentinel_password": _text,
}
